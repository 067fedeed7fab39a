"""A training run: from a configuration to a folder of weights, images and measurements.

A run can be killed at any moment and resumed. `last.ckpt` of a training that has come to its end
says so; everything after it (`model.safetensors`, pictures, `summary.json`) is made from that file
alone, and made again if the run is killed meanwhile. Every file appears whole or not at all.
"""

import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import yaml
from hydra.utils import get_class, instantiate
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf

from rolldiff.errors import UsageError, reason, warn_user, whole_number
from rolldiff.evaluation.measure import device_name
from rolldiff.evaluation.report import Report, TrainingReport
from rolldiff.files import LOCK, locked, refuse_links, remove_parts, write_text, written_whole
from rolldiff.hub import checkpoint_content, read_checkpoint
from rolldiff.objective import FD_PIXELS, check_objective
from rolldiff.signals import Interrupted
from rolldiff.training.callbacks import Clock, duration, progress_bar
from rolldiff.training.module import LitModel
from rolldiff.trust import RESUMABLE, escaped, portable, read_run_config, trusted_prefixes

__all__ = ["Summary", "resumed_config", "train"]

CONFIG, SUMMARY, LAST, CHECKPOINTS = "config.yaml", "summary.json", "last.ckpt", "checkpoints"


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

    @property
    def values(self) -> dict[str, Any]:
        """Everything, with what the report holds beside the rest."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "report"}
        return values | self.report.values

    def write(self, path: str | Path) -> None:
        """Write the summary as JSON."""
        write_text(path, json.dumps(self.values, indent=2) + "\n")


class _Run(NamedTuple):
    """The parts of a run."""

    lit: LitModel
    data: Any
    trainer: L.Trainer
    report: TrainingReport
    clock: Clock


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints are written beside their target and renamed.

    Lightning's own go through the temporary folder and are copied from there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:  # torch's own words for a full disk
                raise OSError(f"cannot write {path}: {reason(error)}") from error


def train(cfg: DictConfig) -> Summary | None:
    """Train a model as configured, and leave everything in `cfg.run_dir`.

    With `cfg.resume`, training continues from the newest checkpoint there, with the batches and the
    noise that would have come next.

    Writes `config.yaml`, `last.ckpt`, `model.safetensors` and `config.json`, images, and finally
    `summary.json`: a folder with a summary is a finished run. If the run is refused before its
    first step, what was written is removed.

    Args:
        cfg: the configuration of `rolldiff train`. A `run_dir` of None becomes a new folder, whose
            path is set in `cfg`.

    Returns:
        The summary; None if `cfg.time_limit` was reached first.

    Raises:
        UsageError: if `run_dir` is not empty or in use, or a part refuses its configuration.
        hydra.errors.InstantiationException: if a part cannot be built.
        FloatingPointError: if the loss is no longer finite.
        Interrupted: if the process was asked to end, after the checkpoint was saved.
        OSError: if the folder cannot be written.
    """
    _validate(cfg)
    if cfg.resume is not None:
        folder = Path(cfg.run_dir)
        with locked(folder, name="resume"):
            remove_parts(folder)
            refuse_links(*folder.iterdir())
            return _train(cfg, folder, newest_checkpoint(folder))
    with _new_folder(cfg) as folder:
        return _train(cfg, folder, None)


def _train(cfg: DictConfig, folder: Path, start: "Checkpoint | None") -> Summary | None:
    run = _build(cfg, folder, start)
    config = _plain(cfg)
    if start is None:
        text = yaml.safe_dump(portable(config, str(folder)), sort_keys=False, allow_unicode=True)
        write_text(folder / CONFIG, text)
    if start is None or not start.finished:
        _fit(run, start, config=config)
        for logger in run.trainer.loggers:
            logger.save()
        if run.clock.stopped:
            if run.clock.signal is not None:
                raise Interrupted(run.clock.signal)
            return None
        run.clock.finished = True
        run.trainer.save_checkpoint(folder / LAST, weights_only=False)
        if run.clock.signal is not None:
            raise Interrupted(run.clock.signal)
    summary = _finish(cfg, run, folder)
    if wandb := sys.modules.get("wandb"):  # otherwise the next job of a sweep would log to this run
        wandb.finish()
    return summary


def _fit(run: _Run, start: "Checkpoint | None", *, config: dict[str, Any]) -> None:
    for logger in run.trainer.loggers:
        logger.log_hyperparams(config)
    path = None if start is None else start.path
    try:
        run.trainer.fit(run.lit, datamodule=run.data, ckpt_path=path, weights_only=True)
    except SystemExit as error:  # what Lightning makes of an interruption
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _finish(cfg: DictConfig, run: _Run, folder: Path) -> Summary:
    """Everything after the training, from the checkpoint alone."""
    lit, data, trainer, report, clock = run
    checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    lit.load_state_dict(checkpoint["state_dict"])  # averaged, where weights were averaged
    clock.load_state_dict(checkpoint["callbacks"][clock.state_key])
    steps = int(checkpoint["global_step"])
    model = lit.to(trainer.strategy.root_device).eval().model
    model.save_pretrained(folder)
    held_out = report.held_out and data.held_out
    image, label = data.held_out_images if held_out else (data.image, data.label)
    found = report(model, image, label=label, folder=folder, seed=cfg.seed)
    summary = Summary(
        seconds=clock.seconds,
        images_seen=clock.images_seen,
        steps=steps,
        parameters=sum(p.numel() for p in lit.parameters()),
        device=device_name(trainer.strategy.root_device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        report=found,
    )
    for logger in trainer.loggers:
        logger.log_metrics(_flat(found.values), step=steps)
        logger.save()
    summary.write(folder / SUMMARY)
    return summary


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The saved configuration of a stopped run, with today's values of the `RESUMABLE` settings.

    Args:
        cfg: the configuration of a command with `resume`, the folder of the run.

    Raises:
        UsageError: if the folder holds no stopped run with a checkpoint, or its configuration asks
            for something that is not allowed, see `rolldiff.trust`.
    """
    folder = Path(str(cfg.resume)).expanduser()
    if not (folder / CONFIG).is_file() or not _checkpoint_files(folder):
        raise UsageError(f"resume must be the folder of a run with a checkpoint, got {folder}")
    if _is_finished(folder):
        raise UsageError(f"resume must be a run that is not finished, got {folder}")
    saved = read_run_config(folder / CONFIG, trust=cfg.trust)
    now = {"run_dir": escaped(folder)} | {key: cfg[key] for key in RESUMABLE}
    merged = OmegaConf.merge(saved, now)
    assert isinstance(merged, DictConfig)
    return merged


