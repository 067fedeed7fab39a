"""The tables of a report, in Markdown; an empty string where there is nothing to say."""

from collections.abc import Mapping, Sequence
from typing import Any

from rolldiff.bench.conclusions import (
    AXES,
    Axis,
    Comparison,
    Point,
    best,
    comparisons,
    front,
    prices,
)
from rolldiff.bench.results import setting_of
from rolldiff.bench.settings import Setting, groups_in_words

__all__ = ["by_manner", "compared", "every_cell", "fronts", "of_the_best", "of_the_price"]

SAYS = {
    "several": "several groups",
    "one": "one group",
    "neither": "no difference beyond the spread",
    None: "one seed: no spread to tell by",
}


def of_the_best(cells: Sequence[Point]) -> str:
    """One group and several, each at its best."""
    found = best(cells)
    if found is None:
        return ""
    lines = [
        "## The best, at any cost\n",
        f"Better: {SAYS[found.verdict]}. The best of many settings is a little better than it "
        "would be if it were drawn again.\n",
        "| | distance | setting | NFE | tokens | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in (("one group", found.one), ("several groups", found.several)):
        costs = " | ".join(_cost(cell.cost(axis), axis) for axis in AXES)
        lines.append(f"| {name} | {_value(cell)} | {cell.setting.words()} | {costs} |")
    return "\n".join(lines) + "\n"


def of_the_price(cells: Sequence[Point]) -> str:
    """Seconds over those of one group."""
    found = prices(cells)
    if not found:
        return ""
    lines = [
        "## What grouping costs\n",
        "Seconds over those of one group, at equal steps a group; the least and the most over the "
        "steps, orders, step rules and guidances measured:\n",
        "| groups | seconds over one group |",
        "|---|---|",
    ]
    for (num_groups, overlap), ratios in found.items():
        low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
        words = low if low == high else f"{low} … {high}"
        lines.append(f"| {groups_in_words(num_groups, overlap)} | {words} |")
    return "\n".join(lines) + "\n"


def compared(cells: Sequence[Point], axis: Axis) -> str:
    """One group against several, at each cost."""
    found = comparisons(cells, axis)
    if not found:
        return (
            f"### At equal {axis}\n\nOne group or several are missing, so there is no comparison.\n"
        )
    lines = [
        f"### At equal {axis}\n",
        _in_words(found, axis) + "\n",
        f"One group was measured up to {_most(cells, axis)}; several groups further up are "
        "compared with the best of it.\n",
        f"| {AXES[axis]}, at most | one group | several groups | the best of them | better |",
        "|---|---|---|---|---|",
    ]
    for c in found:
        one = f"{_value(c.one)} ({c.one.setting.steps} steps)"
        values = f"{one} | {_value(c.several)} | {c.several.setting.words()}"
        lines.append(f"| {_cost(c.budget, axis)} | {values} | {SAYS[c.verdict]} |")
    return "\n".join(lines) + "\n"


def _most(cells: Sequence[Point], axis: Axis) -> str:
    return _cost(max(c.cost(axis) for c in cells if c.setting.num_groups == 1), axis)


def _in_words(found: Sequence[Comparison], axis: Axis) -> str:
    told = []
    for verdict, says in SAYS.items():
        budgets = [_cost(c.budget, axis) for c in found if c.verdict == verdict]
        if budgets:
            told.append(f"{says} at {', '.join(budgets)}")
    return f"Better at equal {axis}: " + "; ".join(told) + "."


def fronts(cells: Sequence[Point], axis: Axis) -> str:
    """The settings that nothing cheaper beats."""
    lines = [
        f"The best at each budget ({axis}); nothing cheaper is better:\n",
        f"| {AXES[axis]} | distance | setting |",
        "|---|---|---|",
    ]
    for cell in front(cells, axis):
        cost = _cost(cell.cost(axis), axis)
        lines.append(f"| {cost} | {_value(cell)} | {cell.setting.words()} |")
    return "\n".join(lines) + "\n"


def by_manner(cells: Sequence[Point], manners: Mapping[tuple[str, ...], set[Setting]]) -> str:
    """The best of several groups for each order, step rule and guidance."""
    lines = [
        "## By order, step rule and guidance\n",
        "The best cell of several groups:\n",
        "| order, step rule, guidance | distance | setting |",
        "|---|---|---|",
    ]
    for manner, settings in manners.items():
        several = [c for c in cells if c.setting in settings and c.setting.num_groups > 1]
        if several:
            best = min(several, key=lambda c: c.mean)
            name = ", ".join(manner) or "top_to_bottom, euler"
            lines.append(f"| {name} | {_value(best)} | {best.setting.words()} |")
    return "\n".join(lines) + "\n"


def every_cell(
    rows: Sequence[dict[str, Any]], extractors: Sequence[str], *, distances: Sequence[str]
) -> str:
    """All costs and metrics of all cells."""
    others = [f"{kind}_{name}" for name in extractors for kind in ("precision", "recall")]
    names = [*distances, *(f"kd_{name}" for name in extractors), *others, "seams"]
    costs = ["nfe", "tokens", "MFLOP an image", "seconds", "to the first group"]
    lines = [
        "## Every cell\n",
        "Means over the seeds with their standard deviation; `results.jsonl` has every seed, and "
        "`by_band`, the distance in pixel space of each quarter from the top down.\n",
        "| setting | " + " | ".join([*costs, *names]) + " |",
        "|---" * (1 + len(costs) + len(names)) + "|",
    ]
    for row in sorted(rows, key=_as_sorted):
        seconds = f"{row['seconds']:.3g} | {row['seconds_to_first_group']:.3g}"
        counts = f"{row['nfe']} | {row['tokens']} | {row['flops'] / 1e6:.4g} | {seconds}"
        values = " | ".join(_metric(row["metrics"].get(name)) for name in names)
        lines.append(f"| {setting_of(row).words()} | {counts} | {values} |")
    return "\n".join(lines) + "\n"


def _as_sorted(row: dict[str, Any]) -> tuple[Any, ...]:
    setting = setting_of(row)
    return (setting.manner(), setting.num_groups, setting.overlap, setting.steps)


def _metric(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    spread = "" if found["std"] is None else f" ± {found['std']:.2g}"
    return f"{found['mean']:.4g}{spread}"


def _value(cell: Point) -> str:
    return _metric({"mean": cell.mean, "std": cell.std})


def _cost(value: float, axis: Axis) -> str:
    return f"{value:.3g}" if axis == "seconds" else f"{value:,.0f}"
