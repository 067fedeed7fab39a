"""What a bench has written: `results.jsonl`, one line a cell, never changed; `timings.json`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rolldiff.bench.settings import Setting

__all__ = ["Results", "Timings", "setting_of"]

Row = dict[str, Any]
FIELDS = tuple(Setting.__dataclass_fields__)


class Results:
    """The finished cells of a run folder.

    Args:
        path: the file; it may be there already.
        same: what every line must agree on (checkpoint, reference, samples, seeds, features).

    Raises:
        ValueError: if a line was written for something else, or cannot be read.
    """

    def __init__(self, path: Path, *, same: Row) -> None:
        self.path, self.same = path, same
        self.rows: list[Row] = []
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} must hold a JSON object a line, got line {number}"
                ) from error
            for key, value in same.items():
                if row.get(key) != value:
                    raise ValueError(
                        f"run_dir must be empty or hold results of the same {key}, got "
                        f"{row.get(key)!r} in {path}, now {value!r}"
                    )
            self.rows.append(row)
        if whole != text:  # killed while it wrote: that cell is not done
            with path.open("r+", encoding="utf-8") as file:
                file.truncate(len(whole.encode()))

    def done(self) -> set[Setting]:
        """The settings that need not be measured again."""
        return {setting_of(row) for row in self.rows}

    def add(self, setting: Setting, row: Row) -> None:
        """Write a cell, down to the disk."""
        row = setting.as_dict() | row | self.same
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def setting_of(row: Row) -> Setting:
    """The setting that a line is about."""
    return Setting(**{name: row[name] for name in FIELDS})


class Timings:
    """How seconds grow with the steps, by setting: measured once, then read from a file.

    Args:
        path: the file.
        fitted: measures offset and slope.
    """

    def __init__(self, path: Path, *, fitted: Callable[[Setting], tuple[float, float]]) -> None:
        self.path, self.fitted = path, fitted
        self.kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, setting: Setting) -> tuple[float, float]:
        """Offset and slope, in seconds."""
        key = json.dumps(setting.as_dict())
        if key not in self.kept:
            self.kept[key] = self.fitted(setting)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.kept, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        offset, slope = self.kept[key]
        return offset, slope
