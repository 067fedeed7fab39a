"""The number that a sweep searches by: a dotted name in the nested numbers that a job reports."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from rolldiff.errors import UsageError, known_names

__all__ = ["FD_PIXELS", "check_objective", "flat", "is_better_larger", "objective"]

FD_PIXELS = "fd_pixels"  # what is searched by unless something else is named

LARGER = frozenset({"psnr"})  # better when larger; all distances are better when smaller


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | None]:
    """The numbers of nested dictionaries by dotted names; None for one that could not be measured.

    Text, lists and booleans are left out.
    """
    found: dict[str, int | float | None] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[f"{prefix}{name}"] = value
    return found


def objective(values: Mapping[str, Any], name: str) -> float:
    """The number of a name, or the smallest of a group such as `fd_pixels`.

    Args:
        values: what a job reports.
        name: such as `fd_pixels.4` or `seconds`.

    Returns:
        The number; infinity if it could not be measured, as of too few images.

    Raises:
        UsageError: if there is no such name.
    """
    numbers = flat(values)
    check_objective(name, numbers)
    found = [n for key, n in numbers.items() if key == name or key.startswith(f"{name}.")]
    return min((float(number) for number in found if number is not None), default=math.inf)


def check_objective(name: Any, numbers: Collection[str]) -> None:
    """Refuse a name that is neither a number nor a group of numbers.

    Args:
        name: what a user set as `optimized_metric`.
        numbers: the dotted names of all numbers.

    Raises:
        UsageError: if there is no such name.
    """
    if not isinstance(name, str):
        raise UsageError(f"optimized_metric must be a name such as {FD_PIXELS}, got {name!r}")
    parts = [number.split(".") for number in numbers]
    groups = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    known_names([name], [*sorted(groups), *numbers], "optimized_metric")


def is_better_larger(name: str) -> bool:
    """Whether a larger number is better, such as a PSNR."""
    return name.partition(".")[0] in LARGER
