"""The command line: `rolldiff train | decode | serve | bench | …`, configured by Hydra.

A command composes its configuration once and builds its parts once, before it writes anything.
With `-m`, or a file of settings that says so, it runs a sweep. Other flags, such as `--cfg` and
`--help`, are Hydra's own, and with them Hydra runs the command.

A mistake of the user ends in one line on standard error and exit status 2; a file that cannot be
read or written, a lack of memory, and a training whose loss is not finite, in one line and status
1; Ctrl-C and SIGTERM in one line and status 130 and 143. All other errors show their traceback, as
everything does if HYDRA_FULL_ERROR is set. In a sweep, a job that fails does not end the others.
"""

import logging
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import hydra
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

import rolldiff
from rolldiff.conditioning import ClassLabels, Conditioning
from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.device import compile_in_place, named_device, named_dtype
from rolldiff.errors import UsageError, finite_number, instance, reason, whole_number
from rolldiff.hub import Pretrained, read_checkpoint
from rolldiff.jobs import Outcome, Sweep
from rolldiff.objective import FD_PIXELS, objective
from rolldiff.processes import OtherProcessError
from rolldiff.shell import command_line, setting
from rolldiff.signals import Interrupted, raised
from rolldiff.trust import DEVICES, RESUMABLE, trusted_prefixes

if TYPE_CHECKING:  # importing it takes starlette
    from rolldiff.serving import Served

__all__ = ["config_dir", "main"]

M = TypeVar("M", bound=Pretrained)

USAGE = """\
usage: rolldiff COMMAND [key=value ...]

  train     train a decoder; without arguments, on handwritten digits
  decode    decode images: rolldiff decode ckpt=RUN num_groups=4 overlap=0.5 out=images.png
  generate  generate codes and decode them: rolldiff generate prior=RUN tokenizer=RUN out=stream.gif
  reconstruct  a picture to codes and back: rolldiff reconstruct ckpt=RUN image=FILE out=film.gif
  serve     a server and a page that shows decodings: rolldiff serve ckpt=RUN port=8000
  bench     measure quality against cost: rolldiff bench ckpt=RUN bench.steps=[4,8,16]
  likelihood  bits per dimension by groups: rolldiff likelihood ckpt=RUN num_groups=[1,4,16]

rolldiff COMMAND --help lists the settings, rolldiff COMMAND --cfg job prints their values.
"""

OUT_OF_MEMORY = "out of memory; a smaller batch_size, image or network needs less"

PLUGINS = ("joblib", "optuna", "submitit_local", "submitit_slurm")  # Hydra's own, of an extra

# Modules of the extra `train` that `serve`, which has Hydra too, does not have.
OF_TRAIN = ("datasets", "lightning", "matplotlib", "sklearn", "torchmetrics", "tqdm")

MAX_IMAGES, MAX_PER_PAGE = 10**7, 4096


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the arguments after `rolldiff`; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if argv[0] == "--version":
        print(rolldiff.__version__)
        return
    command, *overrides = argv
    with _errors_in_one_line(), raised(), _hydra_config_of_its_own():
        if command not in COMMANDS:
            raise UsageError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {command!r}")
        _quiet_warnings()
        if command == "train":
            _refuse_settings_beside_resume(overrides)
        flags = [override for override in overrides if override.startswith("-")]
        if not flags:
            _run(command, overrides)
        elif not {"-m", "--multirun"} & set(flags):
            _run_by_hydra(command, overrides)
        elif len(flags) == 1:
            _sweep(command, [override for override in overrides if override not in flags])
        else:
            raise UsageError(
                f"-m must come without other flags, got {' '.join(flags)}; "
                "hydra.searchpath=[FOLDER] adds a folder of settings"
            )


def _call(command: str, cfg: DictConfig, overrides: Sequence[str]) -> Outcome | None:
    function = COMMANDS[command]
    try:
        return train(cfg, given=_names(overrides)) if function is train else function(cfg)
    except ModuleNotFoundError as error:
        if error.name not in OF_TRAIN:
            raise
        raise UsageError(
            f"{command} needs the extra `train`, pip install 'rolldiff[train]', and {error.name} "
            "is missing"
        ) from error


