"""Errors and warnings that are meant for users, and the checks of plain values that raise them."""

import difflib
import math
import operator
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _contextlib as contextlib

__all__ = [
    "UsageError",
    "boolean",
    "dense_tensor",
    "finite_number",
    "instance",
    "known_names",
    "reason",
    "sequence",
    "shown",
    "warn_user",
    "whole_number",
    "whole_numbers",
]

# Frames that are not the user's: this package, torch's decorators, and generated code ("<string>").
SKIPPED = (str(Path(__file__).parent), str(Path(contextlib.__file__)), "<")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
WHOLE = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class UsageError(ValueError):
    """A mistake of the caller: the rule, the argument, and the value that broke the rule.

    The command line prints it as a single line. Any other exception is a defect, or comes from
    another library, and keeps its traceback.

    Args:
        message: a sentence; what it quotes of a file or a value may hold line breaks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


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
        raise UsageError(f"{name} must be a whole number {allowed}, got {shown(value)}")
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
    # NumPy turns texts, complex numbers and arrays of one number into a float, some with a warning.
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    plain = kind in "fiu" and getattr(value, "ndim", 0) == 0
    if plain and not (_is_boolean(value) or isinstance(value, str | bytes)):
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
        raise UsageError(f"{name} must be {allowed}, got {shown(value)}")
    return number


def whole_numbers(
    value: Any, name: str, *, minimum: int = 1, maximum: int | None = None
) -> tuple[int, ...]:
    """Several whole numbers, in a list, a tuple, an array or a tensor; see `whole_number`.

    Args:
        value: what a user passed.
        name: what the user calls it.
        minimum: the smallest allowed value.
        maximum: the largest; None for no limit.

    Raises:
        UsageError: if it is not a sequence, or something in it is not such a number.
    """
    each = f"each of {name}"
    return tuple(
        whole_number(item, each, minimum=minimum, maximum=maximum)
        for item in sequence(value, name, "whole numbers")
    )


def sequence(value: Any, name: str, of: str) -> list[Any]:
    """What a list, a tuple, or an array or tensor of one dimension holds; not text.

    Args:
        value: what a user passed.
        name: what the user calls it.
        of: what it should hold, such as "whole numbers".

    Raises:
        UsageError: if it is something else.
    """
    plain = isinstance(value, Collection) and not isinstance(
        value, str | bytes | bytearray | Mapping | Set
    )
    if not plain or getattr(value, "ndim", 1) != 1 or getattr(value, "is_meta", False):
        raise UsageError(f"{name} must be a sequence of {of}, got {shown(value)}")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def boolean(value: Any, name: str) -> bool:
    """True or False as a `bool`; those of NumPy are accepted, numbers and text are not.

    Raises:
        UsageError: if it is neither.
    """
    if not (_is_boolean(value) and getattr(value, "ndim", 0) == 0):
        raise UsageError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def instance(value: Any, kinds: Any, name: str, expected: str) -> Any:
    """The value itself, if it is an instance of a class or of one of several.

    Args:
        value: what a user passed.
        kinds: as in `isinstance`.
        name: what the user calls it.
        expected: what would be right, such as "a Solver such as Euler()".

    Raises:
        UsageError: if it is not.
    """
    if isinstance(value, type) or not isinstance(value, kinds):
        raise UsageError(f"{name} must be {expected}, got {shown(value)}")
    return value


def known_names(given: Iterable[Any], allowed: Collection[str], of: str) -> None:
    """Refuse names that do not exist, and say which are near.

    Args:
        given: the names that a user passed.
        allowed: those that exist.
        of: what they are called, such as "arguments of decode".

    Raises:
        UsageError: if one of them does not exist.
    """
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{of} must be among {', '.join(allowed)}, got {name!r}{hint}")


def dense_tensor(value: Any, name: str, dtypes: Collection[torch.dtype] = FLOATS) -> Tensor:
    """The value itself, if it is a tensor of one of some types that holds its numbers in memory.

    Args:
        value: what a user passed.
        name: what the user calls it.
        dtypes: `FLOATS`, `WHOLE` or others.

    Raises:
        UsageError: if it is another object, such as a NumPy array, or a tensor of another kind.
    """
    if not isinstance(value, Tensor):
        hint = "; convert it by torch.from_numpy" if hasattr(value, "__array__") else ""
        raise UsageError(f"{name} must be a tensor, got a {type(value).__name__}{hint}")
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        kind = "meta" if value.is_meta else str(value.layout)
        raise UsageError(f"{name} must be a dense tensor, got a {kind} tensor")
    if value.dtype not in dtypes:
        words = {FLOATS: "be floating point", WHOLE: "hold whole numbers"}
        expected = words.get(tuple(dtypes)) or f"have type {' or '.join(map(str, dtypes))}"
        raise UsageError(f"{name} must {expected}, got {value.dtype}")
    return value


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
    dtype = str(getattr(value, "dtype", ""))  # of NumPy or torch
    return isinstance(value, bool) or dtype in ("bool", "torch.bool")


def shown(value: Any) -> str:
    """A value in at most 100 characters, for an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
