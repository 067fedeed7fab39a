"""Commands to paste: settings in Hydra's grammar, quoted for the shell."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

__all__ = ["command_line", "setting"]

# What Hydra reads as text without quotes: nothing that is a number, a constant or a structure.
BARE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*", re.ASCII)
CONSTANTS = ("true", "false", "null", "nan", "inf")


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """`rolldiff COMMAND KEY=VALUE ...`, to be pasted into a POSIX shell.

    Args:
        command: `train`, `decode`, ….
        settings: values by key, see `setting`.
    """
    words = ["rolldiff", command, *(setting(key, value) for key, value in settings.items())]
    return " ".join(map(shlex.quote, words))


def setting(key: str, value: Any) -> str:
    """`KEY=VALUE` in the grammar of Hydra's overrides, still to be quoted for a shell.

    Args:
        key: the setting.
        value: text, a path, a number, a boolean, None, or a list of these. Text reaches the command
            as it is; `${…}` in it is not interpolated.
    """
    return f"{key}={_value(value)}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    text = str(value)
    if BARE.fullmatch(text) and text.lower() not in CONSTANTS and text.strip("."):
        return text
    # OmegaConf: a backslash keeps `${` as it is, and backslashes before it are doubled.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Hydra: the same for a quote, and for the end of the text, where the closing quote follows.
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"'{text}'"
