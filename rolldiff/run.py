"""A training run: from a configuration to a folder of weights, pictures and numbers."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from rolldiff.grouping import Grouping
from rolldiff.lit import LitDecoder
from rolldiff.report import Summary, device_name, distances, floor, pictures
from rolldiff.schedule import RollingSchedule

__all__ = ["build", "named_dtype", "train"]


def _make(cfg: DictConfig, **others: Any) -> Any:
    # Plain lists and dictionaries: left to itself Hydra would turn our dataclasses into its own.
    return instantiate(cfg, _convert_="all", **others)


class _Clock(Callback):
    """Knows when the first training step began."""

    started: float | None = None

    def on_train_batch_start(self, *_: object) -> None:
        if self.started is None:
            self.started = time.perf_counter()


def build(cfg: DictConfig, **others: Any) -> tuple[LitDecoder, Any, L.Trainer]:
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
    for num_groups in cfg.report.num_groups:
        Grouping(lit.decoder.layout.num_tokens, num_groups)
    RollingSchedule(1).stagger(cfg.report.steps)
    return lit, _make(cfg.data), _make(cfg.trainer, **{"logger": False} | others)


def train(cfg: DictConfig) -> Summary:
    """Train a decoder as configured, and leave everything in `cfg.run_dir`.

    Writes `last.ckpt`, `model.safetensors` and `config.json`, `samples.png`, `stream.gif`, and
    `summary.json`, which comes last: a folder with a summary is a finished run.

    Raises:
        hydra.errors.InstantiationException: if the configuration does not fit together.
        FloatingPointError: if the loss stops being finite.
    """
    folder = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    clock = _Clock()
    lit, data, trainer = build(
        cfg,
        callbacks=[clock, *(_make(callback) for callback in cfg.callbacks.values())],
        logger=_make(cfg.logger) if cfg.logger else False,
    )
    trainer.fit(lit, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")

    decoder = lit.decoder.to(trainer.strategy.root_device).eval()
    decoder.save_pretrained(folder)
    image, label = data.image, data.label
    if len(image) > cfg.report.samples:
        generator = torch.Generator().manual_seed(cfg.seed)
        some = torch.randperm(len(image), generator=generator)[: cfg.report.samples]
        image, label = image[some], label[some]
    ask = {
        "label": label if decoder.condition.num_classes else None,
        "num_groups": list(cfg.report.num_groups),
        "steps": cfg.report.steps,
    }
    pictures(decoder, image, folder, seed=cfg.seed, **ask)
    fd_pixels = distances(decoder, image, seed=cfg.seed, **ask)
    summary = Summary(
        seconds=time.perf_counter() - (clock.started or time.perf_counter()),
        images_seen=trainer.global_step * data.batch_size * trainer.world_size,
        steps=trainer.global_step,
        parameters=sum(p.numel() for p in decoder.parameters()),
        fd_pixels=fd_pixels,
        fd_pixels_floor=floor(image),
        samples=len(image),
        steps_per_group=cfg.report.steps,
        device=device_name(decoder.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
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
