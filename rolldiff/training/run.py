"""A training run: from a configuration to a folder of weights, images and measurements.

A run can be killed at any moment and resumed. `last.ckpt` of a training that has come to its end
says so; everything after it (`model.safetensors`, pictures, `summary.json`) is made from that file
alone, and made again if the run is killed meanwhile. Every file appears whole or not at all.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import yaml
from hydra.utils import get_class, instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf

from rolldiff import slurm
from rolldiff.decoder import Decoder
from rolldiff.errors import UsageError, reason, warn_user, whole_number
from rolldiff.evaluation.measure import device_name
from rolldiff.evaluation.report import DecoderReport, Report, TrainingReport
from rolldiff.files import LOCK, locked, refuse_links, remove_parts, write_text, written_whole
from rolldiff.hub import checkpoint_content, read_checkpoint
from rolldiff.objective import FD_PIXELS, check_objective
from rolldiff.processes import OtherProcessError, Processes, are_started, is_lost, processes
from rolldiff.processes import start as start_processes
from rolldiff.signals import Interrupted
from rolldiff.training.callbacks import Clock, duration, progress_bar
from rolldiff.training.initial import read_init, start_from
from rolldiff.training.module import LitModel
from rolldiff.training.sharding import is_sharded
from rolldiff.trust import DEVICES, RESUMABLE, escaped, portable, read_run_config, trusted_prefixes

__all__ = ["Summary", "resumed_config", "train"]

CUDA = ("auto", "cuda", "gpu")  # Lightning's names of accelerators that may be CUDA
RUNS = Path("runs")
MAX_DEVICES = 256  # of a machine
JOB = ".slurm"  # which job began a run: only that one may go on with it by itself
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

    @classmethod
    def read(cls, path: str | Path) -> "Summary":
        """Read what `write` has written; the report has its values alone."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        own = {f.name: values.pop(f.name) for f in fields(cls) if f.name != "report"}
        return cls(**own, report=Report(values, "finished before", ""))

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


def train(cfg: DictConfig, *, initializer: Callable[[], None] | None = None) -> Summary | None:
    """Train a model as configured, and leave everything in `cfg.run_dir`.

    With several devices, a process is started for each, unless torchrun or SLURM has done so. They
    share every batch, and train what one process would; the main one writes.

    With `cfg.resume`, training continues from the newest checkpoint there, with the batches and the
    noise that would have come next.

    Writes `config.yaml`, `last.ckpt`, `model.safetensors` and `config.json`, images, and finally
    `summary.json`: a folder with a summary is a finished run. If the run is refused before its
    first step, what was written is removed.

    Args:
        cfg: the configuration of `rolldiff train`. A `run_dir` of None becomes a new folder, whose
            path is set in `cfg`.
        initializer: called first in every process that is started.

    Returns:
        The summary; None if `cfg.time_limit` was reached first, and in all processes of torchrun or
        SLURM but the main one.

    Raises:
        UsageError: if `run_dir` is not empty or in use, or a part refuses its configuration.
        hydra.errors.InstantiationException: if a part cannot be built.
        FloatingPointError: if the loss is no longer finite.
        Interrupted: if the process was asked to end, after the checkpoint was saved.
        OtherProcessError: if another process failed.
        OSError: if the folder cannot be written.
    """
    if cfg.resume is None and (folder := _begun_by_this_job(cfg)) is not None:
        if _is_finished(folder):
            return Summary.read(folder / SUMMARY)
        cfg.run_dir = escaped(folder)
        if _checkpoint_files(folder):
            cfg.resume = cfg.run_dir
            cfg = resumed_config(cfg, given=DEVICES)
    _validate(cfg)
    if not are_started() and (count := _devices(cfg)) > 1:
        with ExitStack() as stack:
            if cfg.run_dir is None:  # so that the caller knows it too
                stack.callback(_remove_empty, _made_folder(cfg)[1])
            return start_processes(train, cfg, count=count, initializer=initializer)
    timeout = duration(cfg.process_timeout, "process_timeout")
    on_cuda = torch.cuda.is_available() and cfg.trainer.get("accelerator") in CUDA
    backend = "nccl" if on_cuda else "gloo"
    with processes(backend=backend, timeout=timeout) as group, ExitStack() as stack:
        begin = group.on_main(lambda: _opened(cfg, stack))
        cfg.run_dir, cfg.run_id, found = begin
        try:
            return _train(cfg, Path(cfg.run_dir), found, group=group)
        except Interrupted as stop:
            if stop.name == slurm.REQUEUE and group.is_main:
                slurm.requeue()
            raise
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise OtherProcessError(
                "another process ended, or did not answer within process_timeout="
                f"{cfg.process_timeout}; the last checkpoint is kept"
            ) from error


