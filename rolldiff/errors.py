"""Errors and warnings that are meant for users, and the checks of plain numbers that raise them."""

import math
import operator
import sys
import warnings
from pathlib import Path
from typing import Any

from torch.utils import _contextlib as contextlib

__all__ = ["UsageError", "finite_number", "reason", "warn_user", "whole_number"]

# Frames that are not the user's: this package, torch's decorators, and generated code ("<string>").
SKIPPED = (str(Path(__file__).parent), str(Path(contextlib.__file__)), "<")


class UsageError(ValueError):
    """A mistake of the caller: the rule, the argument, and the value that broke the rule.

    The command line prints it as a single line. Any other exception is a defect, or comes from
    another library, and keeps its traceback.
    """


def whole_number(value: Any, name: str, *, minimum: int = 1, maximum: int | None = None) -> int:
    """A whole number as an `int`.

    Numbers of NumPy and torch are accepted where they are whole by type. Booleans, text and all
    floating-point numbers are refused, because they are seldom meant.

    Args:
        value: what a user passed.
        name: what the user calls it.
        minimum: the smallest allowed value.
        maximum: the largest; None for no limit.

    Raises:
        UsageError: if it is not a whole number in this range.
    """
    number = None
    if not _is_boolean(value):
        try:
            number = operator.index(value)
        except (TypeError, ValueError):  # torch raises ValueError for tensors of several numbers
            number = None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        allowed = f"of {minimum} or more" if maximum is None else f"in {minimum} … {maximum}"
        raise UsageError(f"{name} must be a whole number {allowed}, got {_shown(value)}")
    return number


def finite_number(
    value: Any,
    name: str,
    *,
    minimum: int | float | None = None,
    maximum: int | float | None = None,
) -> float:
    """A finite real number as a `float`; numbers of NumPy and torch are accepted.

    Args:
        value: what a user passed.
        name: what the user calls it.
        minimum: the smallest allowed value; None for no limit.
        maximum: the largest; None for no limit.

    Raises:
        UsageError: if it is not a finite number in this range, or is text or a boolean.
    """
    number = math.nan
    if not (_is_boolean(value) or isinstance(value, str | bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor
            number = math.nan
    above = minimum is None or number >= minimum
    below = maximum is None or number <= maximum
    if not (math.isfinite(number) and above and below):
        if minimum is not None and maximum is not None:
            allowed = f"a number in [{minimum:g}, {maximum:g}]"
        elif minimum is not None:
            allowed = f"a finite number of {minimum:g} or more"
        else:
            allowed = "a finite number"
        raise UsageError(f"{name} must be {allowed}, got {_shown(value)}")
    return number


def reason(error: BaseException) -> str:
    """The start of another library's error message on one line, or the error's type if it is empty.

    Some messages open with a heading, and torch's list every weight, so 200 characters are kept
    rather than the first line.
    """
    return " ".join(str(error).split())[:200] or type(error).__name__


def warn_user(message: str) -> None:
    """Warn at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(SKIPPED):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_boolean(value: Any) -> bool:
    dtype = str(getattr(value, "dtype", ""))  # of NumPy or torch, neither of which is imported here
    return isinstance(value, bool) or dtype in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
