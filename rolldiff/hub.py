"""Saving and loading: a folder or a Hugging Face Hub repository with two files.

`model.safetensors` holds the weights, and `config.json` plain data: `_target_` dictionaries as
Hydra reads them, which name classes by the paths that users import them from (`rolldiff.Patches`).

Files may come from somebody else, so reading them runs nothing that they hold. Nothing is unpickled
but plain containers and tensors. Only the classes in `PUBLIC` are built, none of which does more
than to hold numbers, and those of other libraries that the caller trusts by name. All names are
looked up before anything is built. The configuration is built without memory for weights first and
compared with the names, shapes and types in the file, so that neither can ask for more than the
file holds.

Files written by earlier versions are read through three tables: `MOVED` (classes), `RENAMED`
(constructor arguments) and `RENAMED_WEIGHTS`. Their training showed moving groups that did not see
later ones, so they count as trained for overlap 0 alone, where that makes no difference.
"""

import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rolldiff.errors import FLOATS, UsageError, instance, reason, sequence, shown
from rolldiff.files import written_whole

__all__ = ["Pretrained", "build", "describe", "read_checkpoint"]

M = TypeVar("M", bound="Pretrained")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HASH = "sha256"  # in the metadata of the weights

# Limits of a configuration: bytes, nested containers, values, and classes among them.
MAX_BYTES, MAX_LEVELS, MAX_VALUES, MAX_CLASSES = 2**24, 32, 2**20, 1000

# The types of safetensors that a module may hold.
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# The classes that a file may name: the path in the file, and where the class is defined.
PUBLIC = {
    "rolldiff.Decoder": "rolldiff.decoder.Decoder",
    "rolldiff.Patches": "rolldiff.diffusion.layout.Patches",
    "rolldiff.Haar": "rolldiff.diffusion.bands.Haar",
    "rolldiff.DCT": "rolldiff.diffusion.bands.DCT",
    "rolldiff.Rectified": "rolldiff.diffusion.process.Rectified",
    "rolldiff.Cosine": "rolldiff.diffusion.process.Cosine",
    "rolldiff.LinearBeta": "rolldiff.diffusion.process.LinearBeta",
    "rolldiff.Transformer": "rolldiff.nn.transformer.Transformer",
    "rolldiff.DiT": "rolldiff.nn.dit.DiT",
    "rolldiff.Conditioning": "rolldiff.conditioning.Conditioning",
    "rolldiff.ClassLabels": "rolldiff.conditioning.ClassLabels",
    "rolldiff.TokenGrid": "rolldiff.conditioning.TokenGrid",
    "rolldiff.TokenSequence": "rolldiff.conditioning.TokenSequence",
    "rolldiff.TrainingDistribution": "rolldiff.diffusion.timesteps.TrainingDistribution",
    "rolldiff.DecodeConfig": "rolldiff.decoder.DecodeConfig",
    "rolldiff.LikelihoodConfig": "rolldiff.likelihood.config.LikelihoodConfig",
    "rolldiff.Guidance": "rolldiff.nn.denoiser.Guidance",
    "rolldiff.AdamsBashforth2": "rolldiff.diffusion.sampler.AdamsBashforth2",
    "rolldiff.DDIM": "rolldiff.diffusion.sampler.DDIM",
    "rolldiff.Euler": "rolldiff.diffusion.sampler.Euler",
    "rolldiff.Heun": "rolldiff.diffusion.sampler.Heun",
    "rolldiff.Midpoint": "rolldiff.diffusion.sampler.Midpoint",
    "rolldiff.timesteps.LogitNormal": "rolldiff.diffusion.timesteps.LogitNormal",
    "rolldiff.timesteps.Uniform": "rolldiff.diffusion.timesteps.Uniform",
    "rolldiff.tokenizer.Encoder": "rolldiff.tokenizer.tokenizer.Encoder",
    "rolldiff.tokenizer.Prior": "rolldiff.tokenizer.prior.Prior",
    "rolldiff.tokenizer.Tokenizer": "rolldiff.tokenizer.tokenizer.Tokenizer",
    "rolldiff.integrations.diffusers.DiffusersBackbone": (
        "rolldiff.integrations.diffusers_backbone.DiffusersBackbone"
    ),
    "rolldiff.integrations.diffusers.Network": ("rolldiff.integrations.diffusers_backbone.Network"),
}