def _names(overrides: Sequence[str]) -> list[str]:
    """What the words of a command line set."""
    return [override.partition("=")[0].lstrip("+") for override in overrides]


def config_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UsageError(f"the folder conf must be inside {package} or beside it, and is missing")


def _run(command: str, overrides: list[str]) -> None:
    """Run a command once, or a sweep if a file of settings says so."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            cfg = compose(command, overrides, return_hydra_config=True)
        except ValueError as error:  # such as logger=null
            raise UsageError(
                f"settings must be a choice of a group or ~GROUP for none: {error}"
            ) from error
    if cfg.hydra.mode == RunMode.MULTIRUN:
        _sweep(command, overrides)
        return
    with open_dict(cfg):
        del cfg["hydra"]
    _call(command, cfg, overrides)


def train(cfg: DictConfig, *, given: Sequence[str] = ()) -> Outcome:
    """Train a model or resume its training, and print what to do next.

    Args:
        cfg: the settings.
        given: the names of those in the command.
    """
    from rolldiff.training.run import resumed_config
    from rolldiff.training.run import train as run

    _quiet_lightning()
    if cfg.resume is not None:
        cfg = resumed_config(cfg, given=given)
    try:
        summary = run(cfg, initializer=_quiet_lightning)
    except (KeyboardInterrupt, OtherProcessError):
        if cfg.run_dir is not None and Path(cfg.run_dir, "config.yaml").is_file():
            print(f"\nResume with:\n  {_resume(cfg)}", file=sys.stderr)
        raise
    if summary is None:
        if int(os.environ.get("RANK", "0")):
            return Outcome(finished=False)
        print(f"\nStopped at the time limit and saved. Next:\n  {_resume(cfg)}")
        return Outcome(finished=False)
    print(f"\n{summary.report.table}\n")
    print(f"{summary.seconds:.0f} s, {summary.images_seen} images seen, saved in {cfg.run_dir}")
    print(f"Next:\n  {summary.report.try_next}")
    if not HydraConfig.initialized():  # a report without that number is no mistake outside a sweep
        return Outcome(values=summary.values)
    metric = cfg.get("optimized_metric", FD_PIXELS)
    number = objective(summary.values, metric)
    return Outcome(metric=metric, objective=number, values=summary.values)


def _decode_config(cfg: DictConfig) -> DecodeConfig:
    """The settings of a decoding.

    Raises:
        UsageError: if a schedule of another system determines the overlap, and the command another.
    """
    config: DecodeConfig = instantiate(cfg.decode, _convert_="all")
    overlap = finite_number(cfg.overlap, "overlap", minimum=0, maximum=1)
    if overlap and not math.isclose(overlap, config.overlap):
        raise UsageError(
            f"overlap must be left to {cfg.decode._target_}, which gives {config.overlap:g}, got "
            f"{overlap:g}"
        )
    return config


def decode(cfg: DictConfig) -> None:
    """Decode images, to one picture, an animation, a file per image, or an array for evaluators."""
    from rolldiff.evaluation.images import (
        make_grid,
        save_gif,
        save_images,
        save_latents,
        save_npz,
        save_picture,
    )

    decoder = _load(cfg, "ckpt", Decoder)
    out = _out(cfg, (".png", ".gif", ".npz", ".safetensors", ""))
    pictures = _pictures(cfg, decoder, out)
    config = _decode_config(cfg)
    num_images = whole_number(cfg.num_images, "num_images", maximum=MAX_IMAGES)
    batch_size = min(whole_number(cfg.batch_size, "batch_size"), num_images)
    labels = _labels(cfg.label, decoder.conditioning, num_images)
    size = cfg.image_size
    options = {
        "seed": cfg.seed,
        "dtype": named_dtype(cfg.dtype),
        "image_size": OmegaConf.to_object(size) if OmegaConf.is_config(size) else size,
    }
    if cfg.compile:
        compile_in_place(decoder)
    if out.suffix.lower() == ".gif":
        _refuse_huge_pages(num_images)
        frames = decoder.stream(
            labels(0, num_images), config, num_images=num_images, frames=cfg.frames, **options
        )
        save_gif((make_grid(pictures(frame.image)) for frame in frames), out)
        print(out)
        return
    costs = []

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            cond = labels(start, count)
            output = decoder.decode(cond, config, num_images=count, start_index=start, **options)
            costs.append(output.cost)
            yield pictures(output.image).cpu()

    match out.suffix.lower():
        case ".png":
            _refuse_huge_pages(num_images)
            save_picture(make_grid(torch.cat(list(batches()))), out)
        case ".npz":
            save_npz(batches(), out)
        case ".safetensors":
            save_latents(batches(), out)
        case _:
            save_images(batches(), out)
    print(
        f"{out}: {num_images} images, {costs[0].nfe} network calls in series, "
        f"{costs[0].tokens} token evaluations per image, {sum(c.seconds for c in costs):.2f} s"
    )


def generate(cfg: DictConfig) -> None:
    """Generate codes with a prior, and decode the images while the codes arrive."""
    from rolldiff.evaluation.images import make_grid, save_gif, save_picture
    from rolldiff.tokenizer import Generation, Prior, Tokenizer

    prior = _load(cfg, "prior", Prior)
    tokenizer = _load(cfg, "tokenizer", Tokenizer)
    out = _out(cfg, (".png", ".gif"))
    num_images = whole_number(cfg.num_images, "num_images", maximum=MAX_PER_PAGE)
    generation = Generation(
        prior,
        tokenizer,
        cond=_labels(cfg.label, prior.conditioning, num_images)(0, num_images),
        config=_decode_config(cfg),
        num_images=num_images,
        seed=cfg.seed,
        temperature=cfg.temperature,
        guidance=cfg.guidance,
    )
    if out.suffix.lower() == ".gif":
        save_gif((make_grid(frame.image) for frame in generation.stream(frames=cfg.frames)), out)
    else:
        save_picture(make_grid(generation.images()), out)
    print(f"{out}: {num_images} images of {prior.num_tokens} codes")


def reconstruct(cfg: DictConfig) -> None:
    """Encode a picture of any size and decode it again, from top to bottom."""
    from rolldiff.evaluation.images import save_gif, save_images, save_picture, to_picture
    from rolldiff.evaluation.metrics import psnr
    from rolldiff.pixels import Record, load_image
    from rolldiff.tokenizer import Tokenizer
    from rolldiff.tokenizer import reconstruct as run

    tokenizer = _load(cfg, "ckpt", Tokenizer)
    if cfg.image is None:
        raise UsageError("image must be a picture, got none; say image=FILE")
    out = _out(cfg, (".png", ".gif", ""))
    config = _decode_config(cfg)
    file = Path(str(cfg.image)).expanduser()
    channels = tokenizer.decoder.layout.image_shape[0]
    pixels = load_image(Record(str(file), file, 0), image_size=None, channels=channels)
    image = pixels[None].float() / 127.5 - 1
    start = time.perf_counter()
    found = run(tokenizer, image)
    encoded = time.perf_counter() - start
    first_row, frames = None, []
    film = out.suffix.lower() != ".png"  # the finished picture needs no previews
    for frame in found.stream(config, seed=cfg.seed, frames=cfg.frames, preview=film):
        if first_row is None and bool(frame.finished[0].all()):
            first_row = time.perf_counter() - start
        frames.append(frame)
    seconds = time.perf_counter() - start
    images = [frame.image.cpu() for frame in frames]
    match out.suffix.lower():
        case ".gif":
            save_gif((to_picture(picture) for picture in images), out)
        case ".png":
            save_picture(to_picture(images[-1]), out)
        case _:
            save_images(images, out)
    height, width = found.size
    print(
        f"{out}: {width} x {height} pixels, {found.tokenizer.num_tokens:,} codes, "
        f"{found.bits_per_pixel:.3f} bits per pixel, PSNR {psnr(image, images[-1]):.2f} dB; "
        f"encoded in {encoded:.2f} s, first row shown after {first_row:.2f} s, "
        f"all after {seconds:.2f} s"
    )


def serve(cfg: DictConfig) -> None:
    """Serve a model over HTTP, in OpenAI's words and with a page, until it is told to stop."""
    try:
        from rolldiff.serving import Limits, run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serve needs the extra `serve`, pip install 'rolldiff[serve]', and {error.name} is "
            "missing"
        ) from error
    limits = Limits(**_mapping(cfg, "limits"))
    # OpenMP keeps a team of threads for every thread that has computed. With one of this thread
    # beside that of the worker there would be more threads than cores, and a small network would
    # be four times slower; so what loads the model ends before the worker begins.
    with ThreadPoolExecutor(1) as loading:
        served = loading.submit(_served, cfg).result()
    try:
        run(served, limits, host=cfg.host, port=cfg.port, api_key=cfg.api_key)
    except KeyboardInterrupt:
        print("rolldiff: stopped")


