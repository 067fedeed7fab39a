"""Errors and warnings that are meant for users."""

import sys
import warnings
from pathlib import Path

from torch.utils import _contextlib as contextlib

__all__ = ["UsageError", "reason", "warn_user"]

# Frames that are not the user's: this package, torch's decorators, and generated code ("<string>").
SKIPPED = (str(Path(__file__).parent), str(Path(contextlib.__file__)), "<")


class UsageError(ValueError):
    """A mistake of the caller: the rule, the argument, and the value that broke the rule.

    The command line prints it as a single line. Any other exception is a defect, or comes from
    another library, and keeps its traceback.
    """


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
