"""Saving and loading: a folder or a Hugging Face Hub repository with two files.

`model.safetensors` holds the weights, and `config.json` plain data: `_target_` dictionaries as
Hydra reads them, which name classes by the paths that users import them from (`rolldiff.Patches`).
Nothing is unpickled. Only the classes in `PUBLIC` are built, and those of other libraries that the
caller lists by their exact names; all names are looked up before anything is built.

Files written by earlier versions are read through three tables: `MOVED` (classes), `RENAMED`
(constructor arguments) and `RENAMED_WEIGHTS`.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rolldiff.errors import UsageError, reason

__all__ = ["Pretrained", "build", "describe", "read_checkpoint"]

M = TypeVar("M", bound="Pretrained")

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# The classes that a file may name: the path in the file, and where the class is defined.
PUBLIC = {
    "rolldiff.Decoder": "rolldiff.decoder.Decoder",
    "rolldiff.Patches": "rolldiff.diffusion.layout.Patches",
    "rolldiff.Rectified": "rolldiff.diffusion.process.Rectified",
    "rolldiff.Cosine": "rolldiff.diffusion.process.Cosine",
    "rolldiff.Transformer": "rolldiff.nn.transformer.Transformer",
    "rolldiff.Conditioning": "rolldiff.conditioning.Conditioning",
    "rolldiff.ClassLabels": "rolldiff.conditioning.ClassLabels",
    "rolldiff.TokenGrid": "rolldiff.conditioning.TokenGrid",
    "rolldiff.TokenSequence": "rolldiff.conditioning.TokenSequence",
    "rolldiff.TrainingDistribution": "rolldiff.diffusion.timesteps.TrainingDistribution",
    "rolldiff.DecodeConfig": "rolldiff.decoder.DecodeConfig",
    "rolldiff.Guidance": "rolldiff.nn.denoiser.Guidance",
    "rolldiff.AdamsBashforth2": "rolldiff.diffusion.sampler.AdamsBashforth2",
    "rolldiff.DDIM": "rolldiff.diffusion.sampler.DDIM",
    "rolldiff.Euler": "rolldiff.diffusion.sampler.Euler",
    "rolldiff.Heun": "rolldiff.diffusion.sampler.Heun",
    "rolldiff.Midpoint": "rolldiff.diffusion.sampler.Midpoint",
    "rolldiff.timesteps.CleanContext": "rolldiff.diffusion.timesteps.CleanContext",
    "rolldiff.timesteps.Independent": "rolldiff.diffusion.timesteps.Independent",
    "rolldiff.timesteps.LogitNormal": "rolldiff.diffusion.timesteps.LogitNormal",
    "rolldiff.timesteps.Mixture": "rolldiff.diffusion.timesteps.Mixture",
    "rolldiff.timesteps.OnSchedule": "rolldiff.diffusion.timesteps.OnSchedule",
    "rolldiff.timesteps.Shared": "rolldiff.diffusion.timesteps.Shared",
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
    "rolldiff.times.CleanContext": "rolldiff.timesteps.CleanContext",
    "rolldiff.times.Independent": "rolldiff.timesteps.Independent",
    "rolldiff.times.LogitNormal": "rolldiff.timesteps.LogitNormal",
    "rolldiff.times.Mixture": "rolldiff.timesteps.Mixture",
    "rolldiff.times.OnSchedule": "rolldiff.timesteps.OnSchedule",
    "rolldiff.times.Shared": "rolldiff.timesteps.Shared",
    "rolldiff.times.Uniform": "rolldiff.timesteps.Uniform",
    "rolldiff.training.Training": "rolldiff.TrainingDistribution",
}

# Constructor arguments that were called otherwise, by the public path of the class.
RENAMED = {
    "rolldiff.TokenGrid": {"codes": "codebook_size"},
    "rolldiff.TokenSequence": {"codes": "codebook_size"},
    "rolldiff.Transformer": {"recompute": "gradient_checkpointing"},
    "rolldiff.timesteps.Mixture": {"laws": "samplers"},
    "rolldiff.timesteps.OnSchedule": {"least": "min_overlap", "most": "max_overlap"},
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
        UsageError: if the part is neither, or its class is not at the top level of its module.
    """
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


def build(config: Any, *, trusted: Collection[str] = ()) -> Any:
    """The part that a description stands for; lists become tuples.

    Args:
        config: what `describe` returned, in this version or an earlier one.
        trusted: dotted names of classes of other libraries that it may name.

    Raises:
        UsageError: if it names any other class, before anything is built; or if it does not fit
            what it names.
    """
    if isinstance(trusted, str):
        raise UsageError(f"trusted must be a collection of dotted names, got the text {trusted!r}")
    classes = {str(target): _resolve(str(target), trusted) for target in _targets(config)}
    return _built(config, classes)