def _served(cfg: DictConfig) -> "Served":
    from rolldiff.serving import Served
    from rolldiff.tokenizer import Prior, Tokenizer

    prior = None if cfg.prior is None else _load(cfg, "prior", Prior)
    tokenizer = None if prior is None else _load(cfg, "ckpt", Tokenizer)
    decoder = _load(cfg, "ckpt", Decoder) if tokenizer is None else tokenizer.decoder
    if cfg.num_groups is None:  # the largest trained number that still shows large groups
        trained = decoder.training_distribution.num_groups
        cfg.num_groups = max((g for g in trained if g <= 8), default=min(trained))
    if cfg.compile:
        compile_in_place(decoder)
    return Served(
        decoder=decoder,
        name=cfg.name,
        prior=prior,
        tokenizer=tokenizer,
        prompts={} if cfg.prompts is None else _mapping(cfg, "prompts"),
        config=_decode_config(cfg),
    )


def bench(cfg: DictConfig) -> Outcome | None:
    """Measure quality against cost, and print the path of the report."""
    from rolldiff.evaluation.sweep import bench as run
    from rolldiff.evaluation.sweep import smallest_distance

    folder = run(cfg, conf=config_dir())
    print(folder / "report.md")
    if not HydraConfig.initialized():  # not in a sweep; another process may still be writing
        return None
    metric, values = smallest_distance(folder)
    return Outcome(metric=metric, objective=values[metric], values=values)


