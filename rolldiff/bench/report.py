"""`report.md` and its pictures: made from the cells alone, whenever the bench ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rolldiff.bench.conclusions import AXES, Axis, Comparison, Point, comparisons, front, points
from rolldiff.bench.measure import Bench
from rolldiff.bench.plots import curves, matrices
from rolldiff.bench.results import setting_of
from rolldiff.bench.settings import Setting
from rolldiff.pictures import rows as picture_rows
from rolldiff.step import Step

__all__ = ["write_report"]

SHOWN = 16  # samples in a row of a picture
SAYS = {
    "several": "several groups",
    "one": "one group",
    "neither": "no difference beyond the spread",
    None: "one seed: no spread to tell by",
}


def write_report(
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    common: Bench,
    floors: Mapping[str, float],
    steps: Mapping[str, Step],
) -> None:
    """Write `report.md`, `cost*.png`, `samples_equal_*.png` and `matrices.png`."""
    distances = [extractor.distance for extractor in common.extractors.values()]
    main = distances[0]
    cells = points(rows, main)
    parts = [_head(rows[0], main, floors, common)]
    for manner, settings in _manners(cells).items():
        title = ", ".join(manner) or "top to bottom, Euler steps"
        file = "-".join(["cost", *(word.replace(" ", "_") for word in manner)]) + ".png"
        found = {d: [p for p in points(rows, d) if p.setting in settings] for d in distances}
        curves(found, folder / file, title=title, floors=floors)
        here = found[main]
        parts += [f"## {title[0].upper()}{title[1:]}\n", f"![{main} against cost]({file})\n"]
        for axis in AXES:
            parts += [_compared(here, axis), _fronts(here, axis)]
    if len(_manners(cells)) > 1:
        parts.append(_by_manner(cells))
    parts.append(_pictures(cells, folder, common, steps))
    parts.append(_every_cell(rows, distances, common))
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


def _head(row: dict[str, Any], main: str, floors: Mapping[str, float], common: Bench) -> str:
    halves = ", ".join(f"{name} {value:.3g}" for name, value in floors.items())
    return f"""# Quality against cost

Checkpoint `{row["ckpt"]}` ({row["checkpoint"]}), compared with {row["reference_images"]} images of
{row["data"]} ({row["reference"]}). {row["samples"]} samples for each of {len(row["seeds"])} seeds a
cell; sample `i` starts from the same noise{" and label" if common.label is not None else ""} in
every cell. {row["device"]}, {row["threads"]} threads, {row["processes"]} process(es), torch
{row["versions"]["torch"]}; seconds are for a batch of {row["batch_size"]}.

Conclusions are drawn from `{main}`. Two random halves of the data are apart by {halves}: halves are
smaller sets than what is compared here, so a distance below that is no wonder, and says nothing of
images that were never trained on.

Costs are three: network calls in series (NFE), token evaluations, seconds. Grouping spends more
calls on fewer tokens each, so what holds at equal tokens need not hold at equal NFE.
A difference counts where it is more than twice the spread of the two means over the seeds.
"""


def _manners(cells: Sequence[Point]) -> dict[tuple[str, ...], set[Setting]]:
    """Settings by order, step rule and guidance; one group, which has no order, is in each."""
    found: dict[tuple[str, ...], set[Setting]] = {}
    for cell in cells:
        if cell.setting.num_groups > 1:
            found.setdefault(tuple(cell.setting.manner()), set()).add(cell.setting)
    for cell in cells:
        if cell.setting.num_groups == 1:
            own = {manner for manner, settings in found.items() if _alike(settings, cell.setting)}
            for manner in own or {tuple(cell.setting.manner())}:
                found.setdefault(manner, set()).add(cell.setting)
    return found


def _alike(settings: set[Setting], one: Setting) -> bool:
    some = next(iter(settings))
    return (some.step, some.guidance) == (one.step, one.guidance)


def _compared(cells: Sequence[Point], axis: Axis) -> str:
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


def _fronts(cells: Sequence[Point], axis: Axis) -> str:
    lines = [
        f"The best at each budget ({axis}); nothing cheaper is better:\n",
        f"| {AXES[axis]} | distance | setting |",
        "|---|---|---|",
    ]
    for cell in front(cells, axis):
        cost = _cost(cell.cost(axis), axis)
        lines.append(f"| {cost} | {_value(cell)} | {cell.setting.words()} |")
    return "\n".join(lines) + "\n"


def _by_manner(cells: Sequence[Point]) -> str:
    lines = [
        "## By order, step rule and guidance\n",
        "The best cell of several groups:\n",
        "| order, step rule, guidance | distance | setting |",
        "|---|---|---|",
    ]
    for manner, settings in _manners(cells).items():
        several = [c for c in cells if c.setting in settings and c.setting.num_groups > 1]
        if several:
            best = min(several, key=lambda c: c.mean)
            name = ", ".join(manner) or "top_to_bottom, euler"
            lines.append(f"| {name} | {_value(best)} | {best.setting.words()} |")
    return "\n".join(lines) + "\n"


def _pictures(
    cells: Sequence[Point], folder: Path, common: Bench, steps: Mapping[str, Step]
) -> str:
    shown = ["## Samples\n"]
    usual = next(iter(_manners(cells).values()))
    here = [cell for cell in cells if cell.setting in usual]
    one = [cell for cell in here if cell.setting.num_groups == 1] or here
    for axis in ("nfe", "tokens"):
        budget = max(cell.cost(axis) for cell in one)
        page = {"data": common.image[:SHOWN]}
        for num_groups in sorted({cell.setting.num_groups for cell in here}):
            able = [
                c
                for c in here
                if c.setting.num_groups == num_groups and c.cost(axis) <= 1.1 * budget
            ]
            if able:
                cell = max(able, key=lambda c: (c.cost(axis), -c.mean))
                step = steps[cell.setting.step]
                decoded = common.decode(cell.setting, step, seed=common.seeds[0], count=SHOWN)
                page[f"{cell.setting.words()}: {axis} {cell.cost(axis):g}"] = decoded.image.cpu()
        file = f"samples_equal_{axis}.png"
        picture_rows(page).save(folder / file)
        shown.append(
            f"At {axis} {budget:g}, or as near below as was measured:\n\n![samples]({file})\n"
        )
    shapes = sorted({(c.setting.num_groups, c.setting.overlap) for c in here})
    middle = sorted({cell.setting.steps for cell in here})
    matrices(shapes, middle[len(middle) // 2], folder / "matrices.png")
    shown.append("## When each group moves\n\n![scheduling matrices](matrices.png)\n")
    return "\n".join(shown)


def _every_cell(rows: Sequence[dict[str, Any]], distances: Sequence[str], common: Bench) -> str:
    others = [f"{kind}_{name}" for name in common.extractors for kind in ("precision", "recall")]
    names = [*distances, *(f"kd_{name}" for name in common.extractors), *others, "seams"]
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
