"""Several processes that do one job: those that torchrun or SLURM started, or new ones.

A job is the same function in every process. The main process, of rank 0, writes. What one process
finds out the others hear through `Processes`, on the CPU with gloo. An error in one ends them all:
in the others the next exchange fails, because the connection is closed or nothing was heard for
the time limit; and whoever started them ends those that are left.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from rolldiff import slurm
from rolldiff.signals import Interrupted, handled, raised

__all__ = ["OtherProcessError", "Processes", "are_started", "is_lost", "processes", "start"]

T = TypeVar("T")

GRACE = 20.0  # seconds in which the other processes may end by themselves after an error in one
HALF_HOUR = timedelta(minutes=30)


class OtherProcessError(RuntimeError):
    """Another process of the job has failed."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job. The main one, of rank 0, computes the metrics and writes.

    Attributes:
        rank: of this process, from 0 on.
        size: how many there are.
        local_rank: its number on this machine.
        local_size: how many there are on each machine.
        group: of torch.distributed, with gloo; None for the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """The indices, of `count`, that this process handles."""
        return range(self.rank, count, self.size)

    def gather(self, shard: list[T]) -> list[T]:
        """The results of all processes in the order of the indices; empty but on the main one."""
        if self.size == 1:
            return shard
        shards: list[list[T] | None] | None = [None] * self.size if self.is_main else None
        distributed.gather_object(shard, shards, group=self.group)
        if shards is None:
            return []
        parts = [part for part in shards if part is not None]
        return [
            parts[n % self.size][n // self.size] for n in range(sum(len(part) for part in parts))
        ]

    def broadcast(self, value: T) -> T:
        """The main process's value, on all processes."""
        box = [value]
        if self.size > 1:
            distributed.broadcast_object_list(box, group=self.group)
        return box[0]

    def largest(self, value: int) -> int:
        """The largest of the values of all processes, on all processes."""
        if self.size == 1:
            return value
        box = torch.tensor([value])
        distributed.all_reduce(box, distributed.ReduceOp.MAX, group=self.group)
        return int(box)

    def together(self, function: Callable[[], T]) -> T:
        """What a function returns in this process.

        Raises:
            Exception: what it raised here.
            OtherProcessError: if it failed in another process.
        """
        return self._agreed(function, runs=True)

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function returns in the main process, on all processes.

        Raises:
            Exception: what it raised, in the main process.
            OtherProcessError: if it failed, in the others.
        """
        return self.broadcast(self._agreed(function, runs=self.is_main))

    def _agreed(self, function: Callable[[], T], *, runs: bool) -> T:
        value: Any = None
        error: Exception | None = None
        try:
            value = function() if runs else None
        except Exception as failure:
            error = failure
        if self.size > 1:
            texts: list[str | None] = [None] * self.size
            text = None if error is None else str(error) or type(error).__name__
            distributed.all_gather_object(texts, text, group=self.group)
            for rank, said in enumerate(texts):
                if said is not None and error is None:
                    raise OtherProcessError(f"process {rank}: {said}")
        if error is not None:
            raise error
        return value

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block on the main process before the others, so that it fills the caches."""
        if self.size > 1 and not self.is_main:
            distributed.barrier(group=self.group)
        yield
        if self.size > 1 and self.is_main:
            distributed.barrier(group=self.group)


def are_started() -> bool:
    """Whether this process is one of several that torchrun, SLURM's srun or `start` started."""
    return "WORLD_SIZE" in os.environ or slurm.is_task()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process did not answer; gloo says it in words alone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)


@contextmanager
def processes(*, backend: str = "gloo", timeout: timedelta = HALF_HOUR) -> Iterator[Processes]:
    """Join the processes that were started, or be this one alone.

    Args:
        backend: of torch.distributed's default group: `gloo`, or `nccl` for tensors on CUDA.
        timeout: how long one process waits for another before it fails.

    Raises:
        UsageError: if SLURM started a different number of tasks on each node.
    """
    if "WORLD_SIZE" not in os.environ and slurm.is_task():
        os.environ.update(slurm.task_environment())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    distributed.init_process_group(backend, timeout=timeout)
    group = None if backend == "gloo" else distributed.new_group(backend="gloo", timeout=timeout)
    try:
        yield Processes(
            rank=distributed.get_rank(),
            size=size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            group=group,
        )
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Starting them


class _Report(NamedTuple):
    """How the function ended in a process: with a value, or with an error and its cause."""

    value: Any = None
    error: BaseException | None = None
    cause: BaseException | None = None
    trace: str = ""


