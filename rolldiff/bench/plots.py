"""The pictures of a report: metric against cost, scheduling matrices."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from rolldiff.bench.conclusions import AXES, Axis, Point
from rolldiff.bench.settings import groups_in_words
from rolldiff.schedule import RollingSchedule

__all__ = ["curves", "matrices"]

STYLES = ("-", "--", ":", "-.")


def curves(
    cells: Mapping[str, Sequence[Point]],
    path: Path,
    *,
    title: str,
    floors: Mapping[str, float],
) -> None:
    """Each metric against network calls, token evaluations and seconds.

    Args:
        cells: the cells by metric, all of one order, step rule and guidance.
        path: the PNG to write.
        title: what they have in common.
        floors: the distance between two halves of the data, by metric; drawn where it is near.
    """
    figure, panels = plt.subplots(
        len(cells), len(AXES), figsize=(13, 3.9 * len(cells)), squeeze=False, sharey="row"
    )
    for row, (metric, found) in zip(panels, cells.items(), strict=True):
        floor = floors.get(metric, 0.0)
        near = floor >= min(cell.mean for cell in found) / 4  # far below, it would flatten all else
        for panel, axis in zip(row, AXES, strict=True):
            _curves(panel, found, axis)
            if near:
                panel.axhline(floor, color="grey", linewidth=1, linestyle=(0, (1, 2)))
            panel.set_xlabel(AXES[axis])
        if near:
            where = {"xy": (0.01, floor), "xycoords": ("axes fraction", "data")}
            row[0].annotate("two halves of the data", **where, color="grey", va="bottom", size=8)
        row[0].set_ylabel(f"{metric} (lower is better)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle(f"{title}; bars: one standard deviation over seeds", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _curves(panel: Axes, cells: Sequence[Point], axis: Axis) -> None:
    groups = sorted({cell.setting.num_groups for cell in cells})
    overlaps = sorted({cell.setting.overlap for cell in cells if cell.setting.num_groups > 1})
    colours = plt.get_cmap("viridis")
    for number, num_groups in enumerate(groups):
        colour = "black" if num_groups == 1 else colours(0.9 * number / max(1, len(groups) - 1))
        for overlap in overlaps if num_groups > 1 else [0.0]:
            chosen = (num_groups, overlap)
            line = [c for c in cells if (c.setting.num_groups, c.setting.overlap) == chosen]
            line.sort(key=lambda cell: cell.cost(axis))
            if not line:
                continue
            style = STYLES[overlaps.index(overlap) % len(STYLES)] if num_groups > 1 else "-"
            words = groups_in_words(num_groups, overlap)
            x, y = [c.cost(axis) for c in line], [c.mean for c in line]
            panel.plot(x, y, style, color=colour, marker="o", markersize=3.5, label=words)
            panel.errorbar(x, y, [c.std or 0.0 for c in line], fmt="none", ecolor=colour, capsize=2)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for side in (panel.xaxis, panel.yaxis):
        side.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25)


def matrices(shapes: Sequence[tuple[int, float]], steps: int, path: Path) -> None:
    """The scheduling matrix of each (num_groups, overlap): when each group moves."""
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    for panel, (num_groups, overlap) in zip(panels.flat, shapes, strict=False):
        matrix = RollingSchedule(num_groups, overlap).matrix(steps)
        panel.imshow(
            matrix.T.numpy(), aspect="auto", cmap="Blues_r", vmin=0, vmax=1, interpolation="none"
        )
        panel.set_title(groups_in_words(num_groups, overlap), fontsize=9)
        panel.set_xticks([0, len(matrix) - 1])
        panel.set_yticks([])
    panels[0, 0].set_ylabel("group, first on top", fontsize=8)
    figure.suptitle(
        f"local time of each group over the network calls, {steps} steps a group "
        "(white: noise, blue: data)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