def _begun_by_this_job(cfg: DictConfig) -> Path | None:
    """The folder of the run that this SLURM job had begun before it was queued again."""
    if not slurm.restarted():
        return None
    folder = RUNS / _first_name() if cfg.run_dir is None else Path(str(cfg.run_dir)).expanduser()
    begun = folder / JOB
    return folder if begun.is_file() and begun.read_text() == slurm.job() else None


def _opened(cfg: DictConfig, stack: ExitStack) -> tuple[str, str | None, "Checkpoint | None"]:
    """The folder, its run's id and what to continue from; the folder is this job's from now on."""
    if cfg.resume is None:
        stack.enter_context(_new_folder(cfg))
        return cfg.run_dir, cfg.run_id, None
    folder = Path(cfg.run_dir)
    stack.enter_context(locked(folder, name="resume"))
    remove_parts(folder)
    refuse_links(*folder.iterdir())
    return cfg.run_dir, cfg.run_id, newest_checkpoint(folder)


def _train(
    cfg: DictConfig, folder: Path, start: "Checkpoint | None", *, group: Processes
) -> Summary | None:
    run = group.together(lambda: _build(cfg, folder, start, group=group))
    config = _plain(cfg)
    if start is None and group.is_main:
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
    summary = _finish(cfg, run, folder, group=group)
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


def _finish(cfg: DictConfig, run: _Run, folder: Path, *, group: Processes) -> Summary | None:
    """Everything after the training, from the checkpoint alone; None but on the main process."""
    lit, data, trainer, report, clock = run
    checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    if is_sharded(lit.model):
        lit.model = lit.unsharded()
    lit.load_state_dict(checkpoint["state_dict"])  # averaged, where weights were averaged
    clock.load_state_dict(checkpoint["callbacks"][clock.state_key])
    steps = int(checkpoint["global_step"])
    model = lit.to(trainer.strategy.root_device).eval().model
    if group.is_main:
        model.save_pretrained(folder)
    held_out = report.held_out and data.held_out
    image, label = data.held_out_images if held_out else (data.image, data.label)
    found = report(model, image, label=label, folder=folder, seed=cfg.seed, group=group)
    if found is None:
        return None
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