def _targets(config: Any) -> Iterator[Any]:
    """Every `_target_`, nested ones included."""
    if isinstance(config, dict):
        yield config.get("_target_")
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _targets(value)


def _resolve(target: str, trusted: Collection[str]) -> type:
    path = PUBLIC.get(MOVED.get(target, target)) or (target if target in trusted else None)
    if path is not None:
        module, _, name = path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError):  # no such module, or not a name of one
            cls = None
        if isinstance(cls, type):
            return cls
    raise UsageError(
        "_target_ must name a class of rolldiff, or one that the caller lists in trusted, "
        f"got {target!r}"
    )


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
    try:
        return cls(**arguments)
    except (AttributeError, RuntimeError, TypeError) as error:  # what a wrong type may provoke
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
        module = build(config, trusted=trusted)
        if not isinstance(module, cls):
            raise UsageError(f"config must describe a {cls.__name__}, got {config}")
        return module

    def save_pretrained(
        self, folder: str | Path, *, config: Any = None, model_card_kwargs: Any = None
    ) -> None:
        """Write the weights and the configuration; each file appears whole or not at all.

        Args:
            folder: the target, created if necessary.
            config: None; the module describes itself. `push_to_hub` passes it on.
            model_card_kwargs: None; no model card is written.

        Raises:
            UsageError: if a constructor argument cannot be described, before anything is written.
        """
        if config is not None or model_card_kwargs is not None:
            raise UsageError(
                "config and model_card_kwargs must be None, because a decoder describes itself and "
                f"no card is written, got {config} and {model_card_kwargs}"
            )
        text = json.dumps(self.to_config(), indent=2) + "\n"
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f"{WEIGHTS}.part")
        (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f"{name}.part", folder / name)

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
                such as `("mypackage.MyBackbone",)`.
            revision: branch, tag or commit of the repository.
            token: for a private repository; by default that of the logged-in user.
            cache_dir: where downloads are kept.
            force_download: download again what is in the cache.
            local_files_only: do not use the network.

        Raises:
            UsageError: if there is no such folder or repository, a file is missing or damaged, the
                configuration names a class that is neither public nor trusted, or weights and
                configuration disagree. All of this is checked before a weight is copied.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
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
            if not (folder / name).is_file():
                raise UsageError(
                    f"a saved decoder needs {WEIGHTS} and {CONFIG}, got {name_or_folder} "
                    f"without {name}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{folder / CONFIG} is not JSON: {reason(error)}") from error
        if not isinstance(config, dict):
            raise UsageError(f"{folder / CONFIG} must hold a dictionary, got {config!r}")
        try:
            weights = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{folder / WEIGHTS} is damaged or not a safetensors file: {reason(error)}"
            ) from error
        return _load(
            cls.from_config(config, trusted=trusted), weights, config=config, source=folder
        )


def read_checkpoint(path: str | Path, cls: type[M]) -> M:
    """A module from a run folder, or from a Lightning checkpoint of `rolldiff train`.

    The averaged weights, where training averaged them. Nothing is unpickled but plain containers
    and tensors.

    Args:
        path: the folder or file.
        cls: what it must hold, such as `Decoder`.

    Raises:
        UsageError: if there is nothing there, or it is damaged or not from this library.
    """
    path = Path(path)
    if path.is_dir():
        return cls.from_pretrained(path)
    if not path.is_file():
        raise UsageError(
            f"ckpt must be a run folder or a checkpoint, got {path}, which does not exist"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage provokes
        raise UsageError(f"ckpt {path} is damaged or no checkpoint: {reason(error)}") from error
    try:
        config = checkpoint["hyper_parameters"]["model"]
        weights = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"ckpt {path} is not a checkpoint of this library") from error
    return _load(cls.from_config(config), weights, config=config, source=path)


def _load(module: M, weights: Mapping[str, Tensor], *, config: dict[str, Any], source: Path) -> M:
    if any(target in MOVED for target in _targets(config)):
        weights = upgrade_weights(weights)
    if mismatch := _mismatch(weights, module.state_dict()):
        raise UsageError(f"{source}: weights and configuration disagree: {mismatch}")
    module.load_state_dict(weights)
    return module.eval()


def _mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first weight whose shape is not the configuration's, as a phrase."""
    for name in sorted(weights.keys() | expected.keys()):
        shapes = [
            str(tuple(state[name].shape)) if name in state else "absent"
            for state in (weights, expected)
        ]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in the weights and {shapes[1]} in the configuration"
    return None
