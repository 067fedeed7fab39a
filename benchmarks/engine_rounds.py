"""Interleaved rounds of timings, on a machine that other work may share.

All variants run one after another, round after round, so that a slow minute affects all of them.
Small calls still lose more than large ones if another program shares the core or its cache.
Therefore a short loop of plain Python is timed around every measurement, and a round in which that
loop was slow is repeated.
"""

import math
import time
from collections.abc import Callable

import torch

# A round is noisy if the loop took this many times the fastest time so far: more than a
# quiet machine varies by, less than a busy neighbour on the same core costs.
NOISY = 1.3
# At most this many times the requested number of rounds.
MOST = 3

Rounds = dict[str, list[float]]
Cases = dict[str, Callable[[], object]]


class Stopwatch:
    """Times variants in interleaved rounds.

    Attributes:
        repeated: rounds that were repeated because they were noisy.
        noisy: noisy rounds that were kept because too few were quiet.
    """

    def __init__(self) -> None:
        self.repeated = 0
        self.noisy = 0
        self._fastest = math.inf

    def time_rounds(self, cases: Cases, count: int, *, device: torch.device) -> Rounds:
        """Seconds of each case in the `count` least noisy rounds, after one warm-up."""
        for case in cases.values():
            case()
        taken: list[tuple[float, list[float]]] = []
        quiet = 0
        while quiet < count and len(taken) < MOST * count:
            loops, seconds = [loop_seconds()], []
            for case in cases.values():
                start = now(device)
                case()
                seconds.append(now(device) - start)
                loops.append(loop_seconds())
            taken.append((max(loops), seconds))
            self._fastest = min(self._fastest, *loops)
            quiet = sum(slowest <= NOISY * self._fastest for slowest, _ in taken)
        self.repeated += len(taken) - count
        self.noisy += max(0, count - quiet)
        kept = sorted(taken, key=lambda entry: entry[0])[:count]
        return dict(zip(cases, map(list, zip(*(s for _, s in kept), strict=True)), strict=True))


def loop_seconds() -> float:
    """Seconds of a loop that depends on nothing but the speed of the core."""
    start = time.perf_counter()
    total = 0
    for i in range(50_000):
        total += i
    return time.perf_counter() - start


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