def resumed_config(cfg: DictConfig, *, given: Collection[str] = ()) -> DictConfig:
    """The saved configuration of a stopped run, with today's values of the `RESUMABLE` settings.

    Args:
        cfg: the configuration of a command with `resume`, the folder of the run.
        given: names of settings in the command, whose `DEVICES` are taken too.

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
    for key in set(DEVICES) & set(given):
        if (value := OmegaConf.select(cfg, key)) is not None:
            OmegaConf.update(merged, key, value)
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
    if not duration(cfg.process_timeout, "process_timeout"):
        raise UsageError(f"process_timeout must be above 0, got {cfg.process_timeout}")
    # Of Lightning's names, those that would start processes again, and one that shards neither the
    # average nor what is saved.
    strategy = str(cfg.trainer.get("strategy"))
    if strategy.startswith("fsdp") or strategy.endswith(("spawn", "fork", "notebook")):
        raise UsageError(
            f"trainer.strategy must be auto, ddp, or left to trainer=fsdp, got {strategy}"
        )
    for name in ("progress", "compile"):
        if not isinstance(cfg[name], bool):
            raise UsageError(f"{name} must be true or false, got {cfg[name]!r}")


def _devices(cfg: DictConfig) -> int:
    """The devices on this machine that a training is configured for."""
    if (nodes := cfg.trainer.get("num_nodes", 1)) != 1:
        raise UsageError(
            f"trainer.num_nodes must be 1 unless torchrun or srun starts the processes, got {nodes}"
        )
    devices = cfg.trainer.get("devices", 1)
    if devices in (1, "1"):
        return 1
    if isinstance(devices, int) and not isinstance(devices, bool):
        whole_number(devices, "trainer.devices", minimum=-1, maximum=MAX_DEVICES)
    # Which there are, Lightning knows.
    plugins = [LightningEnvironment()]
    trainer = _instantiate(cfg.trainer, logger=False, callbacks=[], plugins=plugins)
    most = max(os.cpu_count() or 1, 8)  # on a CPU Lightning takes any number
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise UsageError(
            f"trainer.devices must be {most} at most on this CPU, got {trainer.num_devices}"
        )
    return trainer.num_devices


def _build(cfg: DictConfig, folder: Path, start: Checkpoint | None, *, group: Processes) -> _Run:
    """Build all parts, and refuse what could only fail after the training."""
    # Lightning seeds NumPy too, which takes 32 bits.
    seed = cfg.seed if cfg.seed < 2**32 else np.random.SeedSequence(cfg.seed).generate_state(1)[0]
    L.seed_everything(int(seed), verbose=False)
    with group.main_first():  # it may download
        data = _instantiate(cfg.data)
        _set_classes(cfg, data)
        kind = get_class(cfg.lit._target_).kind
        _set_shape(cfg, data, kind)
    # The weights of a resumed run are read first, and with them the model is the file's, bounded by
    # what the file holds, and not whatever the configuration asks for.
    model = {}
    if start is not None:
        trusted = trusted_prefixes(cfg.trust)
        model = {"model": read_checkpoint(start.path, kind, trusted=trusted).train()}
    lit = _instantiate(cfg.lit, **model)
    _check_data(data, lit.model)
    if start is None and cfg.get("init") is not None:
        left = start_from(lit.model, read_init(cfg.init, kind, trust=cfg.trust))
        if group.is_main:
            kept = "".join(f"\n  {text}" for text in left)
            print(f"Starts from the weights of {cfg.init}" + (f", without:{kept}" if left else ""))
    report = _instantiate(cfg.report)
    autoencoder = getattr(data, "autoencoder", None)
    if autoencoder is None and cfg.get("autoencoder") is not None:
        raise UsageError(
            "autoencoder must be null for data that take none (data.autoencoder), got "
            f"{cfg.autoencoder.path}"
        )
    if autoencoder is not None and isinstance(report, DecoderReport):
        report = replace(report, decode_latents=autoencoder.decode)
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
    clock = Clock(cfg.time_limit, folder / LAST, group=group)
    callbacks.append(clock)
    logger = cfg.get("logger")  # ~logger leaves it out
    options: dict[str, Any] = {"logger": _instantiate(logger) if logger else False}
    if cfg.progress:
        callbacks.append(progress_bar())
    else:
        options["enable_progress_bar"] = False
    options["plugins"] = [*_instantiate(cfg.trainer.get("plugins") or []), WholeCheckpoints()]
    if group.size > 1:
        nodes = group.size // group.local_size
        options |= {"devices": _device_list(cfg, group), "num_nodes": nodes}
        options["plugins"].append(TorchElasticEnvironment())
    else:
        # Not what SLURM says of the job: its other tasks are none of this training.
        options |= {"strategy": "auto", "num_nodes": 1}
        options["plugins"].append(LightningEnvironment())
    trainer = _instantiate(cfg.trainer, callbacks=callbacks, **options)
    return _Run(lit, data, trainer, report, clock)


def _device_list(cfg: DictConfig, group: Processes) -> Any:
    """The devices of the processes on a machine: a list if one was chosen, or their number."""
    devices = cfg.trainer.get("devices")
    chosen = OmegaConf.is_list(devices) and len(devices) == group.local_size
    return list(devices) if chosen else group.local_size


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


def _set_shape(cfg: DictConfig, data: Any, kind: type) -> None:
    """Give the layout the shape of latents, unless its sizes are set.

    Raises:
        UsageError: if something else than a decoder is to be trained on latents.
    """
    if not getattr(data, "latents", False):
        return
    if kind is not Decoder:
        raise UsageError(
            f"data must be pictures for a {kind.__name__}, got latents, which a decoder is for"
        )
    channels, height, width = data.shape
    sizes = {"image_size": height if height == width else [height, width], "channels": channels}
    for name, size in sizes.items():
        if OmegaConf.is_dict(cfg.layout) and OmegaConf.is_interpolation(cfg.layout, name):
            cfg.layout[name] = size


def _check_data(data: Any, model: Any) -> None:
    """Refuse to train a decoder of pictures on latents, and the reverse.

    Raises:
        UsageError: if they differ, or the latents have another shape than the layout.
    """
    latents = getattr(data, "latents", None)  # a data module of the user's own may not say
    if latents is None or not isinstance(model, Decoder):
        return
    if latents and not model.latents:
        raise UsageError("decoder.latents must be true for data of latents, got false")
    if model.latents and not latents:
        raise UsageError(
            "decoder.latents must be false for data of pictures, got true; autoencoder=kl makes "
            "latents of them"
        )
    if latents and model.layout.image_shape != data.shape:
        channels, height, width = data.shape
        raise UsageError(
            f"layout must be of the latents, layout.image_size=[{height},{width}] "
            f"layout.channels={channels}, or be left to them, got {model.layout}"
        )


@contextmanager
def _new_folder(cfg: DictConfig) -> Iterator[Path]:
    """A new or empty folder that this process holds; removed if the run fails at once.

    Otherwise the corrected command would be refused too, because the folder is no longer empty.
    """
    folder, made = _made_folder(cfg)
    again = _begun_by_this_job(cfg) is not None
    if not again:
        _refuse_other_files(folder)
    with locked(folder):
        if again:  # it had no checkpoint yet
            _clear(folder, keep=LOCK)
        _refuse_other_files(folder)  # again: another job may have been here since
        if (job := slurm.job()) is not None:
            write_text(folder / JOB, job)
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

    A `run_dir` of None becomes `runs/DATE_TIME`, numbered if another job started in this second, or
    `runs/slurm-JOB`.
    """
    candidates: Iterator[Path]
    if cfg.run_dir is None:
        name = RUNS / _first_name()
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


def _first_name() -> str:
    """The name of a run without one: that of the SLURM job, which finds it again, or the time."""
    job = slurm.job()
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}" if job is None else f"slurm-{job}"


def _has_begun(folder: Path) -> bool:
    """Whether there is anything to keep: a checkpoint, or the log of some steps."""
    return bool(_checkpoint_files(folder)) or (folder / "logs").exists()


def _remove(folder: Path, made: list[Path]) -> None:
    _clear(folder)
    _remove_empty(made)


def _clear(folder: Path, *, keep: str | None = None) -> None:
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        try:
            path.rmdir()
        except OSError:  # another job's run is beside this one
            return


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain containers, with the places that are read as full paths."""
    for key in ("data.path", "data.labels", "autoencoder.path", "tokenizer", "init"):
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
