"""What a decode costs: network calls in series, token evaluations, seconds.

Calls and tokens are counted by a hook on the backbone, never derived from the settings. `predict`
says beforehand what the count will be. With a cache and one call a step it is

    nfe = R = S + (G - 1) k,        tokens = N (S + 1) - (tokens of the last group),

whatever the number of groups and the overlap: `S` evaluations for each token and one more to write
the cache, which the last group does not need.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rolldiff.denoiser import Backbone, Context
from rolldiff.grouping import Grouping
from rolldiff.schedule import RollingSchedule

__all__ = ["Cost", "Meter", "metered", "predict"]


@dataclass(frozen=True)
class Cost:
    """The measured cost of one decode.

    Attributes:
        nfe: network calls, one after another.
        tokens: token evaluations for one image; with guidance both branches count.
        seconds: wall-clock time.
        seconds_to_first_group: wall-clock time until the first group would not change any more.
        cached: whether finished tokens were kept instead of computed again.
    """

    nfe: int
    tokens: int
    seconds: float
    seconds_to_first_group: float
    cached: bool


class Meter:
    """Counts calls and tokens as they happen.

    Args:
        device: what runs the calls.
        context: count only the calls that this context is handed to; None counts all.
    """

    def __init__(self, device: torch.device, context: Context | None = None) -> None:
        self.device = device
        self.context = context
        self.nfe = 0
        self.tokens = 0
        self._start = time.perf_counter()

    def count(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook: the output's batch over the input's is the number of branches."""
        if self.context is not None and self.context is not inputs[2]:
            return
        self.nfe += 1
        self.tokens += output.shape[1] * output.shape[0] // inputs[0].shape[0]

    def seconds(self) -> float:
        """Since the start; on CUDA, once all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self._start

    def cost(self, *, first: float, cached: bool) -> Cost:
        """The cost so far; `first` are the seconds to the first group."""
        return Cost(self.nfe, self.tokens, self.seconds(), first, cached)


def predict(
    num_tokens: int,
    schedule: RollingSchedule,
    steps: int,
    *,
    calls: int = 1,
    guidance: bool = False,
    causal: bool = True,
    cache: bool = True,
) -> tuple[int, int]:
    """The `nfe` and `tokens` of a decode, in closed form.

    Args:
        num_tokens: `N`.
        schedule: the groups and their overlap.
        steps: `S`, solver steps a group.
        calls: network calls of a step, 1 or 2; a token's last step takes one.
        guidance: whether every call has two branches.
        causal: whether the backbone is block-causal.
        cache: whether finished tokens are cached; only a causal backbone can.
    """
    ends = Grouping(num_tokens, schedule.num_groups).ends
    rows, k = schedule.num_steps(steps), schedule.stagger(steps)
    together = k == 0 or schedule.num_groups == 1
    last = num_tokens if together else num_tokens - ends[-2]
    # The second call is spared in the rows where all that moves arrives.
    arrivals = schedule.num_groups if k == steps and not together else 1
    again = (calls - 1) * (rows - arrivals)
    if causal and cache:
        tokens = num_tokens * (steps + 1) - last
        spared = num_tokens if arrivals > 1 else last
        tokens += (calls - 1) * (num_tokens * steps - spared)
    elif causal:
        # A token is in every call from its group's start to the end.
        sizes = [b - a for a, b in pairwise(ends)]
        tokens = sum(size * (rows - g * k) for g, size in enumerate(sizes))
        if calls > 1:
            alone = [g * k + steps - 1 for g in range(len(sizes))] if arrivals > 1 else [rows - 1]
            started = [ends[schedule.moving(row, steps)[1]] for row in alone]
            tokens += tokens - sum(started)
    else:
        tokens = num_tokens * (rows + again)
    return rows + again, tokens * (2 if guidance else 1)


@contextmanager
def metered(backbone: Backbone, context: Context | None = None) -> Iterator[Meter]:
    """Count the backbone's calls inside the block, all of them or those with a context."""
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"backbone must be an nn.Module, got {type(backbone).__name__}")
    meter = Meter(next(backbone.parameters()).device, context)
    handle = backbone.register_forward_hook(meter.count)
    try:
        yield meter
    finally:
        handle.remove()