def likelihood(cfg: DictConfig) -> None:
    """Print the bits per dimension of images by group count, overlap and order."""
    from rolldiff.evaluation.bits import likelihood_table
    from rolldiff.evaluation.sweep import run_data

    if cfg.ckpt is None:
        raise UsageError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    print(likelihood_table(cfg, run_data(cfg)))


COMMANDS: dict[str, Callable[[DictConfig], Outcome | None]] = {
    "train": train,
    "decode": decode,
    "generate": generate,
    "reconstruct": reconstruct,
    "serve": serve,
    "bench": bench,
    "likelihood": likelihood,
}


def _load(cfg: DictConfig, name: str, cls: type[M]) -> M:
    """The model that a setting names, on the device of the command."""
    path = cfg[name]
    if path is None or not str(path).strip():
        raise UsageError(f"{name} must be a run folder or a checkpoint; add {name}=PATH")
    device = named_device(cfg.device)
    return read_checkpoint(path, cls, trusted=trusted_prefixes(cfg.trust)).to(device)


def _mapping(cfg: DictConfig, name: str) -> dict[str, Any]:
    """The names and values of a setting."""
    found = OmegaConf.to_object(cfg[name]) if OmegaConf.is_dict(cfg[name]) else None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"{name} must be names with values, as in {{a: 1}}, got {cfg[name]}")
    return {str(key): value for key, value in found.items()}


