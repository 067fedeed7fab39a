"""What a decode costs: network calls in series, token evaluations, seconds.

Calls and tokens are counted where the backbone is called, never derived from the settings.
`predict` says beforehand what the count will be. With a cache and one call a step it is

    nfe = R = S + (G - 1) k,        tokens = N (S + 1) - (tokens of the last group),

whatever the number of groups and the overlap: `S` evaluations for each token and one more to write
the cache, which the last group does not need.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rolldiff.grouping import Grouping
from rolldiff.schedule import RollingSchedule

__all__ = ["Cost", "Meter", "predict"]


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
    """Counts the calls and tokens of a decode as they happen, and keeps its time.

    Args:
        device: what runs the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nfe = 0
        self.tokens = 0
        self._start = time.perf_counter()

    def count(self, x_t: Tensor, y: Tensor) -> None:
        """A call; the batch of its output over that of its input is the number of branches."""
        self.nfe += 1
        self.tokens += x_t.shape[1] * len(y) // len(x_t)

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
