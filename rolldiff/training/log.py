"""`CSVLog`: metrics as a table, which a resumed training continues."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rolldiff.files import written_whole

__all__ = ["CSVLog"]


class CSVLog(Logger):
    """Writes `metrics.csv`, a row per call and a column per metric.

    Rows are appended at once, so a killed training keeps them. When a training is resumed, the rows
    of the steps that it repeats are dropped. Lightning's own CSV logger deletes the earlier file.

    Args:
        folder: where the file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """They are in the run's `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {name: float(value) for name, value in metrics.items()}
        names = ["step", *row]
        if self._columns is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(names, before=step)
        elif not set(names) <= set(self._columns):
            self._rewrite(names)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns or names).writerow({"step": step} | row)

    def _rewrite(self, names: list[str], *, before: int | None = None) -> None:
        """Write the file anew with more columns, and only with the rows before a step."""
        rows: list[dict[str, str]] = []
        columns: list[str] = []
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]  # without a row that a killed job began
            reader = csv.DictReader(complete.splitlines())
            rows, columns = list(reader), list(reader.fieldnames or ())
        if before is not None:
            rows = [row for row in rows if _is_before(row.get("step"), before)]
        self._columns = [*columns, *(name for name in names if name not in columns)]
        with written_whole(self.path) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def _is_before(step: str | None, limit: int) -> bool:
    return step is not None and step.isdecimal() and int(step) < limit
