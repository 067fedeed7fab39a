"""The command line: `rolldiff train`, `decode` and `bench`, configured by Hydra.

What a user gets wrong ends in one line on standard error and exit status 2; a run that fails by
itself (a loss that is not finite) in one line and status 1. Anything else is a defect and shows
its traceback, as everything does where HYDRA_FULL_ERROR is set.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import rolldiff

__all__ = ["config_dir", "main"]

USAGE = """\
usage: rolldiff COMMAND [key=value ...]

  train    train a decoder; with no arguments, on handwritten digits
  decode   draw images: rolldiff decode ckpt=RUN num_groups=4 overlap=0.5 out=images.png
  generate write codes and draw them: rolldiff generate prior=RUN decoder=RUN out=stream.gif
  bench    measure quality against cost: rolldiff bench ckpt=RUN bench.steps=[4,8,16]

rolldiff COMMAND --help shows what can be set, rolldiff COMMAND --cfg job the settings in force.
"""


def config_dir() -> Path:
    """The folder of YAML files: beside the package in a wheel, beside its parent in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ValueError(f"conf must stand beside {package} or inside it, and is missing")


def _fail(words: object, status: int = 2) -> NoReturn:
    if "HYDRA_FULL_ERROR" in os.environ and isinstance(words, BaseException):
        raise words
    line = " ".join(str(words).split())
    print(f"rolldiff: {line}", file=sys.stderr)
    raise SystemExit(status)


def _plain_warning(message: object, *_: object) -> None:
    print(f"rolldiff: {message}", file=sys.stderr)


def _train(cfg: DictConfig) -> None:
    # Imported here: a wrong override is told before Lightning is loaded.
    from rolldiff.run import train

    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    summary = train(cfg)
    print(f"\n{summary.reported.table}\n")
    print(f"{summary.seconds:.0f} s, {summary.images_seen} images seen. Everything is in {folder}")
    print(f"Next:\n  {summary.reported.try_next}")


def _decode(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from rolldiff.lit import load
    from rolldiff.pictures import film, sheet
    from rolldiff.run import named_dtype

    if cfg.ckpt is None:
        raise ValueError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    out = _out(cfg)
    decoder = load(cfg.ckpt).to(_device(cfg))
    cond = _labels(cfg, decoder.condition.num_classes)
    ask = {
        "num_images": cfg.num_images,
        "num_groups": cfg.num_groups,
        "overlap": cfg.overlap,
        "steps": cfg.steps,
        "order": cfg.order if isinstance(cfg.order, str) else list(cfg.order),
        "step": instantiate(cfg.step),
        "guidance": cfg.guidance,
        "seed": cfg.seed,
        "dtype": named_dtype(cfg.dtype),
    }
    if cfg.compile:
        decoder.compile()
    if out.suffix.lower() == ".gif":
        frames = decoder.stream(cond, frames=cfg.frames, **ask)
        film((sheet(frame.image) for frame in frames), out)
        print(out)
        return
    decoded = decoder.decode(cond, **ask)
    sheet(decoded.image).save(out)
    cost = decoded.cost
    print(
        f"{out}: {cfg.num_images} images, {cost.nfe} network calls in series, "
        f"{cost.tokens} token evaluations an image, {cost.seconds:.2f} s"
    )


def _out(cfg: DictConfig) -> Path:
    out = Path(cfg.out)
    if out.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"out must end in .png or .gif, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got {out}")
    return out


def _device(cfg: DictConfig) -> str:
    import torch

    return cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _labels(cfg: DictConfig, classes: int) -> Any:
    """The labels asked for; without, the classes in turn."""
    if OmegaConf.is_list(cfg.label):
        return list(cfg.label)
    if cfg.label is None and classes and isinstance(cfg.num_images, int):
        return [i % classes for i in range(cfg.num_images)]
    return cfg.label


def _generate(cfg: DictConfig) -> None:
    from rolldiff.generate import Generation
    from rolldiff.pictures import film, sheet
    from rolldiff.prior import Prior
    from rolldiff.tokenizer import Tokenizer

    for name, said in (("prior", "prior"), ("tokenizer", "decoder")):
        if cfg[name] is None:
            raise ValueError(f"{said} must be a run folder, got none; say {said}=PATH")
    out = _out(cfg)
    prior = Prior.from_pretrained(cfg.prior).to(_device(cfg))
    generation = Generation(
        prior,
        Tokenizer.from_pretrained(cfg.tokenizer).to(_device(cfg)),
        cond=_labels(cfg, prior.condition.num_classes),
        num_images=cfg.num_images,
        seed=cfg.seed,
        temperature=cfg.temperature,
        prior_guidance=cfg.guidance,
        settings={"num_groups": cfg.num_groups, "overlap": cfg.overlap, "steps": cfg.steps},
    )
    if out.suffix.lower() == ".gif":
        film((sheet(frame.image) for frame in generation.stream(frames=cfg.frames)), out)
    else:
        sheet(generation.images()).save(out)
    print(f"{out}: {cfg.num_images} images of {prior.num_tokens} codes")


def _bench(cfg: DictConfig) -> None:
    from rolldiff.bench import bench

    print(bench(cfg, conf=config_dir()) / "report.md")


COMMANDS: dict[str, Callable[[DictConfig], None]] = {
    "train": _train,
    "decode": _decode,
    "generate": _generate,
    "bench": _bench,
}


@contextmanager
def _told() -> Iterator[None]:
    """Tells the errors that are meant for users in one line."""
    try:
        yield
    except InstantiationException as error:
        # What the object said for itself is clearer than Hydra's words around it.
        _fail(error.__cause__ if isinstance(error.__cause__, ValueError) else error)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _fail(error)
    except FloatingPointError as error:
        _fail(error, status=1)


def _job(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """The task as Hydra calls it; in a sweep, each job in a folder of its own."""

    def run(cfg: DictConfig) -> None:
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN and "run_dir" in cfg:
            cfg.run_dir = job.runtime.output_dir
        with _told():
            task(cfg)

    return run


def _check(command: str, overrides: list[str]) -> list[str]:
    """Compose once before Hydra does, so that a mistake is one line and leaves no folder behind.

    Returns:
        The overrides, with the run folder settled.
    """
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(command, overrides)
    if command != "train":
        return overrides
    folder = Path(cfg.run_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"run_dir must be a new or an empty folder, got {folder}")
    from rolldiff.run import build

    build(cfg)
    kept = [override for override in overrides if not override.startswith("run_dir=")]
    return [*kept, f"run_dir='{folder}'"]


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
    if command not in COMMANDS:
        _fail(f"COMMAND must be one of {', '.join(COMMANDS)}, got {command!r}")
    if command == "generate":  # Hydra would look for a file of the group `decoder`
        overrides = [re.sub("^decoder=", "tokenizer=", override) for override in overrides]
    warnings.showwarning = _plain_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    # The data keeps its place itself.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
    for name in ("lightning.pytorch", "lightning.fabric"):  # which accelerators are not there
        logging.getLogger(name).setLevel(logging.WARNING)
    flags = any(word.startswith("-") for word in overrides)
    if not flags:  # a sweep or a question about the settings is Hydra's alone
        with _told():
            overrides = _check(command, overrides)
    sys.argv = [f"rolldiff {command}", *overrides]
    run = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)
    run(_job(COMMANDS[command]))()
