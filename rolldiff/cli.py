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
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import rolldiff
from rolldiff import commands
from rolldiff.commands import config_dir

__all__ = ["config_dir", "main"]

USAGE = """\
usage: rolldiff COMMAND [key=value ...]

  train    train a decoder; with no arguments, on handwritten digits
  decode   draw images: rolldiff decode ckpt=RUN num_groups=4 overlap=0.5 out=images.png
  generate write codes and draw them: rolldiff generate prior=RUN decoder=RUN out=stream.gif
  bench    measure quality against cost: rolldiff bench ckpt=RUN bench.steps=[4,8,16]

rolldiff COMMAND --help shows what can be set, rolldiff COMMAND --cfg job the settings in force.
"""


def _fail(words: object, status: int = 2) -> NoReturn:
    if "HYDRA_FULL_ERROR" in os.environ and isinstance(words, BaseException):
        raise words
    line = " ".join(str(words).split())
    print(f"rolldiff: {line}", file=sys.stderr)
    raise SystemExit(status)


def _plain_warning(message: object, *_: object) -> None:
    print(f"rolldiff: {message}", file=sys.stderr)


COMMANDS: dict[str, Callable[[DictConfig], None]] = {
    "train": commands.train,
    "decode": commands.decode,
    "generate": commands.generate,
    "bench": commands.bench,
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
    if cfg.resume is not None:
        return _resumed(Path(cfg.resume), overrides)
    folder = Path(cfg.run_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"run_dir must be a new or an empty folder, got {folder}")
    from rolldiff.run import build

    build(cfg)
    kept = [override for override in overrides if not override.startswith("run_dir=")]
    return [*kept, f"run_dir='{folder}'"]


def _resumed(folder: Path, overrides: list[str]) -> list[str]:
    """The overrides of a training that goes on: its settings are in its folder."""
    from rolldiff.run import newest

    if not (folder / "config.yaml").is_file() or newest(folder) is None:
        raise ValueError(f"resume must be the folder of a run with a checkpoint, got {folder}")
    if (folder / "summary.json").is_file():
        raise ValueError(f"resume must be a run that is not finished, got {folder}")
    others = [o for o in overrides if not o.startswith(("resume=", "piece="))]
    if others:
        raise ValueError(f"resume takes the settings of the run, got {' '.join(others)} beside it")
    return [*overrides, f"run_dir='{folder}'"]


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
