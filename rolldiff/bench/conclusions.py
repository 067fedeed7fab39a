"""What the cells say: the best setting at each cost, and one group against several.

A difference counts where it is more than twice the spread of the two means over the seeds. That is
a rule of thumb: with three seeds the spread itself is uncertain, and the best of many settings is a
little better than it would be if it were drawn again.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rolldiff.bench.measure import Bench
from rolldiff.bench.results import setting_of
from rolldiff.bench.settings import Setting
from rolldiff.evaluation.metrics import frechet_distance, kernel_distance
from rolldiff.report import halves

__all__ = [
    "AXES",
    "Axis",
    "Comparison",
    "Point",
    "best",
    "comparisons",
    "floors",
    "front",
    "points",
    "prices",
]

Axis = Literal["nfe", "tokens", "seconds"]
AXES: dict[Axis, str] = {
    "nfe": "network calls in series (NFE)",
    "tokens": "token evaluations an image",
    "seconds": "seconds a batch",
}
Verdict = Literal["several", "one", "neither"]


@dataclass(frozen=True)
class Point:
    """A cell, as far as one metric is concerned. `std` is over seeds; None with one seed."""

    setting: Setting
    nfe: int
    tokens: int
    seconds: float
    mean: float
    std: float | None

    def cost(self, axis: Axis) -> float:
        """Its cost on an axis."""
        return float(getattr(self, axis))


@dataclass(frozen=True)
class Comparison:
    """The best of one group and the best of several groups, at no more than a budget."""

    budget: float
    one: Point
    several: Point

    @property
    def verdict(self) -> Verdict | None:
        """Which is better beyond the spread; None where there is no spread to tell by."""
        if self.one.std is None or self.several.std is None:
            return None
        difference = self.several.mean - self.one.mean
        if abs(difference) <= 2 * math.hypot(self.one.std, self.several.std):
            return "neither"
        return "several" if difference < 0 else "one"


def points(rows: Iterable[dict[str, Any]], metric: str) -> list[Point]:
    """The cells that have a metric."""
    return [
        Point(
            setting_of(row),
            row["nfe"],
            row["tokens"],
            row["seconds"],
            row["metrics"][metric]["mean"],
            row["metrics"][metric]["std"],
        )
        for row in rows
        if metric in row["metrics"]
    ]


def front(cells: Sequence[Point], axis: Axis) -> list[Point]:
    """The cells that no cheaper cell beats, from the cheapest on."""
    best: list[Point] = []
    for cell in sorted(cells, key=lambda c: (c.cost(axis), c.mean)):
        if not best or cell.mean < best[-1].mean:
            best.append(cell)
    return best


def comparisons(cells: Sequence[Point], axis: Axis) -> list[Comparison]:
    """One group against several, at each cost at which one of the two sides gets better."""
    one = front([cell for cell in cells if cell.setting.num_groups == 1], axis)
    several = front([cell for cell in cells if cell.setting.num_groups > 1], axis)
    found = []
    for budget in sorted({cell.cost(axis) for cell in [*one, *several]}):
        within = [[c for c in side if c.cost(axis) <= budget] for side in (one, several)]
        if all(within):
            found.append(Comparison(budget, within[0][-1], within[1][-1]))
    return found


def best(cells: Sequence[Point]) -> Comparison | None:
    """The best of one group and the best of several, whatever they cost."""
    one, several = (
        min(
            (c for c in cells if (c.setting.num_groups > 1) is many),
            key=lambda c: c.mean,
            default=None,
        )
        for many in (False, True)
    )
    return None if one is None or several is None else Comparison(math.inf, one, several)


def prices(cells: Sequence[Point]) -> dict[tuple[int, float], list[float]]:
    """For each number of groups and overlap, seconds over those of one group at equal steps."""
    one = {_steps(c): c.seconds for c in cells if c.setting.num_groups == 1}
    found: dict[tuple[int, float], list[float]] = {}
    for cell in sorted(cells, key=lambda c: (c.setting.num_groups, c.setting.overlap)):
        if cell.setting.num_groups > 1 and _steps(cell) in one:
            ratios = found.setdefault((cell.setting.num_groups, cell.setting.overlap), [])
            ratios.append(cell.seconds / one[_steps(cell)])
    return found


def _steps(cell: Point) -> tuple[int, str, float]:
    return cell.setting.steps, cell.setting.step, cell.setting.guidance


def floors(common: Bench, *, splits: int = 5) -> dict[str, float]:
    """The distances between two random halves of the data, means over some splits."""
    found = {}
    for name, extractor in common.extractors.items():
        features = common.features[name]
        totals = [0.0, 0.0]
        for a, b in halves(features, splits):
            totals[0] += float(frechet_distance(a, b)) / splits
            totals[1] += float(kernel_distance(a[: common.pairs], b[: common.pairs])) / splits
        found[extractor.distance_name], found[f"kd_{name}"] = totals
    return found