def _out(cfg: DictConfig, kinds: Sequence[str]) -> Path:
    """Where the images go, checked before they are made; no suffix stands for a folder."""
    named = [kind for kind in kinds if kind]
    expected = " or ".join([", ".join(named), *(["be a folder"] if "" in kinds else [])])
    out = Path("" if cfg.out is None else str(cfg.out)).expanduser()
    if not out.name or out.suffix.lower() not in kinds:
        raise UsageError(f"out must end in {expected}, got {cfg.out}")
    if not out.parent.is_dir():
        raise UsageError(f"out must be in a folder that exists, got {out}")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"out must be in a folder that can be written, got {out}")
    if not out.suffix and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"out must be a new or an empty folder, got {out}")
    if out.suffix and out.is_dir():
        raise UsageError(f"out must be a file, got {out}, which is a folder")
    return out


def _labels(label: Any, conditioning: Conditioning, num_images: int) -> Callable[[int, int], Any]:
    """The condition of the images from an index on; by default labels cycle through the classes.

    Raises:
        UsageError: if there are no such labels.
    """
    found = [
        (name, part)
        for name, part in zip(conditioning.names, conditioning.parts, strict=True)
        if isinstance(part, ClassLabels)
    ]
    if not found:
        if label is not None:
            raise UsageError(f"label must be null for a model without class labels, got {label}")
        return lambda start, count: None
    ((name, part), *_) = found
    if label is None:
        every = torch.arange(num_images) % part.num_classes
    else:
        value = list(label) if OmegaConf.is_list(label) else label
        every = part.validate(value, num_images, torch.device("cpu"), name="label").value
    several = len(conditioning.parts) > 1

    def condition(start: int, count: int) -> Any:
        labels = every[start : start + count]
        return {name: labels} if several else labels

    return condition


def _pictures(cfg: DictConfig, decoder: Decoder, out: Path) -> Callable[[Tensor], Tensor]:
    """From decoded images to those that are written to a file.

    Raises:
        UsageError: if latents are to be written as pictures without an autoencoder, or the reverse.
    """
    numbers = out.suffix.lower() == ".safetensors"
    if numbers and not decoder.latents:
        raise UsageError(f"out must be of pictures for a decoder of pictures, got {out}")
    if cfg.autoencoder is not None and (numbers or not decoder.latents):
        of = "out=*.safetensors" if numbers else "a decoder of pictures"
        raise UsageError(f"autoencoder must be null for {of}, got {cfg.autoencoder.path}")
    if numbers or not decoder.latents:
        return lambda image: image
    if cfg.autoencoder is None:
        raise UsageError(
            "autoencoder must make pictures of latents (autoencoder=kl autoencoder.path=FOLDER), "
            "got none; out=FILE.safetensors takes the latents themselves"
        )
    from rolldiff.integrations.autoencoder import WANTED, Autoencoder

    autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    instance(autoencoder, Autoencoder, "autoencoder", WANTED)
    autoencoder.check_latents(decoder.layout.image_shape)
    return autoencoder.decode


def _refuse_huge_pages(num_images: int) -> None:
    if num_images > MAX_PER_PAGE:
        raise UsageError(
            f"num_images must be at most {MAX_PER_PAGE} in one picture, got {num_images}; "
            "out=FOLDER or out=images.npz takes more"
        )


def _resume(cfg: DictConfig) -> str:
    """The command that resumes a training."""
    settings = {"resume": cfg.run_dir}
    settings |= {name: cfg[name] for name in ("time_limit", "trust") if cfg[name] is not None}
    return command_line("train", settings)


def _refuse_settings_beside_resume(overrides: Sequence[str]) -> None:
    names = _names(overrides)
    allowed = (*RESUMABLE, *DEVICES)
    others = [
        override
        for override, name in zip(overrides, names, strict=True)
        if name not in allowed and not override.startswith("-")
    ]
    if "resume" in names and others:
        raise UsageError(
            f"resume must come without other settings than {', '.join(allowed[1:])}, because it "
            f"keeps those of the run, got {' '.join(others)}"
        )


