"""A training run: from a configuration to a folder of weights, pictures and numbers."""

import json
import sys
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from rolldiff.lit import LitModel, Trainable
from rolldiff.report import Reported, device_name

__all__ = [
    "Summary",
    "build",
    "compile_in_place",
    "named_device",
    "named_dtype",
    "newest",
    "train",
]


def _make(cfg: DictConfig, **others: Any) -> Any:
    # Plain lists and dictionaries: left to itself Hydra would turn our dataclasses into its own.
    return instantiate(cfg, _convert_="all", **others)


class _Clock(Callback):
    """Knows how long the training has taken, in all its pieces, and when a piece is over.

    It comes after the callback that averages the weights: what it saves holds this step's average.
    """

    def __init__(self, piece: timedelta | None, last: Path) -> None:
        super().__init__()
        self.piece, self.last = piece, last
        self.before = 0.0
        self.started: float | None = None
        self.stopped = False

    @property
    def seconds(self) -> float:
        """Since the first training step."""
        now = time.perf_counter()
        return self.before + now - (self.started or now)

    def on_train_batch_start(self, *_: object) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if self.piece is None or self.stopped or self.started is None:
            return
        if time.perf_counter() - self.started > self.piece.total_seconds():
            self.stopped = trainer.global_step < trainer.max_steps
            if self.stopped:
                # Now: when the training ends, the average takes the place of the weights.
                trainer.save_checkpoint(self.last, weights_only=False)
                trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.before = state_dict["seconds"]


@dataclass(frozen=True)
class Summary:
    """The run in numbers.

    Attributes:
        seconds: from the first training step to the last file.
        images_seen: training examples, with repetition.
        steps: optimizer steps.
        parameters: numbers in the weights.
        device: where it ran.
        threads: CPU threads of torch.
        torch: its version.
        reported: what the report found.
    """

    seconds: float
    images_seen: int
    steps: int
    parameters: int
    device: str
    threads: int
    torch: str
    reported: Reported

    def write(self, path: str | Path) -> None:
        """Write the summary as flat JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reported"}
        text = json.dumps(values | self.reported.values, indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


def build(cfg: DictConfig, **others: Any) -> tuple[LitModel, Any, L.Trainer]:
    """The parts of a run; nothing is written yet.

    Args:
        cfg: the configuration of `rolldiff train`.
        **others: arguments for the trainer.

    Raises:
        hydra.errors.InstantiationException: if the configuration does not fit together.
        ValueError: if the report asks for what the decoder cannot do.
    """
    lit = _make(cfg.lit)
    # What is asked for when training is over must not fail only then.
    _make(cfg.report).check(lit.model)
    if cfg.compile:
        compile_in_place(lit.model)
    return lit, _make(cfg.data), _make(cfg.trainer, **{"logger": False} | others)


def train(cfg: DictConfig) -> Summary | None:
    """Train a model as configured, and leave everything in `cfg.run_dir`.

    With `cfg.resume` it goes on from the newest checkpoint there, of a piece or of a run that was
    killed, with the batches and the noise that would have come next.

    Writes `last.ckpt`, `model.safetensors` and `config.json`, pictures, and `summary.json`,
    which comes last: a folder with a summary is a finished run.

    Returns:
        The summary; None if `cfg.piece` was over before the training.

    Raises:
        hydra.errors.InstantiationException: if the configuration does not fit together.
        FloatingPointError: if the loss stops being finite.
    """
    folder = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    clock = _Clock(_span(cfg.piece), folder / "last.ckpt")
    lit, data, trainer = build(
        cfg,
        callbacks=[*(_make(callback) for callback in cfg.callbacks.values() if callback), clock],
        logger=_make(cfg.logger) if cfg.logger else False,
    )
    start = newest(folder) if cfg.resume else None
    trainer.fit(lit, datamodule=data, ckpt_path=start, weights_only=True)
    if clock.stopped:
        return None
    trainer.save_checkpoint(folder / "last.ckpt")

    model = lit.to(trainer.strategy.root_device).eval().model
    model.save_pretrained(folder)
    reported = _make(cfg.report)(model, data.image, label=data.label, folder=folder, seed=cfg.seed)
    summary = Summary(
        seconds=clock.seconds,
        images_seen=trainer.global_step * data.batch_size * trainer.world_size,
        steps=trainer.global_step,
        parameters=sum(p.numel() for p in lit.parameters()),
        device=device_name(trainer.strategy.root_device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        reported=reported,
    )
    summary.write(folder / "summary.json")
    if wandb := sys.modules.get("wandb"):  # the next job of a sweep is a run of its own
        wandb.finish()
    return summary


def newest(folder: Path) -> Path | None:
    """The latest checkpoint of a run, or None."""
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("last.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _span(words: str | None) -> timedelta | None:
    """DD:HH:MM:SS as a span of time."""
    if words is None:
        return None
    parts = str(words).split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"piece must be a time DD:HH:MM:SS, got {words!r}")
    days, hours, minutes, seconds = map(int, parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def compile_in_place(model: Trainable) -> None:
    """Compile a model, with room for the shapes that a command meets.

    Blocks share their versions: with and without gradients, a cache, several times in a span. Past
    torch's limit of 8 it would go on uncompiled, and say so once.
    """
    torch._dynamo.config.recompile_limit = 64
    model.compile()


def named_device(name: str | None) -> torch.device:
    """A device by its name; None takes a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def named_dtype(name: str | None) -> torch.dtype | None:
    """What the network computes in, by its name in torch.

    Raises:
        ValueError: if torch has no such type.
    """
    dtype = None if name is None else getattr(torch, str(name), name)
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    return dtype
