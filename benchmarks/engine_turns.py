"""Times taken in turns, on a machine that others may be working on too.

What is compared runs one after another, again and again, so that a slow minute hurts all of it
alike. It does not quite: where another program shares the core or its cache, small calls lose more
than large ones. So around every time a short loop of plain Python is timed, which knows nothing of
what is measured. A turn in which that loop was slow is taken again.
"""

import math
import time
from collections.abc import Callable

import torch

# A turn is disturbed if the loop took so many times as long as the fastest one so far: more than a
# quiet machine varies by, less than a busy neighbour on the same core costs.
DISTURBED = 1.3
# Not more than so many times the turns that are asked for.
MOST = 3

Turns = dict[str, list[float]]
Cases = dict[str, Callable[[], object]]


class Stopwatch:
    """Takes times in turns.

    Attributes:
        again: turns that were taken again because something else disturbed them.
        disturbed: turns that were kept although disturbed, for want of better ones.
    """

    def __init__(self) -> None:
        self.again = 0
        self.disturbed = 0
        self._fastest = math.inf

    def turns(self, cases: Cases, count: int, *, device: torch.device) -> Turns:
        """Seconds of each case in the `count` least disturbed turns; a first one is not counted."""
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
            quiet = sum(slowest <= DISTURBED * self._fastest for slowest, _ in taken)
        self.again += len(taken) - count
        self.disturbed += max(0, count - quiet)
        kept = sorted(taken, key=lambda turn: turn[0])[:count]
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
