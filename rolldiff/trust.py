"""The configuration of a run folder, which may be somebody else's.

Hydra calls whatever a `_target_` names, at any depth, and OmegaConf resolves `${oc.env:HOME}`. A
configuration from a folder is therefore read as plain data and checked before Hydra sees it: every
`_target_` is one of `TARGETS`, or of a package that the user trusts by name; the only interpolation
is `${run_dir}`, the folder itself; and nothing is written outside of the folder.

A user's own `conf/` and command line are as free as Hydra is; they do not pass through here.
"""

import math
import sys
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any

import yaml

from rolldiff.errors import UsageError, reason
from rolldiff.hub import PUBLIC, is_defined_in

__all__ = [
    "DATA",
    "DEVICES",
    "RESUMABLE",
    "RUN_DIR",
    "TARGETS",
    "escaped",
    "portable",
    "read_run_config",
    "trusted_prefixes",
]

RUN_DIR = "${run_dir}"

# Settings that may differ from those of the run that is resumed.
RESUMABLE = ("resume", "time_limit", "process_timeout", "progress", "trust")
# Those too, where the command gives them: what a run computes does not depend on its devices.
DEVICES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")

MAX_BYTES = 2**20
MAX_DEPTH = 50

DATA = frozenset(
    f"rolldiff.data.{name}" for name in ("Digits", "Folder", "Hub", "Latents", "Photos")
)

