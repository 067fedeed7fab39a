"""Progress on standard error: a bar in a terminal, otherwise a plain line from time to time."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["ProgressLog", "progress"]

T = TypeVar("T")

STEP, SECONDS, PAUSE = 0.1, 30.0, 1.0  # a line per 10 % or 30 s, at most one per second


class ProgressLog:
    """Lines such as `training: 500/1000 (50 %), 42 s`, for log files and pipes.

    Args:
        desc: what is in progress.
        total: number of steps; None if it is unknown.
        done: steps that were finished earlier.
    """

    def __init__(self, desc: str, total: int | None, *, done: int = 0) -> None:
        self.desc, self.total, self.start = desc, total, time.monotonic()
        self._printed_at, self._printed_done = self.start, done

    def update(self, done: int, note: Callable[[], str] | None = None) -> None:
        """Print a line if one is due.

        Args:
            done: steps that are finished.
            note: makes what is printed after the time.
        """
        now = time.monotonic()
        waited = now - self._printed_at
        steps = STEP * self.total if self.total else float("inf")
        due = waited >= SECONDS or (waited >= PAUSE and done - self._printed_done >= steps)
        if not (due or (done == self.total and done > self._printed_done)):
            return
        self._printed_at, self._printed_done = now, done
        share = f"/{self.total} ({100 * done // self.total} %)" if self.total else ""
        words = "" if note is None else note()
        tail = f", {words}" if words else ""
        line = f"{self.desc}: {done}{share}, {now - self.start:.0f} s{tail}"
        print(line, file=sys.stderr, flush=True)


def progress(iterable: Iterable[T], desc: str, *, unit: str = "it") -> Iterator[T]:
    """The items of an iterable, with progress on standard error.

    Args:
        iterable: what is iterated over.
        desc: what is in progress.
        unit: name of an item, for the bar.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm  # imported here: only a terminal needs it

        yield from tqdm(iterable, desc=desc, unit=unit)
        return
    log = ProgressLog(desc, len(iterable) if isinstance(iterable, Sized) else None)
    for done, item in enumerate(iterable, start=1):
        yield item
        log.update(done)
