"""Callbacks of a training: averaged weights, sample images, the clock, progress."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ProgressBar,
    TQDMProgressBar,
)
from torch.optim.swa_utils import AveragedModel

from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.diffusion.schedule import check_grouping
from rolldiff.errors import UsageError, finite_number, whole_number
from rolldiff.evaluation.images import as_pictures, labelled_rows, save_picture
from rolldiff.evaluation.report import as_trained
from rolldiff.processes import Processes
from rolldiff.progress import ProgressLog
from rolldiff.signals import Interrupted, handled
from rolldiff.training.module import LitDecoder, images_per_batch
from rolldiff.training.sharding import is_sharded, load_whole_state, whole_state

__all__ = [
    "AveragedWeights",
    "Clock",
    "ProgressLines",
    "SampleGrid",
    "duration",
    "progress_bar",
]


class SampleGrid(Callback):
    """At every validation, one row of samples per `num_groups`, all from the same noise.

    Latents are shown by the autoencoder of the data, or by their first channels without one.

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
        self.num_groups = tuple(dict.fromkeys(num_groups))
        self.steps = steps
        self.count = whole_number(count, "callbacks.samples.count")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LitDecoder):
            raise UsageError(
                "callbacks.samples must be null unless a decoder is trained, got a "
                f"{type(pl_module).__name__}"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        decoder = cast(LitDecoder, pl_module).whole_model()
        if not trainer.is_global_zero:
            return
        assert isinstance(decoder, Decoder)
        classes = decoder.conditioning.num_classes
        cond = torch.arange(self.count) % classes if classes else None
        grouping = check_grouping(decoder.training_distribution.grouping[0])
        page = {}
        for groups in self.num_groups:
            config = DecodeConfig(num_groups=groups, grouping=grouping, steps=self.steps)
            config = as_trained(config, decoder)
            image = decoder.decode(cond, config, num_images=self.count, seed=0).image
            if decoder.latents:
                data = trainer.datamodule  # type: ignore[attr-defined]
                autoencoder = getattr(data, "autoencoder", None)
                image = as_pictures(image, None if autoencoder is None else autoencoder.decode)
            page[f"num_groups {groups}"] = image
        self.folder.mkdir(parents=True, exist_ok=True)
        save_picture(labelled_rows(page), self.folder / f"step-{trainer.global_step:06d}.png")


class AveragedWeights(EMAWeightAveraging):
    """An exponential moving average of the weights, which follows them until averaging starts.

    Lightning's average stays at the initial weights until then, and a training that ends earlier
    would save those. It does not know of sharded weights either; this one is sharded as they are.
    And its rounding moves what does not change, such as frozen weights and whole numbers.

    Args:
        decay: of the average, in [0, 1).
        start: the first optimizer step that is averaged.

    Raises:
        UsageError: if an argument is out of range.
    """

    def __init__(self, *, decay: float = 0.999, start: int = 0) -> None:
        decay = finite_number(decay, "callbacks.ema.decay", minimum=0, maximum=1)
        start = whole_number(start, "callbacks.ema.start", minimum=0)
        super().__init__(decay=decay, update_starting_at_step=start)
        self._kwargs["avg_fn"] = partial(_averaged, decay=decay)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._average_model = AveragedModel(
            pl_module, device=pl_module.device, use_buffers=self._use_buffers, **self._kwargs
        )
        self._average_model.module.configure_model()  # type: ignore[operator]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and _is_sharded(pl_module):
            checkpoint["state_dict"] = whole_state(self._average_model.module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None or not _is_sharded(pl_module):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        # The strategy has loaded the averaged weights by now, and taken them out of the checkpoint.
        self._follow(pl_module)
        if "current_model_state" in checkpoint:
            load_whole_state(pl_module, checkpoint["current_model_state"])
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._latest_update_step == 0 and self._average_model is not None:
            self._follow(pl_module)

    def _follow(self, pl_module: L.LightningModule) -> None:
        """Make the average what the weights are."""
        assert self._average_model is not None
        module = self._average_model.module
        average = chain(module.parameters(), module.buffers())
        current = chain(pl_module.parameters(), pl_module.buffers())
        for mean, value in zip(average, current, strict=True):
            mean.data.copy_(value.data)


def _averaged(mean: torch.Tensor, value: torch.Tensor, count: Any, *, decay: float) -> torch.Tensor:
    # Equal numbers stay as they are, which decay * mean + (1 - decay) * value does not promise.
    return mean.lerp(value, 1 - decay) if mean.is_floating_point() else value


def _is_sharded(pl_module: L.LightningModule) -> bool:
    return any(is_sharded(module) for module in pl_module.modules())


class Clock(Callback):
    """Counts the time and the images of a training, and stops it so that it can be resumed.

    It stops after a time limit, and when the process is asked to end (Ctrl-C, SIGTERM): after the
    current batch, with a checkpoint of both the trained and the averaged weights. It must come
    after the averaging callback, so that the checkpoint holds the average of this step.

    It logs `images_per_second` as often as the trainer logs.

    Lightning's `max_time` ends a training instead: it counts the time before a resumption too, and
    at the end of `fit` the averaged weights replace the trained ones.

    Args:
        limit: `DD:HH:MM:SS` since the start or the last resumption, or None for no limit.
        checkpoint: where the checkpoint is saved.
        group: the processes of the training, which stop after the same batch.

    Attributes:
        images_seen: training examples, with repetition, of all processes and all pieces.
        finished: whether the training has come to its end.
        stopped: whether it was stopped before its last step.
        signal: the signal that stopped it, if there was one.

    Raises:
        UsageError: if the limit is not of this form.
    """

    def __init__(
        self, limit: str | None, checkpoint: Path, *, group: Processes = Processes()
    ) -> None:
        super().__init__()
        self.limit = None if limit is None else duration(limit, "time_limit")
        self.checkpoint = checkpoint
        self.group = group
        self.images_seen = 0
        self.finished = False
        self.stopped = False
        self.signal: int | None = None
        self._seconds_before = 0.0
        self._start: float | None = None
        self._logged = (0, 0, 0.0)  # step, images and seconds when the rate was logged
        self._signals = ExitStack()

    @property
    def seconds(self) -> float:
        """Seconds of training, from the first step on, without pauses between resumptions."""
        return self._seconds_before + self._seconds_since_start

    @property
    def _seconds_since_start(self) -> float:
        return 0.0 if self._start is None else time.perf_counter() - self._start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not earlier, because Lightning installs handlers of its own before.
        self._signals.enter_context(handled(self._request))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.close()

    def on_exception(self, *_: object) -> None:
        self._signals.close()

    def _request(self, signum: int, frame: object) -> None:
        if self.signal is not None:  # asked twice: at once
            raise Interrupted(signum)
        self.signal = signum

    def on_train_batch_start(self, *_: object) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        self.images_seen += images_per_batch(batch) * trainer.world_size
        over = self.limit is not None and self._seconds_since_start > self.limit.total_seconds()
        # A signal counts more than the time: whoever was not asked hears which one it was.
        asked = self.group.largest(self.signal or int(over))
        self.signal = asked if asked > 1 else None
        self._log_rate(trainer, pl_module)
        last = 0 < trainer.max_steps <= trainer.global_step
        if asked and not self.stopped and not last:
            self.stopped = True
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            trainer.should_stop = True

    def _log_rate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the images per second since the last time; over many steps, so nothing waits."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and trainer.global_step > self._logged[0]:
            step, images, seconds = self._logged
            now = (trainer.global_step, self.images_seen, self.seconds)
            if step:
                rate = (now[1] - images) / max(now[2] - seconds, 1e-9)
                pl_module.log("images_per_second", rate, rank_zero_only=True)
            self._logged = now

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "images_seen": self.images_seen,
            "finished": self.finished,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self._start = state_dict["seconds"], None
        self.images_seen = state_dict["images_seen"]


def duration(text: object, name: str) -> timedelta:
    """A time `DD:HH:MM:SS`.

    Raises:
        UsageError: if it is not of this form.
    """
    parts = str(text).split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"{name} must be a time DD:HH:MM:SS, got {text!r}")
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
            self._log.update(trainer.global_step, lambda: _loss_of(trainer))


def _loss_of(trainer: L.Trainer) -> str:
    # Only for a line that is printed, because reading it waits for an accelerator.
    loss = trainer.progress_bar_metrics.get("loss")
    return "" if loss is None else f"loss {loss:.4g}"


def progress_bar() -> ProgressBar:
    """A bar in a terminal, plain lines elsewhere."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return TQDMProgressBar(refresh_rate=10) if terminal else ProgressLines()