TARGETS = (
    DATA
    | PUBLIC.keys()
    | {
        "datetime.timedelta",
        "lightning.Trainer",
        "rolldiff.integrations.autoencoder.Autoencoder.from_pretrained",
        "rolldiff.evaluation.report.DecoderReport",
        "rolldiff.evaluation.report.PriorReport",
        "rolldiff.evaluation.report.TokenizerReport",
        "rolldiff.presets.diffusion_forcing",
        "rolldiff.presets.magi",
        "rolldiff.presets.rolling_diffusion",
        "rolldiff.presets.skyreels",
        "rolldiff.presets.srm",
        "rolldiff.training.AveragedWeights",
        "rolldiff.training.CSVLog",
        "rolldiff.training.FullySharded",
        "rolldiff.training.LitDecoder",
        "rolldiff.training.LitPrior",
        "rolldiff.training.LitTokenizer",
        "rolldiff.training.SampleGrid",
        "rolldiff.training.decoder_of",
    }
    | {
        f"lightning.pytorch.callbacks.{name}"
        for name in (
            "EMAWeightAveraging",
            "EarlyStopping",
            "GradientAccumulationScheduler",
            "LearningRateMonitor",
            "ModelCheckpoint",
        )
    }
    | {
        f"lightning.pytorch.loggers.{name}"
        for name in ("CSVLogger", "TensorBoardLogger", "WandbLogger")
    }
    | {
        f"torch.optim.{name}"
        for name in ("Adafactor", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
    }
)

# Settings that name a place that is written to, and settings that name one that is only read.
WRITTEN = frozenset({"default_root_dir", "dirpath", "folder", "save_dir"})
READ = frozenset({"init", "labels", "path", "resume", "run_dir", "tokenizer"})

# Nobody's own package: it is never proposed to trust all that they hold.
LIBRARIES = frozenset({"hydra", "lightning", "numpy", "rolldiff", "torch"})

HYDRA = frozenset({"_convert_", "_partial_", "_target_"})


class _Loader(yaml.SafeLoader):
    """YAML without aliases, by which a small file can stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def read_run_config(path: Path, *, part: str | None = None, trust: object = None) -> dict[str, Any]:
    """The configuration that a run left in its folder, as plain, checked containers.

    `${run_dir}` at the start of a text is replaced by the folder that the file is in now.

    Args:
        path: `config.yaml` in a run folder.
        part: read and check only this key; what is beside it is ignored.
        trust: package or packages whose classes it may name too, such as `mypackage.`.

    Raises:
        UsageError: if it cannot be read, or asks for something that is not allowed.
    """
    prefixes = trusted_prefixes(trust)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} must be a configuration of at most 1 MiB")
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} must be a readable YAML file: {reason(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} must hold a dictionary, got a {type(config).__name__}")
    if part is not None:
        config = {part: config.get(part)}
    try:
        faults = ((place, _fault(place, value, prefixes)) for place, value in _values(config, ()))
        place, fault = next(((p, f) for p, f in faults if f), ((), None))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    if fault:
        raise UsageError(f"{path}: {'.'.join(map(str, place))} {fault}")
    return _located(config, escaped(path.parent))


def trusted_prefixes(trust: object) -> tuple[str, ...]:
    """The packages that a user trusts, each as a prefix of dotted names that ends in a dot.

    Raises:
        UsageError: if one of them is not a dotted name.
    """
    names = () if trust is None else (trust,) if isinstance(trust, str) else trust
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"trust must be a package such as mypackage., got {trust!r}")
    prefixes = tuple(f"{name.removesuffix('.')}." for name in names)
    for prefix in prefixes:
        if not all(part.isidentifier() for part in prefix[:-1].split(".")):
            raise UsageError(f"trust must be a package such as mypackage., got {prefix!r}")
    return prefixes


def escaped(text: str | Path) -> str:
    """A text as a value of a configuration, in which `${` would begin an interpolation."""
    return str(text).replace("${", "\\${")


def portable(config: Any, run_dir: str) -> Any:
    """The same containers with `${run_dir}` in place of the folder at the start of texts."""
    if isinstance(config, dict):
        return {key: portable(value, run_dir) for key, value in config.items()}
    if isinstance(config, list):
        return [portable(value, run_dir) for value in config]
    if isinstance(config, str) and (config == run_dir or config.startswith(f"{run_dir}/")):
        return RUN_DIR + config[len(run_dir) :]
    return config


def _located(config: Any, folder: str) -> Any:
    """The inverse of `portable`."""
    if isinstance(config, dict):
        return {key: _located(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [_located(value, folder) for value in config]
    if isinstance(config, str) and config.startswith(RUN_DIR):
        return folder + config[len(RUN_DIR) :]
    return config


def _values(config: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value with the keys that lead to it, containers before what they hold."""
    yield place, config
    if len(place) > MAX_DEPTH:
        raise UsageError(f"a configuration must be nested {MAX_DEPTH} deep at most")
    items: Any = ()
    if isinstance(config, dict):
        if not all(isinstance(key, str) for key in config):
            raise UsageError(f"keys of a configuration must be texts, got {list(config)}")
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        yield from _values(value, (*place, key))


def _fault(place: tuple[Any, ...], value: Any, prefixes: tuple[str, ...]) -> str | None:
    """Why a value is refused, as the end of a sentence."""
    key = next((k for k in reversed(place) if isinstance(k, str)), "")
    if key.startswith("_") and key.endswith("_") and key not in HYDRA:
        return f"must be plain data, got {key}"
    if key == "_target_":
        return _target_fault(value, prefixes)
    if isinstance(value, str):
        return _text_fault(key, value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, got {value}"
    if not (value is None or isinstance(value, bool | int | float | dict | list)):
        return f"must be plain data, got a {type(value).__name__}"
    return None


def _target_fault(target: Any, prefixes: tuple[str, ...]) -> str | None:
    if isinstance(target, str) and (target in TARGETS or is_defined_in(target, prefixes)):
        return None
    fault = f"must name a class that rolldiff train uses, got {target!r}"
    package = str(target).partition(".")[0]
    if package in sys.stdlib_module_names | LIBRARIES or not package.isidentifier():
        return fault
    return f"{fault}; if you trust whoever wrote this file, say trust={package}."


def _text_fault(key: str, text: str) -> str | None:
    rest = text.removeprefix(RUN_DIR)
    if "${" in rest:
        return f"must be plain data without interpolation, got {text!r}"
    if key in READ:
        return None
    path = PurePath(rest if rest != text else text)
    inside = rest != text and (not rest or rest.startswith("/"))
    if key in WRITTEN and not inside:
        return f"must be a place in the run folder ({RUN_DIR}/…), got {text!r}"
    if ".." in path.parts or (not inside and (path.is_absolute() or text.startswith("~"))):
        return f"must not lead out of the run folder, got {text!r}"
    return None
