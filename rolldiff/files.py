"""Files that appear whole or not at all, and folders that one job at a time writes to.

A file is written beside its target under the name `.part-HOST-PID-NAME`, flushed to the disk, and
renamed. A job that is killed leaves such a part behind; the next one that writes the same target on
that host removes it.
"""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rolldiff.errors import UsageError

__all__ = [
    "LOCK",
    "is_running",
    "locked",
    "refuse_links",
    "remove_parts",
    "write_text",
    "written_whole",
]

LOCK = ".lock"
PREFIX = ".part-"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, which replaces `path` when the block ends without an error.

    The file gets the permissions that the process's umask gives to a new one. A link at `path` is
    replaced, not followed.

    Args:
        path: the target, in a folder that exists.

    Raises:
        OSError: if the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    host = platform.node().replace("/", "-")
    _remove_parts_of_the_dead(path, host)
    part = path.with_name(f"{PREFIX}{host}-{os.getpid()}-{path.name}")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # some libraries write a private file and rename it
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, see `written_whole`."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_parts(folder: Path) -> None:
    """Remove all unfinished files of killed jobs in a folder and below; the folder must be locked.

    Links to other folders are not followed.
    """
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if name.startswith(PREFIX) and (Path(parent) / name).is_file():
                (Path(parent) / name).unlink()


def refuse_links(*paths: Path) -> None:
    """Refuse to write to what is a link, in a folder that may be somebody else's.

    Raises:
        UsageError: if one of the paths is a link.
    """
    for path in paths:
        if path.is_symlink():
            raise UsageError(
                f"results must not be written through a link, got {path}, which leads to "
                f"{os.readlink(path)}; say run_dir=FOLDER"
            )


@contextmanager
def locked(folder: Path, *, name: str = "run_dir") -> Iterator[None]:
    """Hold a folder for this process, so that two jobs never write to it at the same time.

    The lock ends with the process, even if that is killed. The file `.lock` stays.

    Args:
        folder: the folder, which exists.
        name: what the user calls it.

    Raises:
        UsageError: if another process holds it.
        OSError: if the folder cannot be written.
    """
    refuse_links(folder / LOCK)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"{name} must be a folder that no other job is writing to, got {folder}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _remove_parts_of_the_dead(path: Path, host: str) -> None:
    start, end = f"{PREFIX}{host}-", f"-{path.name}"
    for name in os.listdir(path.parent):
        if name.startswith(start) and name.endswith(end):
            pid = name[len(start) : -len(end)]
            if pid.isdigit() and not is_running(int(pid)):
                (path.parent / name).unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if sys.platform == "win32":  # there, os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
