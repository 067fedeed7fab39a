"""A training run: from a configuration to a folder of weights, pictures and numbers."""

import json
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from rolldiff.lit import LitModel
from rolldiff.report import Reported, device_name

__all__ = ["Summary", "build", "named_dtype", "train"]


def _make(cfg: DictConfig, **others: Any) -> Any:
    # Plain lists and dictionaries: left to itself Hydra would turn our dataclasses into its own.
    return instantiate(cfg, _convert_="all", **others)


class _Clock(Callback):
    """Knows when the first training step began."""

    started: float | None = None

    def on_train_batch_start(self, *_: object) -> None:
        if self.started is None:
            self.started = time.perf_counter()


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
    return lit, _make(cfg.data), _make(cfg.trainer, **{"logger": False} | others)


def train(cfg: DictConfig) -> Summary:
    """Train a model as configured, and leave everything in `cfg.run_dir`.

    Writes `last.ckpt`, `model.safetensors` and `config.json`, pictures, and `summary.json`,
    which comes last: a folder with a summary is a finished run.

    Raises:
        hydra.errors.InstantiationException: if the configuration does not fit together.
        FloatingPointError: if the loss stops being finite.
    """
    folder = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    clock = _Clock()
    lit, data, trainer = build(
        cfg,
        callbacks=[clock, *(_make(callback) for callback in cfg.callbacks.values() if callback)],
        logger=_make(cfg.logger) if cfg.logger else False,
    )
    trainer.fit(lit, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")

    model = lit.to(trainer.strategy.root_device).eval().model
    model.save_pretrained(folder)
    reported = _make(cfg.report)(model, data.image, label=data.label, folder=folder, seed=cfg.seed)
    summary = Summary(
        seconds=time.perf_counter() - (clock.started or time.perf_counter()),
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


def named_dtype(name: str | None) -> torch.dtype | None:
    """What the network computes in, by its name in torch.

    Raises:
        ValueError: if torch has no such type.
    """
    dtype = None if name is None else getattr(torch, str(name), name)
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    return dtype
