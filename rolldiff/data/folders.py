"""`labelled_files`: the files in a folder whose subfolders are classes."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolldiff.errors import UsageError, reason

__all__ = ["FileKind", "existing_folder", "labelled_files", "named_folder"]


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """Which files count.

    Attributes:
        name: what they are called, such as "pictures".
        may_be: whether a file is listed; broken links too, so that they are told.
        is_one: whether a listed file makes its folder a class.
    """

    name: str
    may_be: Callable[[os.DirEntry[str]], bool]
    is_one: Callable[[str], bool]


def labelled_files(
    folder: str, kind: FileKind, left_out: Callable[[str], None]
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """All files of a kind in a folder and its subfolders with their classes, and the classes.

    Hidden files are left out. Links to folders are followed; a folder that is reached twice within
    one class is read once, so that loops end. The immediate subfolders with a file somewhere below
    are the classes, in the order of their names; files beside them are left out. Without such
    subfolders there are no classes, and every label is 0.

    Args:
        folder: the folder.
        kind: which files count.
        left_out: called with the rule that something breaks which is left out; it may raise.
    """
    stray, folders = _listed(folder, kind, left_out)
    below = {folder: _files(folder, kind, left_out) for folder in folders}
    classes = [folder for folder in folders if any(map(kind.is_one, below[folder]))]
    files = [(file, i) for i, folder in enumerate(classes) for file in below.pop(folder)]
    stray += [file for folder in below for file in below[folder]]
    if not classes:
        files = [(file, 0) for file in stray]
    elif stray:
        others = f" and {len(stray) - 1} others" if len(stray) > 1 else ""
        left_out(f"{kind.name} must be in the folder of a class, got {stray[0]}{others}")
    return files, tuple(os.path.basename(folder) for folder in classes)


def named_folder(path: Any, kind: str, *, name: str = "data.path") -> Path:
    """The folder that a user named; the empty text does not mean the working directory.

    Raises:
        UsageError: if it is no path.
    """
    if not isinstance(path, str | Path) or not str(path).strip():
        raise UsageError(f"{name} must be a folder of {kind}, got {path!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # nobody has this name
        raise UsageError(f"{name} must be a folder of {kind}, got {path}") from error


def existing_folder(folder: Path, kind: str, *, name: str = "data.path") -> str:
    """The path of a folder that exists.

    Raises:
        UsageError: if it does not.
    """
    try:
        found = folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        found = False
    if not found:
        raise UsageError(f"{name} must be a folder of {kind}, got {folder}")
    return str(folder)


def _files(folder: str, kind: FileKind, left_out: Callable[[str], None]) -> list[str]:
    """All files below a folder that may be of a kind, in the order of their paths."""
    found: list[str] = []
    waiting, seen = [folder], set()
    while waiting:
        path = waiting.pop()
        try:
            status = os.stat(path)
        except OSError as error:
            _unreadable(path, error, left_out)
            continue
        if (key := (status.st_dev, status.st_ino)) not in seen:
            seen.add(key)
            files, folders = _listed(path, kind, left_out)
            found += files
            waiting += folders
    return sorted(found, key=lambda file: file.split(os.sep))


def _listed(
    folder: str, kind: FileKind, left_out: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """The files in a folder that may be of a kind, and its subfolders; both sorted."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.path)
                elif kind.may_be(entry):
                    files.append(entry.path)
    except OSError as error:
        _unreadable(folder, error, left_out)
    return sorted(files), sorted(folders)


def _unreadable(folder: str, error: OSError, left_out: Callable[[str], None]) -> None:
    left_out(f"folders must be readable, got {folder}: {reason(error)}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link: either to itself, or to what cannot be read
        return error.errno != errno.ELOOP
