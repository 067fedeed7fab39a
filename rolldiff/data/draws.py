"""In which order a training sees its images.

The order is a function of the seed alone: the set is gone through in one permutation after another,
and batch number `b` is the same whether the training ran through or was resumed at `b`, and
whatever the number of processes (each takes its share of every batch).
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["Draws"]


class Draws(Sampler):
    """Batches of indices.

    Args:
        count: images in the set.
        batch_size: indices a batch and process.
        batches: how many batches an epoch has.
        seed: of the permutations.
        done: tells, when an epoch begins, how many batches were drawn before.
        rank: which process this is.
        world: how many there are.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        batches: int,
        seed: int = 0,
        done: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.done = done
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        done = self.done()
        # An epoch that was left is gone on with, not begun again.
        for batch in range(done, (done // self.batches + 1) * self.batches):
            first = (batch * self.world + self.rank) * self.batch_size
            yield self._at(torch.arange(first, first + self.batch_size))

    def _at(self, place: Tensor) -> Tensor:
        """The indices at some places of the endless row of permutations."""
        epoch, at = place // self.count, place % self.count
        found = torch.empty_like(place)
        for number in epoch.unique().tolist():
            order = _permutation(self.count, self.seed, number)
            found[epoch == number] = order[at[epoch == number]]
        return found


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    # A plain sum would give seed 0, epoch 1 and seed 1, epoch 0 the same order.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
