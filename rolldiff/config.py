"""Objects as plain data, and back: the same `_target_` dictionaries that Hydra reads.

Only classes of this library are built from data, and those that the caller lists by their exact
names. All names are looked up before anything is built, so a configuration that came with
somebody's weights runs nothing else.
"""

import dataclasses
import importlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

from rolldiff.errors import reason

__all__ = ["build", "describe"]


def describe(part: Any) -> Any:
    """A part as plain containers; the inverse of `build`.

    A dataclass is described by its fields, another object by the dictionary `config` that it keeps
    of its own arguments. Its class may be of another library: then `build` must be told to trust
    it.

    Raises:
        ValueError: if the part is neither, or its class is not found by its name in its module.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    cls = type(part)
    if dataclasses.is_dataclass(part):
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    elif isinstance(getattr(part, "config", None), dict):
        fields = part.config
    else:
        raise ValueError(f"a configuration cannot hold a {cls.__name__}")
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise ValueError(
            "a configuration cannot hold an object whose class is not at the top of its module, "
            f"got a {cls.__qualname__} of {cls.__module__}"
        )
    target = f"{cls.__module__}.{cls.__qualname__}"
    return {"_target_": target} | {name: describe(value) for name, value in fields.items()}


def build(config: Any, *, trusted: Collection[str] = ()) -> Any:
    """The part that a description stands for; lists become tuples.

    Args:
        config: what `describe` returned.
        trusted: dotted names of classes of other libraries that it may name, as it spells them.

    Raises:
        ValueError: if it names any other class, before anything is built; or if it does not fit
            what it names.
    """
    if isinstance(trusted, str):
        raise ValueError(f"trusted must be a collection of dotted names, got the text {trusted!r}")
    classes = {str(target): _resolve(str(target), trusted) for target in _targets(config)}
    return _built(config, classes)


def _targets(config: Any) -> Iterator[Any]:
    """Every `_target_`, also of what is inside."""
    if isinstance(config, dict):
        yield config.get("_target_")
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _targets(value)


def _built(config: Any, classes: dict[str, type]) -> Any:
    if isinstance(config, list):
        return tuple(_built(item, classes) for item in config)
    if not isinstance(config, dict):
        return config
    arguments = {n: _built(value, classes) for n, value in config.items() if n != "_target_"}
    cls = classes[str(config.get("_target_"))]
    try:
        return cls(**arguments)
    except (AttributeError, RuntimeError, TypeError) as error:  # what a wrong type may provoke
        raise ValueError(f"configuration does not fit {cls.__name__}: {reason(error)}") from error


def _resolve(target: str, trusted: Collection[str]) -> type:
    """The class that a target names, by the module that defines it."""
    module, _, name = target.rpartition(".")
    # To import a __main__ would be to run it.
    ours = module.split(".")[0] == "rolldiff" and not module.endswith("__main__")
    if ours or target in trusted:
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except (ModuleNotFoundError, ValueError):  # no such module, or no name of one
            cls = None
        if isinstance(cls, type) and (target in trusted or cls.__module__ == module):
            return cls
    raise ValueError(
        "_target_ must name a class of rolldiff, or one that the caller lists in trusted, "
        f"got {target!r}"
    )
