"""Plots of a benchmark: metric against cost, and scheduling matrices."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from rolldiff.diffusion.schedule import GroupSchedule
from rolldiff.files import written_whole

__all__ = ["COSTS", "groups_label", "plot_costs", "plot_matrices"]

Record = Mapping[str, Any]
COSTS = {
    "nfe": "network calls in series (NFE)",
    "tokens": "token evaluations per image",
    "seconds": "seconds per batch",
}
STYLES = ("-", "--", ":", "-.")


def groups_label(num_groups: int, overlap: float) -> str:
    """Groups and overlap; a single group has no overlap."""
    return f"{num_groups} groups, overlap {overlap:g}" if num_groups > 1 else "1 group"


def plot_costs(
    records: Sequence[Record],
    path: Path,
    *,
    metrics: Sequence[str],
    title: str,
    floors: Mapping[str, float],
) -> None:
    """Each metric against network calls, token evaluations and seconds.

    Args:
        records: lines of `results.jsonl`, all of one grouping, order, solver and guidance.
        path: the PNG to write.
        metrics: the metrics, one row of panels each.
        title: what the records have in common.
        floors: split-half distances of the data, by metric; drawn if they are near the results.
    """
    figure, panels = plt.subplots(
        len(metrics), len(COSTS), figsize=(13, 3.9 * len(metrics)), squeeze=False, sharey="row"
    )
    for row, metric in zip(panels, metrics, strict=True):
        floor = floors.get(metric, 0.0)
        lowest = min(record["metrics"][metric]["mean"] for record in records)
        near = floor >= lowest / 4  # a floor far below would flatten everything else
        for panel, (cost, label) in zip(row, COSTS.items(), strict=True):
            _curves(panel, records, metric=metric, cost=cost)
            if near:
                panel.axhline(floor, color="grey", linewidth=1, linestyle=(0, (1, 2)))
            panel.set_xlabel(label)
        if near:
            where = {"xy": (0.01, floor), "xycoords": ("axes fraction", "data")}
            row[0].annotate("two halves of the data", **where, color="grey", va="bottom", size=8)
        row[0].set_ylabel(f"{metric} (lower is better)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle(f"{title}; bars: one standard deviation over seeds", fontsize=11)
    figure.tight_layout()
    with written_whole(path) as part:
        figure.savefig(part, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _make_room(set_limits: Callable[[float, float], Any], values: Sequence[int | float]) -> None:
    """Limits for values that are nearly one, which a logarithmic axis may give no height at all."""
    low, high = min(values), max(values)
    if 0 < high < 1.1 * low:
        set_limits(low / 1.5, high * 1.5)


def _curves(panel: Axes, records: Sequence[Record], *, metric: str, cost: str) -> None:
    shapes = sorted({(record["num_groups"], record["overlap"]) for record in records})
    groups = sorted({num_groups for num_groups, _ in shapes})
    overlaps = sorted({overlap for num_groups, overlap in shapes if num_groups > 1})
    colours = plt.get_cmap("viridis")
    for shape in shapes:
        num_groups, overlap = shape
        colour = colours(0.9 * groups.index(num_groups) / max(1, len(groups) - 1))
        colour, style = ("black", "-") if num_groups == 1 else (colour, _style(overlap, overlaps))
        line = [r for r in records if (r["num_groups"], r["overlap"]) == shape]
        line.sort(key=lambda record: record[cost])
        x = [record[cost] for record in line]
        y, std = ([r["metrics"][metric][key] or 0.0 for r in line] for key in ("mean", "std"))
        label = groups_label(num_groups, overlap)
        panel.plot(x, y, style, color=colour, marker="o", markersize=3.5, label=label)
        panel.errorbar(x, y, std, fmt="none", ecolor=colour, capsize=2)
    panel.set_xscale("log")
    panel.set_yscale("log")
    _make_room(panel.set_xlim, [record[cost] for record in records])
    _make_room(panel.set_ylim, [record["metrics"][metric]["mean"] for record in records])
    for side in (panel.xaxis, panel.yaxis):
        side.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25)


def _style(overlap: float, overlaps: Sequence[float]) -> str:
    return STYLES[overlaps.index(overlap) % len(STYLES)]


def plot_matrices(shapes: Sequence[tuple[int, float]], steps: int, path: Path) -> None:
    """The scheduling matrix of each (num_groups, overlap): when each group moves."""
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    for panel, (num_groups, overlap) in zip(panels.flat, shapes, strict=False):
        schedule = GroupSchedule(
            num_tokens=num_groups, num_groups=num_groups, overlap=overlap, steps=steps
        )
        panel.imshow(
            schedule.matrix.T.numpy(),
            aspect="auto",
            cmap="Blues_r",
            vmin=0,
            vmax=1,
            interpolation="none",
        )
        panel.set_title(groups_label(num_groups, overlap), fontsize=9)
        panel.set_xticks([0, schedule.num_steps])
        panel.set_yticks([])
    panels[0, 0].set_ylabel("group, first on top", fontsize=8)
    figure.suptitle(
        f"local time of each group over the solver steps, {steps} steps per group "
        "(white: noise, blue: data)",
        fontsize=10,
    )
    with written_whole(path) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)
