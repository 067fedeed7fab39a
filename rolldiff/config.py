"""Objects as plain data, and back: the same `_target_` dictionaries that Hydra reads.

Only classes of this library are ever built from data, so a configuration that came with somebody's
weights can name nothing else.
"""

import dataclasses
import importlib
from typing import Any

__all__ = ["build", "describe"]


def describe(part: Any) -> Any:
    """A part as plain containers; the inverse of `build`.

    A dataclass is described by its fields, another object by the dictionary `config` that it keeps
    of its own arguments.

    Raises:
        ValueError: if the part is neither, or its class is not of this library.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    if dataclasses.is_dataclass(part):
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    elif isinstance(getattr(part, "config", None), dict):
        fields = part.config
    else:
        raise ValueError(f"a configuration cannot hold a {type(part).__name__}")
    cls = type(part)
    target = f"{cls.__module__}.{cls.__qualname__}"
    _resolve(target)
    return {"_target_": target} | {name: describe(value) for name, value in fields.items()}


def build(config: Any) -> Any:
    """The part that a description stands for; lists become tuples.

    Raises:
        ValueError: if it names anything outside of this library, or does not fit what it names.
    """
    if isinstance(config, list):
        return tuple(build(item) for item in config)
    if not isinstance(config, dict):
        return config
    arguments = {name: build(value) for name, value in config.items() if name != "_target_"}
    cls = _resolve(config.get("_target_"))
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"configuration does not fit {cls.__name__}: {error}") from error


def _resolve(target: Any) -> Any:
    """The class of this library that a target names, by the module that defines it."""
    module, _, name = str(target).rpartition(".")
    if module.partition(".")[0] == "rolldiff":
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            cls = None
        if isinstance(cls, type) and cls.__module__ == module:
            return cls
    raise ValueError(f"_target_ must name a class of rolldiff, got {target!r}")