# Version 0.1 named classes by the module that defined them.
MOVED = {
    "rolldiff.conditioning.Conditions": "rolldiff.Conditioning",
    "rolldiff.conditions.ClassLabels": "rolldiff.ClassLabels",
    "rolldiff.conditions.LowResolution": "rolldiff.TokenGrid",
    "rolldiff.conditions.TokenGrid": "rolldiff.TokenGrid",
    "rolldiff.conditions.TokenSequence": "rolldiff.TokenSequence",
    "rolldiff.decoder.Decoder": "rolldiff.Decoder",
    "rolldiff.integrations.diffusers_backbone.DiffusersBackbone": (
        "rolldiff.integrations.diffusers.DiffusersBackbone"
    ),
    "rolldiff.integrations.diffusers_network.Network": ("rolldiff.integrations.diffusers.Network"),
    "rolldiff.layout.Patches": "rolldiff.Patches",
    "rolldiff.nn.encoder.Encoder": "rolldiff.tokenizer.Encoder",
    "rolldiff.nn.transformer.Transformer": "rolldiff.Transformer",
    "rolldiff.noise.Cosine": "rolldiff.Cosine",
    "rolldiff.noise.Rectified": "rolldiff.Rectified",
    "rolldiff.prior.Prior": "rolldiff.tokenizer.Prior",
    "rolldiff.training.Training": "rolldiff.TrainingDistribution",
}

# Constructor arguments that were called otherwise, by the public path of the class.
RENAMED = {
    "rolldiff.TokenGrid": {"codes": "codebook_size"},
    "rolldiff.TokenSequence": {"codes": "codebook_size"},
    "rolldiff.Transformer": {"recompute": "gradient_checkpointing"},
    "rolldiff.tokenizer.Prior": {"codes": "codebook_size"},
}

# Weights that were called otherwise: a pattern, its replacement, and whether a matrix was stored
# as its transpose.
RENAMED_WEIGHTS = (
    (r"\bblocks\.(\d+)\.table$", r"blocks.\1.scale_shift_table", False),
    (r"\bblocks\.(\d+)\.qkv\.weight$", r"blocks.\1.attn.qkv.weight", True),
    (r"\bblocks\.(\d+)\.qk_scale$", r"blocks.\1.attn.qk_scale", False),
    (r"\bblocks\.(\d+)\.out\.weight$", r"blocks.\1.attn.out.weight", True),
    (r"\bblocks\.(\d+)\.out\.bias$", r"blocks.\1.attn.out.bias", False),
    (r"\bblocks\.(\d+)\.up\.weight$", r"blocks.\1.mlp.up.weight", True),
    (r"\bblocks\.(\d+)\.up\.bias$", r"blocks.\1.mlp.up.bias", False),
    (r"\bblocks\.(\d+)\.down\.weight$", r"blocks.\1.mlp.down.weight", True),
    (r"\bblocks\.(\d+)\.down\.bias$", r"blocks.\1.mlp.down.bias", False),
    (r"\bblocks\.(\d+)\.cross\.(q|kv|out)\.weight$", r"blocks.\1.cross_attn.\2.weight", True),
    (r"\bblocks\.(\d+)\.cross\.out\.bias$", r"blocks.\1.cross_attn.out.bias", False),
    (r"\bgiven\.start$", "cond_embedder.null_token", False),
    (r"\bgiven\.parts\.(\d+)\.table\.", r"cond_embedder.parts.\1.embedding.", False),
    (r"\bgiven\.parts\.(\d+)\.place$", r"cond_embedder.parts.\1.pos_embed", False),
    (r"\bgiven\.parts\.", "cond_embedder.parts.", False),
    (r"\bplace$", "pos_embed", False),
    (r"(?<!_)\btime\.(hidden|out)\.", r"time_embed.\1.", False),
)


