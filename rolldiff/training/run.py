"""A training run: from a configuration to a folder of weights, images and measurements."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from rolldiff.errors import UsageError
from rolldiff.evaluation.measure import device_name
from rolldiff.evaluation.report import Report, TrainingReport
from rolldiff.training.callbacks import TimeLimit, progress_bar
from rolldiff.training.module import LitModel

__all__ = ["Summary", "resumed_config", "train"]

CONFIG, SUMMARY, LAST = "config.yaml", "summary.json", "last.ckpt"


@dataclass(frozen=True)
class Summary:
    """A finished run in numbers.

    Attributes:
        seconds: from the first training step to the last file, without pauses.
        images_seen: training examples, with repetition.
        steps: optimizer steps.
        parameters: number of parameters.
        device: the accelerator's name, or the processor's architecture.
        threads: CPU threads of torch.
        torch: its version.
        report: what was measured after training.
    """

    seconds: float
    images_seen: int
    steps: int
    parameters: int
    device: str
    threads: int
    torch: str
    report: Report

    def write(self, path: str | Path) -> None:
        """Write the summary as flat JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "report"}
        text = json.dumps(values | self.report.values, indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


class _Run(NamedTuple):
    """The parts of a run."""

    lit: LitModel
    data: Any
    trainer: L.Trainer
    report: TrainingReport
    clock: TimeLimit


def train(cfg: DictConfig) -> Summary | None:
    """Train a model as configured, and leave everything in `cfg.run_dir`.

    With `cfg.resume`, training continues from the newest checkpoint there, with the batches and the
    noise that would have come next.

    Writes `config.yaml`, `last.ckpt`, `model.safetensors` and `config.json`, images, and finally
    `summary.json`: a folder with a summary is a finished run. Nothing is written before all parts
    are built, and if the configuration is refused later but before the first step, what was written
    is removed.

    Returns:
        The summary; None if `cfg.time_limit` was reached first.

    Raises:
        UsageError: if `run_dir` is not empty, or a part refuses its configuration.
        hydra.errors.InstantiationException: if a part cannot be built.
        FloatingPointError: if the loss is no longer finite.
    """
    folder = Path(cfg.run_dir)
    start = newest_checkpoint(folder) if cfg.resume else None
    if start is None and folder.exists() and not (folder.is_dir() and _is_empty(folder)):
        raise UsageError(f"run_dir must be a new or an empty folder, got {folder}")
    run = _build(cfg, folder)
    lit, data, trainer, measure, clock = run
    if start is None:
        with _removed_if_refused(folder, trainer):
            folder.mkdir(parents=True, exist_ok=True)
            text = OmegaConf.to_yaml(cfg, resolve=True)
            (folder / CONFIG).write_text(text, encoding="utf-8")
            trainer.fit(lit, datamodule=data)
    else:
        trainer.fit(lit, datamodule=data, ckpt_path=start, weights_only=True)
    if clock.reached:
        return None
    trainer.save_checkpoint(folder / LAST, weights_only=False)

    model = lit.to(trainer.strategy.root_device).eval().model
    model.save_pretrained(folder)
    report = measure(model, data.image, label=data.label, folder=folder, seed=cfg.seed)
    summary = Summary(
        seconds=clock.seconds,
        images_seen=trainer.global_step * data.batch_size * trainer.world_size,
        steps=trainer.global_step,
        parameters=sum(p.numel() for p in lit.parameters()),
        device=device_name(trainer.strategy.root_device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        report=report,
    )
    summary.write(folder / SUMMARY)
    if wandb := sys.modules.get("wandb"):  # otherwise the next job of a sweep would log to this run
        wandb.finish()
    return summary


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The saved configuration of a stopped run, with today's `resume`, `time_limit` and `progress`.

    Args:
        cfg: the configuration of a command with `resume`, the folder of the run.

    Raises:
        UsageError: if the folder holds no stopped run with a checkpoint.
    """
    folder = Path(cfg.resume)
    if not (folder / CONFIG).is_file() or newest_checkpoint(folder) is None:
        raise UsageError(f"resume must be the folder of a run with a checkpoint, got {folder}")
    if (folder / SUMMARY).is_file():
        raise UsageError(f"resume must be a run that is not finished, got {folder}")
    now = {"run_dir": str(folder)} | {key: cfg[key] for key in ("resume", "time_limit", "progress")}
    merged = OmegaConf.merge(OmegaConf.load(folder / CONFIG), now)
    assert isinstance(merged, DictConfig)
    return merged


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a run, or None."""
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob(LAST)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _build(cfg: DictConfig, folder: Path) -> _Run:
    """Build all parts, and refuse what could only fail after the training."""
    L.seed_everything(cfg.seed, verbose=False)
    lit = _instantiate(cfg.lit)
    report = _instantiate(cfg.report)
    report.validate(lit.model)
    if cfg.compile:
        lit.compile_model()
    data = _instantiate(cfg.data)
    callbacks = [_instantiate(callback) for callback in cfg.callbacks.values() if callback]
    clock = TimeLimit(cfg.time_limit, folder / LAST)
    callbacks.append(clock)
    options: dict[str, Any] = {"logger": _instantiate(cfg.logger) if cfg.logger else False}
    if cfg.progress:
        callbacks.append(progress_bar())
    else:
        options["enable_progress_bar"] = False
    return _Run(lit, data, _instantiate(cfg.trainer, callbacks=callbacks, **options), report, clock)


def _instantiate(cfg: DictConfig, **others: Any) -> Any:
    # Plain lists and dictionaries: by default Hydra would turn our dataclasses into its own.
    return instantiate(cfg, _convert_="all", **others)


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


@contextmanager
def _removed_if_refused(folder: Path, trainer: L.Trainer) -> Iterator[None]:
    """Removes what a run wrote to a new folder if it is refused before its first step.

    Otherwise the corrected command would be refused too, because the folder is no longer empty.
    """
    existed = folder.exists()
    try:
        yield
    except (MisconfigurationException, UsageError):
        if trainer.global_step == 0:
            shutil.rmtree(folder)
            if existed:
                folder.mkdir()
        raise
