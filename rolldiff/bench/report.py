"""`report.md` and its pictures: made from the cells alone, whenever the bench ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rolldiff.bench.conclusions import AXES, Point, points
from rolldiff.bench.measure import Bench
from rolldiff.bench.plots import curves, matrices
from rolldiff.bench.settings import Setting
from rolldiff.bench.tables import by_manner, compared, every_cell, fronts, of_the_best, of_the_price
from rolldiff.evaluation.images import labelled_rows
from rolldiff.step import Step

__all__ = ["write_report"]

SHOWN = 16  # samples in a row of a picture


def write_report(
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    common: Bench,
    floors: Mapping[str, float],
    steps: Mapping[str, Step],
) -> None:
    """Write `report.md`, `cost*.png`, `samples_equal_*.png` and `matrices.png`."""
    distances = [extractor.distance_name for extractor in common.extractors.values()]
    main = distances[0]
    cells = points(rows, main)
    manners = _manners(cells)
    parts = [_head(rows[0], main, floors, common), of_the_best(cells), of_the_price(cells)]
    for manner, settings in manners.items():
        title = ", ".join(manner) or "top to bottom, Euler steps"
        file = "-".join(["cost", *(word.replace(" ", "_") for word in manner)]) + ".png"
        found = {d: [p for p in points(rows, d) if p.setting in settings] for d in distances}
        curves(found, folder / file, title=title, floors=floors)
        here = found[main]
        parts += [f"## {title[0].upper()}{title[1:]}\n", f"![{main} against cost]({file})\n"]
        for axis in AXES:
            parts += [compared(here, axis), fronts(here, axis)]
    if len(manners) > 1:
        parts.append(by_manner(cells, manners))
    usual = next(iter(manners.values()))
    here = [cell for cell in cells if cell.setting in usual]
    parts.append(_pictures(here, folder, common, steps))
    parts.append(every_cell(rows, list(common.extractors), distances=distances))
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


def _pictures(here: Sequence[Point], folder: Path, common: Bench, steps: Mapping[str, Step]) -> str:
    shown = ["## Samples\n"]
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
        labelled_rows(page).save(folder / file)
        shown.append(
            f"At {axis} {budget:g}, or as near below as was measured:\n\n![samples]({file})\n"
        )
    shapes = sorted({(c.setting.num_groups, c.setting.overlap) for c in here})
    middle = sorted({cell.setting.steps for cell in here})
    matrices(shapes, middle[len(middle) // 2], folder / "matrices.png")
    shown.append("## When each group moves\n\n![scheduling matrices](matrices.png)\n")
    return "\n".join(shown)
