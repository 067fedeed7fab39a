"""Callbacks of a training: sample images, a time limit, progress."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar

from rolldiff.errors import UsageError
from rolldiff.evaluation.images import labelled_rows
from rolldiff.progress import ProgressLog
from rolldiff.training.module import LitDecoder

__all__ = ["ProgressLines", "SampleGrid", "TimeLimit", "progress_bar"]


class SampleGrid(Callback):
    """At every validation, one row of samples per `num_groups`, all from the same noise.

    To sample with averaged weights, put it before the averaging callback: that one swaps the
    averaged weights in when the validation begins and out when it ends, callback by callback.

    Args:
        folder: where `step-000000.png` is written.
        num_groups: the group counts.
        steps: solver steps per group.
        count: images per row; they cycle through the class labels, if there are any.
    """

    def __init__(
        self, folder: str | Path, *, num_groups: Sequence[int], steps: int = 8, count: int = 10
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.num_groups = tuple(num_groups)
        self.steps = steps
        self.count = count

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LitDecoder):
            raise UsageError(
                "callbacks.samples must be null unless a decoder is trained, got a "
                f"{type(pl_module).__name__}"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        decoder = cast(LitDecoder, pl_module).model
        classes = decoder.conditioning.num_classes
        cond = torch.arange(self.count) % classes if classes else None
        page = {
            f"num_groups {groups}": decoder.decode(
                cond, num_images=self.count, num_groups=groups, steps=self.steps, seed=0
            ).image
            for groups in self.num_groups
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        labelled_rows(page).save(self.folder / f"step-{trainer.global_step:06d}.png")


class TimeLimit(Callback):
    """Measures the time of a training across resumptions, and stops it after a limit to be resumed.

    Lightning's `max_time` ends a training: it counts the time before a resumption too, and at the
    end of `fit` the averaged weights replace the trained ones. This callback limits the time since
    the start or the last resumption, and saves a checkpoint with both sets of weights before
    `fit` ends. It must come after the averaging callback, so that the checkpoint holds the average
    of this step.

    Args:
        limit: `DD:HH:MM:SS`, or None for no limit.
        checkpoint: where the checkpoint is saved.

    Attributes:
        reached: whether the limit has stopped the training before its last step.

    Raises:
        UsageError: if the limit is not of this form.
    """

    def __init__(self, limit: str | None, checkpoint: Path) -> None:
        super().__init__()
        self.limit = None if limit is None else _parse_duration(limit)
        self.checkpoint = checkpoint
        self.reached = False
        self._seconds_before = 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the first training step, without pauses between resumptions."""
        return self._seconds_before + self._seconds_since_start

    @property
    def _seconds_since_start(self) -> float:
        return 0.0 if self._start is None else time.perf_counter() - self._start

    def on_train_batch_start(self, *_: object) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        over = self.limit is not None and self._seconds_since_start > self.limit.total_seconds()
        if over and not self.reached and trainer.global_step < trainer.max_steps:
            self.reached = True
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._seconds_before = state_dict["seconds"]


def _parse_duration(text: str) -> timedelta:
    parts = str(text).split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"time_limit must be a time DD:HH:MM:SS, got {text!r}")
    days, hours, minutes, seconds = map(int, parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


class ProgressLines(ProgressBar):
    """The progress of a training as plain lines on standard error, see `ProgressLog`."""

    def __init__(self) -> None:
        super().__init__()
        self._log: ProgressLog | None = None

    def disable(self) -> None:
        """Lightning calls it in all processes but the first; only the first prints."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._log = ProgressLog("training", total, done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        if self._log is not None:
            loss = trainer.progress_bar_metrics.get("loss")
            self._log.update(trainer.global_step, "" if loss is None else f"loss {loss:.4g}")


def progress_bar() -> ProgressBar:
    """A bar in a terminal, plain lines elsewhere."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return TQDMProgressBar() if terminal else ProgressLines()