# ---------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoint(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        path: the file.
        step: optimizer steps.
        finished: whether the training had come to its end.
    """

    path: Path
    step: int
    finished: bool


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The latest whole checkpoint of a run; damaged ones are named in a warning.

    Raises:
        UsageError: if there is none.
    """
    found, damaged = [], []
    for path in _checkpoint_files(folder):
        try:
            found.append(_read_checkpoint(path))
        except UsageError as error:
            damaged.append(str(error))
    if not found:
        reasons = "; ".join(damaged) or "none is there"
        raise UsageError(f"resume must have a whole checkpoint, got {folder}: {reasons}")
    for message in damaged:
        warn_user(f"left out: {message}")
    return max(found, key=lambda c: (c.finished, c.step, c.path.stat().st_mtime_ns))


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        content = checkpoint_content(path)
        state = content["callbacks"].get(Clock.__qualname__, {})
        return Checkpoint(path, int(content["global_step"]), bool(state.get("finished", False)))
    except UsageError:
        raise
    except Exception as error:  # whatever stands in place of these values
        raise UsageError(f"{path} is damaged or no checkpoint: {reason(error)}") from error


def _checkpoint_files(folder: Path) -> list[Path]:
    places = [folder / LAST]
    if (folder / CHECKPOINTS).is_dir():
        places += sorted((folder / CHECKPOINTS).iterdir())
    # Not by a pattern, which would read brackets in the folder's name.
    return [p for p in places if p.suffix == ".ckpt" and p.is_file() and not p.is_symlink()]


