"""Signals as exceptions: a job that is asked to end says so, and ends with the usual status."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rolldiff import slurm

__all__ = ["Interrupted", "handled", "raised"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send before they kill


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        name: of the signal, such as `SIGTERM`.
        status: the exit status by convention: 130 for Ctrl-C, 143 for `SIGTERM`.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.name = signal.Signals(signum).name
        self.status = 128 + signum

    def __reduce__(self) -> tuple[type, tuple[int]]:  # from one process to another
        return Interrupted, (self.status - 128,)


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle these signals in a block; the handlers before it return afterwards.

    Only the main thread can do so; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (*SIGNALS, *slurm.signals())
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)


def raised() -> Any:
    """A block in which these signals raise `Interrupted`."""

    def handler(signum: int, frame: Any) -> None:
        raise Interrupted(signum)

    return handled(handler)