@contextmanager
def _hydra_config_of_its_own() -> Iterator[None]:
    """Hydra leaves its configuration behind, and the next command would pass for a job of it."""
    try:
        yield
    finally:
        HydraConfig.instance().cfg = None


def _run_by_hydra(command: str, overrides: Sequence[str]) -> None:
    """Print the settings of a command, its help and the like, as Hydra's flags say."""

    def job(cfg: DictConfig) -> None:
        with _errors_in_one_line():
            _call(command, cfg, overrides)

    sys.argv = [f"rolldiff {command}", *overrides]
    run = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)
    run(job)()


def _sweep(command: str, overrides: Sequence[str]) -> None:
    """Run the jobs of a sweep, wherever its launcher runs them, and print a table of them."""
    with initialize_config_dir(str(config_dir()), job_name=command, version_base="1.3"):
        multirun = GlobalHydra.instance().hydra
        cfg = multirun.compose_config(
            command, overrides, run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        folder = Path(str(cfg.hydra.sweep.dir)).expanduser().absolute()
        sweep = Sweep(folder=folder, command=command, larger=_is_maximized(cfg))
        ended: BaseException | None = None
        with sweep.held():
            try:
                # The folder as it is now, for its name may hold the time.
                place = setting("hydra.sweep.dir", folder)
                multirun.multirun(command, partial(_job, sweep, os.getpid()), [*overrides, place])
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                ended = error
            jobs = sweep.jobs(interrupted=_is_interruption(ended))
            if jobs:
                print(f"\n{sweep.table(jobs)}\n{sweep.write_table(jobs)}")
    if ended is not None:
        unfinished = ", ".join(str(job.number) for job in jobs if job.state != "finished")
        if unfinished and isinstance(ended, Exception):  # such as of a search that found nothing
            text = f"the sweep ended early: {type(ended).__name__}: {reason(ended)}"
            _fail(ended, f"{text}; unfinished jobs: {unfinished}", status=1)
        raise ended
    failed = ", ".join(str(job.number) for job in jobs if job.state == "failed")
    if failed:
        print(f"rolldiff: failed jobs of the sweep: {failed}", file=sys.stderr)
        raise SystemExit(1)


def _job(sweep: Sweep, parent: int, cfg: DictConfig) -> float | None:
    """One job of a sweep, in the process of the sweep (`parent`) or in another.

    Returns:
        What a search goes by. None if there is no such number, also of a job that has failed:
        Optuna's sweeper then marks the trial as failed and goes on, in either direction. It does
        not survive NaN, and infinity is the best value where larger is better.
    """
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir)
    if "run_dir" in cfg:
        cfg.run_dir = str(folder)
    if sweep.command == "train" and list(folder.rglob("*.ckpt")):  # a queue started it again
        cfg.resume = str(folder)
    # Without the folders of settings that it was found in, the job's command would not work.
    found = [o for o in context.overrides.hydra if o.startswith("hydra.searchpath=")]
    job = sweep.begin(context.job.num, [*found, *context.overrides.task], folder)
    _quiet_warnings()
    try:
        with _errors_in_one_line(), raised():
            outcome = _call(sweep.command, cfg, context.overrides.task) or Outcome()
    except _EndedInOneLine as end:
        sweep.break_off(job, end.line, stopped=_is_interruption(end))
        if _is_interruption(end) and os.getpid() == parent:
            raise
        return None
    except Exception as error:  # a defect; the other jobs go on
        traceback.print_exc()
        sweep.break_off(job, f"{type(error).__name__}: {reason(error)}", stopped=False)
        return None
    sweep.end(job, outcome)
    return outcome.objective


def _is_maximized(cfg: DictConfig) -> bool | None:
    """Whether the sweeper searches for the largest number; None if it does not search."""
    direction = OmegaConf.select(cfg, "hydra.sweeper.direction")
    if direction is None:
        return None
    name = getattr(direction, "name", direction)
    if name not in ("minimize", "maximize"):
        raise UsageError(f"hydra.sweeper.direction must be minimize or maximize, got {name}")
    return bool(name == "maximize")