def _is_finished(folder: Path) -> bool:
    """Whether there is a summary; half of one, as earlier versions could leave, does not count."""
    try:
        return isinstance(json.loads((folder / SUMMARY).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------
# Parts and folders


def _validate(cfg: DictConfig) -> None:
    """Refuse at once what would otherwise fail late, or hang."""
    whole_number(cfg.seed, "seed", minimum=0)
    whole_number(cfg.max_steps, "max_steps", maximum=10**12)
    whole_number(cfg.batch_size, "batch_size", maximum=2**20)
    for name in ("data", "lit", "report", "trainer"):
        if not OmegaConf.is_dict(cfg[name]):
            raise UsageError(f"{name} must be a dictionary with _target_, got {cfg[name]!r}")
    for name in ("max_time", "trainer.max_time"):
        value = OmegaConf.select(cfg, name)
        if value is not None and not OmegaConf.is_dict(value):
            duration(value, name)
    # What Lightning and its callbacks compare and count with, without a check of their own.
    for key, minimum in (
        ("trainer.num_sanity_val_steps", -1),
        ("trainer.log_every_n_steps", 0),
    ):
        missing = object()
        value = OmegaConf.select(cfg, key, default=missing, throw_on_missing=False)
        if value is not missing and not (value is None and key.startswith("trainer.")):
            whole_number(value, key, minimum=minimum)
    for name in ("progress", "compile"):
        if not isinstance(cfg[name], bool):
            raise UsageError(f"{name} must be true or false, got {cfg[name]!r}")


def _build(cfg: DictConfig, folder: Path, start: Checkpoint | None) -> _Run:
    """Build all parts, and refuse what could only fail after the training."""
    # Lightning seeds NumPy too, which takes 32 bits.
    seed = cfg.seed if cfg.seed < 2**32 else np.random.SeedSequence(cfg.seed).generate_state(1)[0]
    L.seed_everything(int(seed), verbose=False)
    data = _instantiate(cfg.data)
    _set_classes(cfg, data)
    # The weights of a resumed run are read first, and with them the model is the file's, bounded by
    # what the file holds, and not whatever the configuration asks for.
    kind = get_class(cfg.lit._target_).kind
    model = {}
    if start is not None:
        trusted = trusted_prefixes(cfg.trust)
        model = {"model": read_checkpoint(start.path, kind, trusted=trusted).train()}
    lit = _instantiate(cfg.lit, **model)
    report = _instantiate(cfg.report)
    report.validate(lit.model)
    if known := report.number_names():
        own = [field.name for field in fields(Summary) if field.type in (int, float)]
        check_objective(cfg.get("optimized_metric", FD_PIXELS), [*own, *known])
    if cfg.compile:
        lit.compile_model()
    parts = cfg.get("callbacks") or {}
    callbacks = []
    for name, part in parts.items():
        if not part:
            continue
        callback = _instantiate(part)
        if not isinstance(callback, L.Callback):
            raise UsageError(f"callbacks.{name} must be null or a callback, got {callback!r}")
        callbacks.append(callback)
    clock = Clock(cfg.time_limit, folder / LAST)
    callbacks.append(clock)
    logger = cfg.get("logger")  # ~logger leaves it out
    options: dict[str, Any] = {"logger": _instantiate(logger) if logger else False}
    if cfg.progress:
        callbacks.append(progress_bar())
    else:
        options["enable_progress_bar"] = False
    options["plugins"] = [*_instantiate(cfg.trainer.get("plugins") or []), WholeCheckpoints()]
    trainer = _instantiate(cfg.trainer, callbacks=callbacks, **options)
    return _Run(lit, data, trainer, report, clock)


def _instantiate(cfg: Any, **others: Any) -> Any:
    # Plain lists and dictionaries: by default Hydra would turn our dataclasses into its own.
    try:
        return instantiate(cfg, _convert_="all", **others)
    except TypeError as error:  # of Hydra's own keys; what a part raises, Hydra wraps
        raise UsageError(f"settings must be ones that Hydra builds: {error}") from error


def _set_classes(cfg: DictConfig, data: Any) -> None:
    """Take the number of classes and their names from the data, unless they are set.

    Raises:
        UsageError: if the data has more classes than are set.
    """
    if cfg.num_classes == 0:  # trained without labels, whether there are any or not
        return
    if cfg.num_classes is not None and getattr(data, "streaming", False):
        return  # a stream's labels are only known when all of it was read
    found = getattr(data, "num_classes", 0)  # a data module of the user's own may have none
    if cfg.num_classes is None:
        cfg.num_classes = found
    if found > whole_number(cfg.num_classes, "num_classes", minimum=0):
        raise UsageError(
            f"num_classes must be {found} or more, as the labels of data, or 0 to train without "
            f"labels, got {cfg.num_classes}"
        )
    names = getattr(data, "class_names", None)
    if cfg.class_names is None and names is not None and len(names) == cfg.num_classes:
        cfg.class_names = [escaped(name) for name in names]


@contextmanager
def _new_folder(cfg: DictConfig) -> Iterator[Path]:
    """A new or empty folder that this process holds; removed if the run fails at once.

    Otherwise the corrected command would be refused too, because the folder is no longer empty.
    """
    folder, made = _made_folder(cfg)
    _refuse_other_files(folder)
    with locked(folder):
        _refuse_other_files(folder)  # again: another job may have been here since
        try:
            yield folder
        except BaseException:
            if not _has_begun(folder):
                _remove(folder, made)
            raise


def _refuse_other_files(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise UsageError(f"run_dir must be a new or an empty folder, got {folder}")


def _made_folder(cfg: DictConfig) -> tuple[Path, list[Path]]:
    """The run's folder, and which folders were made for it, from the outermost on.

    A `run_dir` of None becomes `runs/DATE_TIME`, numbered if another job started in this second.
    """
    candidates: Iterator[Path]
    if cfg.run_dir is None:
        name = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        candidates = chain([name], (name.with_name(f"{name.name}-{n}") for n in count(2)))
    else:
        if not str(cfg.run_dir).strip():
            raise UsageError("run_dir must name a folder, got an empty text")
        candidates = iter([Path(str(cfg.run_dir)).expanduser()])
    for folder in candidates:
        missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
        if folder.exists() and (cfg.run_dir is None or not folder.is_dir()):
            if cfg.run_dir is None:
                continue
            raise UsageError(f"run_dir must be a new or an empty folder, got {folder}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=cfg.run_dir is not None)
        except OSError as error:
            if cfg.run_dir is None and folder.exists():  # another job was faster
                continue
            raise UsageError(
                f"run_dir must be a folder that can be made, got {folder}: {error.strerror}"
            ) from error
        cfg.run_dir = escaped(folder)
        cfg.run_id = cfg.run_id or secrets.token_hex(4)
        return folder, missing
    raise AssertionError("unreachable")


def _has_begun(folder: Path) -> bool:
    """Whether there is anything to keep: a checkpoint, or the log of some steps."""
    return bool(_checkpoint_files(folder)) or (folder / "logs").exists()


def _remove(folder: Path, made: list[Path]) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in reversed(made):
        try:
            path.rmdir()
        except OSError:  # another job's run is beside this one
            return


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain containers, with the places that are read as full paths."""
    for key in ("data.path", "tokenizer"):
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and (path := Path(value).expanduser()).exists():
            OmegaConf.update(cfg, key, escaped(path.absolute()))
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _flat(values: dict[str, Any], prefix: str = "report") -> dict[str, float]:
    """Numbers in nested dictionaries by joined names, for loggers."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = float(value)
    return found