class _RemoteTracebackError(Exception):
    """The traceback of another process, as the cause of an error that it sent."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def start(
    function: Callable[[T], Any],
    argument: T,
    *,
    count: int,
    initializer: Callable[[], None] | None = None,
) -> Any:
    """Call a function in new processes on this machine, which find each other with `processes`.

    Ctrl-C and SIGTERM are passed on to them. When one fails, the others are ended. When this
    process is killed, they are asked to end.

    As with all of Python's spawned processes, a script that calls this must do so below
    `if __name__ == "__main__":`.

    Args:
        function: of one argument, from the top level of a module.
        argument: its argument.
        count: the number of processes.
        initializer: called in each process before the function.

    Returns:
        What the function returned in the main process.

    Raises:
        BaseException: what it raised in the process that failed first.
        OtherProcessError: if a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    # torchrun's way: the store that the processes meet at is that of whoever starts them.
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    threads = max(1, torch.get_num_threads() // count)
    jobs, reports = [], []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        here, there = context.Pipe(duplex=False)
        arguments = (function, argument, initializer, environment, threads, there)
        jobs.append(context.Process(target=_work, args=arguments, name=f"process {rank}"))
        reports.append(here)

    asked: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        asked.append(signum)
        for job in jobs:
            if job.pid is not None and job.is_alive():
                os.kill(job.pid, signum)

    with handled(pass_on):
        try:
            for job in jobs:
                job.start()
            said: dict[int, _Report] = {}
            failed = _first_failure(jobs, reports, said)
        finally:
            _end(jobs)
    _hear(reports, said)
    if failed is None:
        return said[0].value
    error = _failure(failed, jobs, said)
    if asked and isinstance(error, OtherProcessError):  # before it could say so itself
        raise Interrupted(asked[0]) from error
    raise error


def _first_failure(
    jobs: Sequence[Any], reports: Sequence[Connection], said: dict[int, _Report]
) -> int | None:
    """Wait until a process has failed, or all have ended: which, or None.

    One that has sent its result has done its work, whatever ends it then: on its way out, torch has
    been seen to abort a process.
    """
    running = {job.sentinel: rank for rank, job in enumerate(jobs)}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running))]
        for rank in ended:
            jobs[rank].join()
        # One that was killed comes first: the others fail because it is gone.
        _hear(reports, said)
        failed = [r for r in ended if jobs[r].exitcode and not (r in said and not said[r].error)]
        if failed:
            return min(failed, key=lambda rank: jobs[rank].exitcode)
    return None


def _end(jobs: Sequence[Any]) -> None:
    """End the processes that are left, more and more firmly."""
    for ask, seconds in ((None, GRACE), ("terminate", GRACE / 4), ("kill", None)):
        left = [job for job in jobs if job.pid is not None and job.is_alive()]
        for job in left:
            if ask is not None:
                getattr(job, ask)()
        until = None if seconds is None else time.monotonic() + seconds
        for job in left:
            job.join(None if until is None else max(0.0, until - time.monotonic()))


def _hear(reports: Sequence[Connection], said: dict[int, _Report]) -> None:
    """Take the reports that have come."""
    for rank, report in enumerate(reports):
        with suppress(EOFError):  # of one that was killed while it wrote
            if rank not in said and report.poll():
                said[rank] = report.recv()


def _failure(failed: int, jobs: Sequence[Any], said: dict[int, _Report]) -> BaseException:
    """The error to raise for a process that failed."""
    if failed not in said:
        code = jobs[failed].exitcode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return OtherProcessError(f"process {failed} of {len(jobs)} was {how}, and the job with it")
    # What it complains of may be the failure of another one.
    causes = [r for r in said.values() if r.error is not None and not _follows(r.error)]
    first = said[failed] if not _follows(said[failed].error) else next(iter(causes), said[failed])
    assert first.error is not None
    first.error.__cause__ = first.cause or _RemoteTracebackError(first.trace)
    return first.error


def _follows(error: BaseException | None) -> bool:
    """Whether an error is only that another process has failed."""
    lost = isinstance(error, RuntimeError) and is_lost(error)
    return lost or isinstance(error, OtherProcessError)


def _work(
    function: Callable[[T], Any],
    argument: T,
    initializer: Callable[[], None] | None,
    environment: dict[str, str],
    threads: int,
    report: Connection,
) -> None:
    """What a new process does."""
    # Out of the terminal's group: Ctrl-C would come twice, from there and passed on.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with raised():
            if initializer is not None:
                initializer()
            value = function(argument)
    except BaseException as error:
        report.send(_sendable(error))
        raise SystemExit(error.status if isinstance(error, Interrupted) else 1) from None
    report.send(_Report(value))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if distributed.is_initialized():
        os.kill(os.getpid(), signal.SIGTERM)  # in training: save and end
        time.sleep(3 * GRACE)
    os._exit(1)  # also while it waits, outside of Python, for the others to join


def _sendable(error: BaseException) -> _Report:
    trace = "".join(traceback.format_exception(error))
    report = _Report(error=error, cause=error.__cause__, trace=trace)
    try:
        pickle.loads(pickle.dumps(report))
    except Exception:  # whatever an error of somebody else's cannot do
        return _Report(error=RuntimeError(str(error)), trace=trace)
    return report