def describe(part: Any) -> Any:
    """A part as plain containers; the inverse of `build`.

    A dataclass is described by its fields, any other object by the dictionary `config` of its
    constructor arguments. The class may belong to another library; `build` must then be told to
    trust it.

    Raises:
        UsageError: if the part is neither, its class is not at the top level of its module, or a
            number is not finite.
    """
    if isinstance(part, float) and not math.isfinite(part):
        raise UsageError(f"a configuration must hold finite numbers, got {part}")
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    cls = type(part)
    if dataclasses.is_dataclass(part):
        arguments = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    elif isinstance(getattr(part, "config", None), dict):
        arguments = part.config
    else:
        raise UsageError(f"a configuration cannot hold a {cls.__name__}")
    path = f"{cls.__module__}.{cls.__qualname__}"
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise UsageError(
            "a configuration cannot hold an object whose class is not at the top of its module, "
            f"got a {cls.__qualname__} of {cls.__module__}"
        )
    target = next((public for public, defined in PUBLIC.items() if defined == path), path)
    return {"_target_": target} | {name: describe(value) for name, value in arguments.items()}


def upgrade_config(config: Any) -> Any:
    """A configuration of an earlier version without the laws of times that there were.

    Under those laws, the argument `times` of the training distribution, no moving group saw a later
    one. At overlap 0 that is the rule of today, and the checkpoint was not trained for any other.
    """
    if isinstance(config, list):
        return [upgrade_config(value) for value in config]
    if not isinstance(config, dict):
        return config
    target = str(config.get("_target_"))
    is_training = MOVED.get(target, target) == "rolldiff.TrainingDistribution"
    if is_training and "times" in config and "overlap" not in config:
        config = {n: value for n, value in config.items() if n != "times"} | {"overlap": [0.0]}
    return {name: upgrade_config(value) for name, value in config.items()}


def build(config: Any, *, trusted: Collection[str] = ()) -> Any:
    """The part that a description stands for; lists become tuples.

    Args:
        config: what `describe` returned, in this version or an earlier one.
        trusted: dotted names of classes of other libraries that it may name; one that ends in a
            dot, such as `mypackage.`, stands for all classes that the package defines.

    Raises:
        UsageError: if it holds other than plain values, or names any other class, before anything
            is built; or if it does not fit what it names.
    """
    return _built(*_read(config, trusted))


def _read(config: Any, trusted: Collection[str]) -> tuple[Any, dict[str, type]]:
    """A configuration in today's form, and the classes that it names."""
    trusted = list(trusted) if isinstance(trusted, set | frozenset) else trusted
    names = sequence(trusted, "trusted", "dotted names")
    for name in names:
        instance(name, str, "each of trusted", "a dotted name")
    check_plain(config)
    config = upgrade_config(config)
    return config, {str(target): _resolve(str(target), names) for target in _targets(config)}


