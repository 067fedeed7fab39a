"""The processes of a bench: who draws which batch, and how the results come together.

Batches are dealt in turn and gathered in order, so that whoever computes the metrics has the same
numbers before him, bit by bit, however many processes there are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

__all__ = ["Share", "shared"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process among `world`; the one of rank 0 leads: it measures, writes and prints."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """The numbers, of `count`, that are this process's."""
        return range(self.rank, count, self.world)

    def gather(self, mine: list[T]) -> list[T]:
        """What all processes made of their numbers, in order; empty but for the leader."""
        if self.world == 1:
            return mine
        parts: list[list[T] | None] | None = [None] * self.world if self.leads else None
        distributed.gather_object(mine, parts)
        if parts is None:
            return []
        every = [part for part in parts if part is not None]
        count = sum(map(len, every))
        return [every[number % self.world][number // self.world] for number in range(count)]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader goes through the block before the others do: it fills the caches."""
        if self.world > 1 and not self.leads:
            distributed.barrier()
        yield
        if self.world > 1 and self.leads:
            distributed.barrier()

    def told(self, words: T) -> T:
        """What the leader says, for all."""
        said = [words]
        if self.world > 1:
            distributed.broadcast_object_list(said)
        return said[0]


@contextmanager
def shared() -> Iterator[Share]:
    """The processes that `torchrun` started, or this one alone.

    Tensors are gathered on the CPU, by gloo; the process of local rank `i` decodes on CUDA device
    `i`, where there are any.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Share()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("gloo")
    try:
        yield Share(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()