class _EndedInOneLine(SystemExit):
    """The end of a command that has printed its error.

    Attributes:
        line: what was printed.
    """

    def __init__(self, status: int, line: str) -> None:
        super().__init__(status)
        self.line = line


def _is_interruption(error: BaseException | None) -> bool:
    """Whether a command was ended by Ctrl-C or a signal."""
    cause = error.__context__ if isinstance(error, _EndedInOneLine) else error
    return isinstance(cause, KeyboardInterrupt)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        name, status = "Ctrl-C", 130
        if isinstance(error, Interrupted):
            name, status = {"SIGINT": "Ctrl-C"}.get(error.name, error.name), error.status
        _fail(error, f"stopped by {name}", status=status)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UsageError) or _is_misconfiguration(cause):
            _fail(cause)  # clearer than Hydra's words around it
        if _is_out_of_memory(cause):
            _fail(cause, OUT_OF_MEMORY, status=1)
        if not isinstance(cause, ImportError | TypeError | ValueError | None):
            raise
        _fail(error)  # an argument, a value or a class that does not exist
    except (HydraException, OmegaConfBaseException, UsageError) as error:
        _fail(error, _missing_plugin(str(error)))
    except (FloatingPointError, OtherProcessError) as error:
        _fail(error, status=1)
    except OSError as error:
        _fail(error, _os_error(error), status=1)
    except RecursionError as error:
        if not _in_omegaconf(error):
            raise
        _fail(error, "the settings refer to each other in a circle")
    except Exception as error:
        if _is_out_of_memory(error):
            _fail(error, OUT_OF_MEMORY, status=1)
        if not _is_misconfiguration(error):
            raise
        _fail(error)


def _missing_plugin(text: str) -> str | None:
    """What to do about a sweeper or a launcher that Hydra does not find."""
    found = re.search(r"'(hydra/(?:launcher|sweeper))/(\w+)'", text)
    if found is None or found[2] not in PLUGINS:
        return None
    group, name = found.groups()
    return f"{group}={name} needs the extra `sweeps`, pip install 'rolldiff[sweeps]'"


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was asked for that is not there; on a CPU torch says it in words alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _is_misconfiguration(error: BaseException | None) -> bool:
    """Whether Lightning refuses its settings; compared by name, to import it only where needed."""
    return type(error).__name__ == "MisconfigurationException"


def _in_omegaconf(error: BaseException) -> bool:
    trace, files = error.__traceback__, set()
    while trace is not None:
        files.add(Path(trace.tb_frame.f_code.co_filename).parent.name)
        trace = trace.tb_next
    return "omegaconf" in files


def _os_error(error: OSError) -> str:
    """The cause and the file, where the system gives them, such as a full disk."""
    if error.strerror is None:
        return str(error)
    place = error.filename2 or error.filename
    return f"{error.strerror}: {place}" if place else error.strerror


def _fail(error: BaseException | None, text: str | None = None, *, status: int = 2) -> NoReturn:
    if "HYDRA_FULL_ERROR" in os.environ and isinstance(error, Exception):
        raise error
    line = " ".join((text or str(error)).split())
    print(f"rolldiff: {line}", file=sys.stderr)
    raise _EndedInOneLine(status, line)


def _quiet_lightning() -> None:
    """Leave out its hints below warnings: unavailable accelerators, other products.

    Importing it sets the level, so this comes after.
    """
    import lightning  # noqa: F401

    _quiet_warnings()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _quiet_warnings() -> None:
    """Show warnings as one line each, without those that the settings of this library cause."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    for message in (
        "The '.*_dataloader' does not have many workers",  # images in memory need none
        ".*LeafSpec.* is deprecated",
        # A short training logs its last values with the report.
        "The number of training batches .* is smaller than the logging interval",
        # The data module resumes by itself, in the folder of the run.
        "You're resuming from a checkpoint that ended before",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message)


def _show_warning(message: object, *_: object) -> None:
    print(f"rolldiff: {message}", file=sys.stderr)