def check_plain(config: Any, source: str = "config") -> None:
    """Refuse what a file of JSON cannot hold, too many values, and values that hold themselves.

    Args:
        config: a configuration.
        source: what the user calls it.

    Raises:
        UsageError: if there is such a value.
    """
    stack, count, classes = [(config, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        count, classes = count + 1, classes + (type(value) is dict)
        if depth > MAX_LEVELS or count > MAX_VALUES or classes > MAX_CLASSES:
            raise UsageError(
                f"{source} must hold at most {MAX_VALUES} values, {MAX_CLASSES} classes and "
                f"{MAX_LEVELS} levels, got more"
            )
        if type(value) is dict:
            for name in value:
                instance(name, str, f"each name in {source}", "text")
            stack += [(item, depth + 1) for item in value.values()]
        elif type(value) is list:
            stack += [(item, depth + 1) for item in value]
        elif value is not None and type(value) not in (bool, int, float, str):
            raise UsageError(f"{source} must hold plain values, got a {type(value).__name__}")
        elif type(value) is float and not math.isfinite(value):
            raise UsageError(f"{source} must hold finite numbers, got {value}")


def _targets(config: Any) -> Iterator[Any]:
    """Every `_target_`, nested ones included."""
    if isinstance(config, dict):
        yield config.get("_target_")
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _targets(value)


def _resolve(target: str, trusted: Collection[str]) -> type:
    path = PUBLIC.get(MOVED.get(target, target))
    packages = [name for name in trusted if name.endswith(".")]
    if path or target in trusted or is_defined_in(target, packages):
        try:
            cls = _found(path or target)
        except (ImportError, ValueError):  # no such module, or not a name of one
            cls = None
        if isinstance(cls, type):
            return cls
    raise UsageError(
        "_target_ must name a class of rolldiff, or one that trusted=… allows (on the command line "
        "trust=mypackage.), "
        f"got {shown(target)}"
    )


def is_defined_in(path: str, packages: Collection[str]) -> bool:
    """Whether a dotted path leads to a class or function that one of the packages defines.

    What a package has imported, such as `mypackage.os.system`, is not its own. The package is
    imported, so it must be one that the user trusts.

    Args:
        path: of a module and a name in it.
        packages: each as a prefix of dotted names, such as `mypackage.`.

    Raises:
        UsageError: if the package cannot be imported.
    """
    packages = tuple(packages)
    if not path.startswith(packages):
        return False
    try:
        found = _found(path)
    except ImportError as error:
        raise UsageError(f"{path} must be found, but {reason(error)}") from error
    return f"{getattr(found, '__module__', '')}.".startswith(packages)


def _found(path: str) -> Any:
    """What a dotted path leads to: a name in a module, or None if the module lacks it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _built(config: Any, classes: dict[str, type]) -> Any:
    if isinstance(config, list):
        return tuple(_built(item, classes) for item in config)
    if not isinstance(config, dict):
        return config
    target = str(config.get("_target_"))
    cls, renamed = classes[target], RENAMED.get(MOVED.get(target, target), {})
    arguments = {
        renamed.get(str(name), str(name)): _built(value, classes)
        for name, value in config.items()
        if name != "_target_"
    }
    if len(arguments) != len(config) - 1:
        raise UsageError(f"{cls.__name__} must have each argument once, got {shown(list(config))}")
    try:
        return cls(**arguments)
    except UsageError as error:
        raise UsageError(f"configuration of {cls.__name__}: {error}") from error
    except Exception as error:  # whatever a wrong type may provoke
        raise UsageError(f"configuration does not fit {cls.__name__}: {reason(error)}") from error


def upgrade_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of version 0.1 under today's names."""
    upgraded = {}
    for name, value in state.items():
        for pattern, replacement, transposed in RENAMED_WEIGHTS:
            if re.search(pattern, name):
                name = re.sub(pattern, replacement, name)
                value = value.t() if transposed else value
                break
        upgraded[name] = value
    return upgraded


class Pretrained(nn.Module, ModelHubMixin):
    """A module that can be written to a folder or to the Hub, and read back.

    The module keeps its constructor arguments in the dictionary `config`. `push_to_hub(repo_id)` is
    huggingface_hub's: it uploads what `save_pretrained` writes, and leaves the model card alone.
    """

    config: dict[str, Any]

    def to_config(self) -> dict[str, Any]:
        """The constructor arguments as plain containers.

        Raises:
            UsageError: if one of them cannot be described.
        """
        description = describe(self)
        assert isinstance(description, dict)
        return description

    @classmethod
    def from_config(cls: type[M], config: dict[str, Any], *, trusted: Collection[str] = ()) -> M:
        """A module with fresh weights.

        Args:
            config: what `to_config` returned.
            trusted: see `rolldiff.hub.build`.

        Raises:
            UsageError: if the configuration names a class that is neither public nor trusted, or
                describes something other than this class.
        """
        instance(config, dict, "config", "a dictionary")
        config, classes = _read(config, trusted)
        described = classes[str(config.get("_target_"))]
        if not issubclass(described, cls):
            raise UsageError(f"config must describe a {cls.__name__}, got a {described.__name__}")
        return _built(config, classes)

    def save_pretrained(
        self, folder: str | Path, *, config: Any = None, model_card_kwargs: Any = None
    ) -> None:
        """Write the weights and the configuration; each file appears whole or not at all.

        Beside the weights stands their SHA-256, which `from_pretrained` checks.

        Args:
            folder: the target, created if necessary.
            config: None; the module describes itself. `push_to_hub` passes it on.
            model_card_kwargs: None; no model card is written.

        Raises:
            UsageError: if a constructor argument cannot be described, before anything is written.
            OSError: if the folder cannot be written, or the disk is full.
        """
        if config is not None or model_card_kwargs is not None:
            raise UsageError(
                "config and model_card_kwargs must be None, because a decoder describes itself and "
                f"no card is written, got {shown(config)} and {shown(model_card_kwargs)}"
            )
        text = json.dumps(self.to_config(), indent=2) + "\n"
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        folder = _path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        # A single entry: with several, their order and so the bytes of the file would be random.
        metadata = {HASH: weights_hash(state)}
        with written_whole(folder / CONFIG) as config_part:
            config_part.write_text(text, encoding="utf-8")
            with written_whole(folder / WEIGHTS) as part:
                try:
                    save_file(state, part, metadata)
                except SafetensorError as error:
                    number = re.search(r"os error (\d+)", str(error))
                    code = int(number[1]) if number else errno.EIO
                    raise OSError(code, reason(error), str(folder / WEIGHTS)) from error

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_folder: str | Path,
        *,
        trusted: Collection[str] = (),
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> M:
        """Read what `save_pretrained` wrote, on the CPU and in evaluation mode.

        Args:
            name_or_folder: a folder, or else the name of a repository on the Hub.
            trusted: dotted names of classes of other libraries that the configuration may name,
                such as `("mypackage.MyBackbone",)`, or `("mypackage.",)` for all of a package.
            revision: branch, tag or commit of the repository.
            token: for a private repository; by default that of the logged-in user.
            cache_dir: where downloads are kept.
            force_download: download again what is in the cache.
            local_files_only: do not use the network.

        Raises:
            UsageError: if there is no such folder or repository, a file is missing, unreadable or
                damaged, the configuration names a class that is neither public nor trusted, or
                weights and configuration disagree. All of this is checked before a weight is
                copied.
        """
        folder = _path(name_or_folder, "name_or_folder")
        if not _is(folder, "dir"):
            try:
                folder = Path(
                    snapshot_download(
                        str(name_or_folder),
                        allow_patterns=[WEIGHTS, CONFIG],
                        revision=revision,
                        token=token,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                    )
                )
            except Exception as error:  # whatever the name, the network or the cache provokes
                raise UsageError(
                    "name_or_folder must be a folder or a repository that can be fetched, got "
                    f"{str(name_or_folder)!r}: {reason(error)}"
                ) from error
        for name in (WEIGHTS, CONFIG):
            if not _is(folder / name, "file"):
                raise UsageError(
                    f"a saved {cls.__name__.lower()} needs {WEIGHTS} and {CONFIG}, got "
                    f"{name_or_folder} without {name}"
                )
        config = read_config(folder / CONFIG)
        module = _built_for(cls, config, _header(folder / WEIGHTS), trusted=trusted, source=folder)
        return _load(module, _read_weights(folder / WEIGHTS), config=config, source=folder)


def read_checkpoint(path: str | Path, cls: type[M], *, trusted: Collection[str] = ()) -> M:
    """A module from a run folder, from a Lightning checkpoint of `rolldiff train`, or from the Hub.

    The averaged weights, where training averaged them. Nothing is unpickled but plain containers
    and tensors.

    Args:
        path: the folder or file; or, where neither exists, the name of a repository on the Hub.
        cls: what it must hold, such as `Decoder`.
        trusted: see `build`.

    Raises:
        UsageError: if there is nothing there, or it is damaged or not from this library.
    """
    name = str(path)
    path = _path(path, "ckpt")
    if _is(path, "dir"):
        return cls.from_pretrained(path, trusted=trusted)
    if not _is(path, "file"):
        # A name such as organisation/model, unless it begins with a folder that is here.
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.exists():
            return cls.from_pretrained(name, trusted=trusted)
        raise UsageError(
            f"ckpt must be a run folder, a checkpoint or a repository on the Hub, got {path}, "
            "which does not exist"
        )
    checkpoint = checkpoint_content(path)
    try:
        config = checkpoint["hyper_parameters"]["model"]
        weights = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
    except Exception as error:  # a tensor, for example, raises errors of many kinds
        raise UsageError(f"ckpt {path} is not a checkpoint of this library") from error
    for name, value in weights.items():
        if not (isinstance(value, Tensor) and value.layout == torch.strided) or value.is_meta:
            raise UsageError(f"ckpt {path}: {name} must be a dense tensor, got {type(value)}")
    module = _built_for(cls, config, weights, trusted=trusted, source=path)
    return _load(module, weights, config=config, source=path)


def checkpoint_content(path: Path) -> Any:
    """What a Lightning checkpoint holds: plain containers, and tensors that are mapped to the file.

    Raises:
        UsageError: if it is compressed, its checksums say that it is damaged, or it holds more.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UsageError(f"ckpt {path} must not be compressed, got a compressed archive")
            if (damaged := archive.testzip()) is not None:  # torch does not compare the checksums
                raise UsageError(f"ckpt {path} is damaged: {damaged} is not what was saved")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UsageError:
        raise
    except Exception as error:  # torch raises whatever the damage provokes
        raise UsageError(f"ckpt {path} is damaged or no checkpoint: {reason(error)}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a file of JSON, with finite numbers only.

    Raises:
        UsageError: if it cannot be read, is too long, or is not a dictionary in JSON.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} must have at most {MAX_BYTES} bytes, got more")
        config = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_repetition,
        )
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {reason(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} must hold a dictionary, got a {type(config).__name__}")
    check_plain(config, str(path))
    return config


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a name is repeated among {', '.join(name for name, _ in pairs)}")
    return values


def _path(path: Any, name: str) -> Path:
    instance(path, str | os.PathLike, name, "a path")
    if not str(path):
        raise UsageError(f"{name} must be a path, got an empty text")
    return Path(path)


def _is(path: Path, kind: str) -> bool:
    """Whether a path is a folder or a file; False if it cannot be one."""
    try:
        return path.is_dir() if kind == "dir" else path.is_file()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be entered
        return False


def _header(path: Path) -> dict[str, Tensor]:
    """The weights of a file as tensors without memory."""
    weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UsageError(
                        f"{path}: {name} must be floating point, got {part.get_dtype()}"
                    )
                weights[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except UsageError:
        raise
    except Exception as error:  # whatever the damage provokes
        raise UsageError(
            f"{path} is damaged, unreadable, or not a safetensors file: {reason(error)}"
        ) from error
    return weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            saved = (file.metadata() or {}).get(HASH)
        weights = load_file(path)
    except Exception as error:
        raise UsageError(
            f"{path} is damaged, unreadable, or not a safetensors file: {reason(error)}"
        ) from error
    if saved is not None and saved != weights_hash(weights):
        raise UsageError(f"{path} is damaged: its weights are not those that were saved")
    return weights


def _built_for(
    cls: type[M],
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    trusted: Collection[str] = (),
    source: Path,
) -> M:
    """A module for some weights, which are compared before there is memory for it."""
    try:
        weights = _upgraded(weights, instance(config, dict, "config", "a dictionary"))
        _, classes = _read(config, trusted)
        # Classes of other libraries need not work without memory, and the caller trusts them.
        if all(PUBLIC.get(MOVED.get(name, name)) for name in classes):
            with torch.device("meta"):
                skeleton = cls.from_config(config, trusted=trusted)
            _check_weights(weights, skeleton.state_dict(), source)
        module = cls.from_config(config, trusted=trusted)
    except UsageError as error:
        prefix = "" if str(source) in str(error) else f"{source}: "
        raise UsageError(f"{prefix}{error}") from error
    _check_weights(weights, module.state_dict(), source)
    return module


def _upgraded(weights: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
    check_plain(config)
    if any(str(target) in MOVED for target in _targets(config)):
        return upgrade_weights(weights)
    return weights


def _load(module: M, weights: Mapping[str, Tensor], *, config: dict[str, Any], source: Path) -> M:
    weights = _upgraded(weights, config)
    expected = module.state_dict()
    for name, value in weights.items():
        if value.is_floating_point() and not value.to(expected[name].dtype).isfinite().all():
            raise UsageError(f"{source}: weights must be finite, got NaN or infinity in {name}")
    module.load_state_dict(weights)
    return module.eval()


def _check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path
) -> None:
    """Refuse weights of other names, shapes or types than those of the configuration."""
    for name in sorted(weights.keys() | expected.keys()):
        shapes = [
            str(tuple(state[name].shape)) if name in state else "absent"
            for state in (weights, expected)
        ]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{source}: weights and configuration disagree: {name} is {shapes[0]} in the "
                f"weights and {shapes[1]} in the configuration"
            )
        found, wanted = weights[name].dtype, expected[name].dtype
        if found != wanted and not (found in FLOATS and wanted in FLOATS):
            kind = "floating point" if wanted in FLOATS else str(wanted)
            raise UsageError(f"{source}: {name} must be {kind}, got {found}")
    floats = {weights[name].dtype for name in weights if weights[name].dtype in FLOATS}
    if len(floats) > 1 and len({e.dtype for e in expected.values() if e.dtype in FLOATS}) == 1:
        names = ", ".join(sorted(map(str, floats)))
        raise UsageError(f"{source}: weights must be of one type, got {names}")
