"""The jobs of a sweep: what each leaves behind, and the table of all of them.

Jobs may run in other processes, and on other machines that share the folder of the sweep. Each has
a file of its own there, `.jobs/NUMBER.json`, written when it begins and again when it ends. The
table is made from these files.
"""

import csv
import json
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rolldiff.errors import UsageError, reason
from rolldiff.files import LOCK, is_running, locked, write_text, written_whole
from rolldiff.objective import flat, is_better_larger

__all__ = ["Job", "Outcome", "Sweep"]

RECORDS, TABLE = ".jobs", "sweep.csv"
LOST = "the process ended without a word, as when it is killed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command has come to.

    Attributes:
        finished: whether it came to its end; a training may stop at its time limit.
        metric: the name of the number that a sweep searches by; empty for none.
        objective: that number.
        values: all that was reported, nested.
    """

    finished: bool = True
    metric: str = ""
    objective: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The record of a job.

    Attributes:
        number: of the job in its sweep.
        overrides: its settings as on the command line.
        folder: where it writes.
        host: the machine that it runs on.
        pid: its process there.
        began: when it began, in seconds since 1970.
        state: how far it came.
        seconds: from its beginning to its end.
        error: what ended it, in one line.
        metric: see `Outcome`, as for what follows.
        objective: the number of the metric.
        numbers: all reported numbers by dotted names.
    """

    number: int
    overrides: Sequence[str]
    folder: str
    host: str
    pid: int
    began: float
    state: Literal["running", "finished", "failed", "stopped"] = "running"
    seconds: float | None = None
    error: str = ""
    metric: str = ""
    objective: float | None = None
    numbers: Mapping[str, int | float | None] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """Values by keys, as texts."""
        pairs = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+"): value for key, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A folder for the jobs of one command.

    Args:
        folder: of the sweep, the same for all processes.
        command: such as `train`.
        larger: whether larger numbers are better; None to go by the metric.
    """

    folder: Path
    command: str
    larger: bool | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder, new or empty, for this sweep alone; removed again if no job begins.

        Raises:
            UsageError: if the folder holds anything, or is another job's.
        """
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"hydra.sweep.dir must be a folder that can be made, got {self.folder}: "
                f"{reason(error)}"
            ) from error
        with locked(self.folder, name="hydra.sweep.dir"):
            if any(path.name != LOCK for path in self.folder.iterdir()):
                raise UsageError(
                    f"hydra.sweep.dir must be a new or an empty folder, got {self.folder}"
                )
            yield
            begun = (self.folder / RECORDS).exists()
        if not begun:  # otherwise the corrected command would be refused
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in missing:
                path.rmdir()

    def begin(self, number: int, overrides: Sequence[str], folder: Path) -> Job:
        """The record of a job that begins now."""
        (self.folder / RECORDS).mkdir(exist_ok=True)
        job = Job(
            number=number,
            overrides=overrides,
            folder=str(folder),
            host=platform.node(),
            pid=os.getpid(),
            began=time.time(),
        )
        self._write(job)
        return job

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record that a job has come to its end, or to its time limit."""
        state: Literal["finished", "stopped"] = "finished" if outcome.finished else "stopped"
        job = replace(job, state=state, metric=outcome.metric, objective=outcome.objective)
        self._write(replace(job, numbers=flat(outcome.values), seconds=time.time() - job.began))

    def break_off(self, job: Job, error: str, *, stopped: bool) -> None:
        """Record that a job has failed or was told to stop."""
        state: Literal["failed", "stopped"] = "stopped" if stopped else "failed"
        self._write(replace(job, state=state, error=error, seconds=time.time() - job.began))

    def jobs(self, *, interrupted: bool = False) -> list[Job]:
        """All jobs that have begun, by their numbers.

        A queue's job may run on when the sweep has ended early. One whose process is gone without
        a word has failed.

        Args:
            interrupted: whether the sweep was; such a job has stopped then.
        """
        found = []
        for path in (self.folder / RECORDS).glob("*.json"):
            job = Job(**json.loads(path.read_text(encoding="utf-8")))
            gone = job.host == platform.node() and (
                job.pid == os.getpid() or not is_running(job.pid)
            )
            if job.state == "running" and gone and interrupted:
                job = replace(job, state="stopped")
            elif job.state == "running" and gone:
                job = replace(job, state="failed", error=LOST)
            found.append(job)
        return sorted(found, key=lambda job: job.number)

    def best(self, jobs: Sequence[Job]) -> Job | None:
        """The finished job with the best number, if there is one."""
        found = [(job.objective, job) for job in jobs if job.objective is not None]
        sign = -1 if self._larger_is_better(jobs) else 1
        finite = [(sign * value, job) for value, job in found if math.isfinite(value)]
        return min(finite, key=lambda pair: pair[0])[1] if finite else None

    def write_table(self, jobs: Sequence[Job]) -> Path:
        """Write `sweep.csv`, one row per job with all its numbers."""
        settings, numbers = _differing(jobs), _union(job.numbers for job in jobs)
        head = ["job", "state", *settings, "objective", "seconds", "folder", "error"]
        rows: list[list[Any]] = [[*head, *(f"reported.{name}" for name in numbers)]]
        for job in jobs:
            fixed = [job.objective, job.seconds, job.folder, job.error]
            chosen = [job.settings.get(name, "") for name in settings]
            measured = [job.numbers.get(name) for name in numbers]
            rows.append([job.number, job.state, *chosen, *fixed, *measured])
        with (
            written_whole(self.folder / TABLE) as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows(rows)
        return self.folder / TABLE

    def table(self, jobs: Sequence[Job]) -> str:
        """The jobs for a terminal: a line for each, the errors, and the best with its command."""
        settings = _differing(jobs)
        head = ["job", "state", *settings, _metric(jobs) or "objective", "seconds", "folder"]
        rows = [head]
        for job in jobs:
            chosen = [job.settings.get(name, "") for name in settings]
            measured = [_cell(job.objective, ".5g"), _cell(job.seconds, ".1f")]
            rows.append([str(job.number), job.state, *chosen, *measured, _shown(job.folder)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"job {job.number} {job.state}: {job.error}" for job in jobs if job.error]
        best = self.best(jobs)
        if best is not None:
            lines += ["", f"Best: job {best.number}, {best.metric} {best.objective:.5g}; again by:"]
            lines += [f"  {self.command_of(best)}"]
        return "\n".join(lines)

    def command_of(self, job: Job) -> str:
        """The command that runs a job by itself."""
        overrides = list(job.overrides)
        if any(override.startswith("hparams_search=") for override in overrides):
            overrides.append("hydra.mode=RUN")  # otherwise it would search
        return shlex.join(["rolldiff", self.command, *overrides])

    def _larger_is_better(self, jobs: Sequence[Job]) -> bool:
        return is_better_larger(_metric(jobs)) if self.larger is None else self.larger

    def _write(self, job: Job) -> None:
        text = json.dumps(asdict(job), indent=2)
        write_text(self.folder / RECORDS / f"{job.number}.json", text + "\n")


def _metric(jobs: Sequence[Job]) -> str:
    return next((job.metric for job in jobs if job.metric), "")


def _differing(jobs: Sequence[Job]) -> list[str]:
    """The settings that are not the same in all jobs."""
    names = _union(job.settings for job in jobs)
    return [name for name in names if len({job.settings.get(name) for job in jobs}) > 1]


def _union(mappings: Iterator[Mapping[str, Any]]) -> list[str]:
    """All keys, in their order."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _shown(folder: str) -> str:
    """A folder, from the current one if it is below."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
