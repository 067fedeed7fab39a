"""Does grouping help? One table and one figure, from the results of several benches.

python benchmarks/grouping.py benchmarks/fashion_mnist/small --figure grouping.png

The folder holds the `results.jsonl` of each training as NAME-sSEED.jsonl, or NAME-sSEED-PART.jsonl
if there are several; `universal` is the checkpoint for all settings, every other name a network
trained for one setting. `peers.json`, of peers.py, and `times.jsonl`, a bench on an idle machine,
whose seconds count, may lie beside them. A spread (±) is that of trainings with different seeds;
with an asterisk there is one training, and it is that of the noise. What was measured by another
classifier than that of the first results cannot be compared and is left out.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rolldiff.evaluation.report import config_label

UNIVERSAL, SPECIALIST = "one checkpoint for all", "a network for each"
METRICS = {
    "fd_classifier": "classifier",
    "fd_classifier_train": "… from training images",
    "fd_pixels": "pixels",
    "fd_efficientnet_lite0_112": "EfficientNet",
    "kd_classifier": "KID",
    "precision_classifier": "precision",
    "recall_classifier": "recall",
    "seams": "seams",
    "bits_per_dim_bound": "bits/dim",
}


@dataclass(frozen=True)
class Cell:
    """What one model reaches with one setting.

    Attributes:
        model: `UNIVERSAL`, `SPECIALIST` or the name of a peer.
        num_groups: of the decoding; None for a peer, which has no groups.
        setting: in a few words.
        nfe: network calls.
        tokens: token evaluations per image.
        seconds: relative to one group with 16 steps; None if it was not timed.
        values: the means of each training, by metric.
        noise: the standard deviation over the seeds of the noise, by metric; of the first training.
    """

    model: str
    num_groups: int | None
    setting: str
    nfe: int
    tokens: int
    seconds: float | None
    values: Mapping[str, Sequence[float]]
    noise: Mapping[str, float | None]

    @property
    def kind(self) -> str:
        """The model, and whether it decodes in one group or in several."""
        if self.num_groups is None:
            return self.model
        return f"{self.model}, {'one group' if self.num_groups == 1 else 'several groups'}"

    def mean(self, metric: str) -> float:
        return fmean(self.values[metric])

    def text(self, metric: str, floor: float | None = None) -> str:
        """The mean, its spread, and its ratio to a split-half distance."""
        if metric not in self.values:
            return "–"
        values = self.values[metric]
        std = stdev(values) if len(values) > 1 else self.noise[metric]
        spread = "" if std is None else f" ± {std:.2g}" + ("" if len(values) > 1 else "*")
        return f"{fmean(values):.3g}{spread}" + (f" ({fmean(values) / floor:.1f})" if floor else "")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparable(row: Mapping, first: Mapping, *, metric: str) -> bool:
    """Whether the metric was measured by the same features, from the same images, in two rows."""
    features = re.sub(r"^(fd|kd|precision|recall)_|_train$", "", metric)
    if row["extractors"].get(features) != first["extractors"].get(features):
        return False
    return row["training"] == first["training"] or not metric.endswith("_train")


def benches(folder: Path) -> Iterator[Cell]:
    """The cells of all benches in a folder."""
    times = {}
    if (folder / "times.jsonl").is_file():
        times = {config_label(row): row["seconds"] for row in rows(folder / "times.jsonl")}
    unit = times.get("1 group, 16 steps")
    found: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(folder.glob("*-s[0-9]*.jsonl")):
        name = re.match(r"(.+)-s\d", path.name)[1]
        model = UNIVERSAL if name == "universal" else SPECIALIST
        for row in rows(path):
            found.setdefault((model, config_label(row)), []).append(row)
    ruler = next(iter(found.values()))[0]
    for (model, label), same in found.items():
        first = same[0]
        measured: dict[str, list[dict]] = {}
        for metric in METRICS:
            for row in same:
                if metric in row["metrics"] and comparable(row, ruler, metric=metric):
                    measured.setdefault(metric, []).append(row["metrics"][metric])
        yield Cell(
            model=model,
            num_groups=first["num_groups"],
            setting=label,
            nfe=first["nfe"],
            tokens=first["tokens"],
            seconds=times[label] / unit if unit and label in times else None,
            values={name: [each["mean"] for each in all_] for name, all_ in measured.items()},
            noise={name: all_[0]["std"] for name, all_ in measured.items()},
        )


def peers(path: Path) -> Iterator[Cell]:
    """The cells of other libraries' models: of each, the learning rate with the best cell."""
    if not path.is_file():
        return
    card = json.loads(path.read_text(encoding="utf-8"))
    best: dict[str, tuple[float, list[dict]]] = {}
    for name, entry in card["table"].items():
        model, _, rate = name.partition(", rate ")
        lowest = min(cell["fd_classifier"]["mean"] for cell in entry["cells"])
        if rate and (model not in best or lowest < best[model][0]):
            best[model] = lowest, entry["cells"]
    for model, (_, cells) in best.items():
        for cell in cells:
            metrics = [name for name in METRICS if name in cell]
            yield Cell(
                model=model,
                num_groups=None,
                setting=f"{cell['nfe']} steps",
                nfe=cell["nfe"],
                tokens=cell["nfe"] * card["num_tokens"],
                seconds=None,
                values={m: [cell[m]["mean"]] for m in metrics},
                noise={m: cell[m]["std"] for m in metrics},
            )


def read(folder: Path) -> tuple[list[Cell], dict[str, float]]:
    """All cells in a folder, the universal checkpoint first, and the split-half distances."""
    found = [*benches(folder), *peers(folder / "peers.json")]
    cells = sorted(found, key=lambda c: (c.model != UNIVERSAL, c.model != SPECIALIST, c.nfe))
    floors = next(row["floors"] for row in rows(next(folder.glob("universal-s*.jsonl"))))
    return cells, {name: value for name, value in floors.items() if name.startswith("fd_")}


def best_table(cells: Sequence[Cell], floor: float) -> str:
    """The best setting of each model within each budget, by the first metric.

    A column for one group and a column for several; a budget of calls or tokens is that of one
    group with 16 steps, or four times as much.
    """
    metric = next(iter(METRICS))
    columns: dict[str, list[Cell]] = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        these = [cell for cell in cells if cell.model == model]
        for cell in sorted(these, key=lambda cell: cell.num_groups != 1):
            columns.setdefault(cell.kind, []).append(cell)
    joint = next(cell for cell in cells if cell.setting == "1 group, 16 steps")
    budgets: dict[str, Callable[[Cell], bool]] = {"at any cost": lambda cell: True}
    for times in (1, 4):  # bound now: the loop goes on before a budget is asked
        calls, tokens = times * joint.nfe, 1.1 * times * joint.tokens
        budgets[f"at most {calls} calls"] = lambda cell, most=calls: cell.nfe <= most
        budgets[f"at most {tokens:,.0f} tokens"] = lambda cell, most=tokens: cell.tokens <= most
    if joint.seconds is not None:
        budgets["at most 1.1 of the time"] = lambda cell: (
            cell.seconds is not None and cell.seconds <= 1.1
        )
    lines = ["| best | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, within in budgets.items():
        texts = []
        for column in columns.values():
            inside = [cell for cell in column if within(cell) and metric in cell.values]
            best = min(inside, key=lambda cell: cell.mean(metric), default=None)
            texts.append(f"{best.text(metric, floor)}: {best.setting}" if best else "–")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def full_table(cells: Sequence[Cell], floors: Mapping[str, float]) -> str:
    """All settings of all models with all metrics."""
    shown = [m for m in METRICS if any(m in cell.values for cell in cells)]
    head = ["model", "setting", "NFE", "tokens", "time", *(METRICS[m] for m in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in cells:
        time = "–" if cell.seconds is None else f"{cell.seconds:.2f}"
        values = [cell.text(m, floors.get(m)) for m in shown]
        line = [cell.model, cell.setting, f"{cell.nfe:,}", f"{cell.tokens:,}", time, *values]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def figure(cells: Sequence[Cell], path: Path, floor: float) -> None:
    """The first metric against network calls and against token evaluations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    metric = next(iter(METRICS))
    sketch, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    for axis, cost, name in zip(
        axes, ("nfe", "tokens"), ("network calls", "token evaluations per image"), strict=True
    ):
        models = list(dict.fromkeys(cell.model for cell in cells))
        for kind in dict.fromkeys(cell.kind for cell in cells if metric in cell.values):
            these = [cell for cell in cells if cell.kind == kind and metric in cell.values]
            number = models.index(these[0].model)
            axis.scatter(
                [getattr(cell, cost) for cell in these],
                [cell.mean(metric) for cell in these],
                marker="os^Dv"[number],
                edgecolors=f"C{number}",
                facecolors="none" if these[0].num_groups == 1 else f"C{number}",
                label=kind,
            )
            # To the right of a point of the first model, and to the left of one of another.
            # One group stands a little apart from several: above or below.
            away = 5 if these[0].num_groups == 1 else 0
            by, anchor = ((5, away - 2), "left") if number == 0 else ((-5, -away - 2), "right")
            for cell in these if these[0].num_groups is not None else ():
                label = re.sub(r", \d+ steps|, overlap 0(?!\.)", "", cell.setting)
                at = getattr(cell, cost), cell.mean(metric)
                axis.annotate(label, at, by, textcoords="offset points", ha=anchor, fontsize=7)
        axis.margins(x=0.45, y=0.05)
        axis.set(xlabel=name, xscale="log", yscale="log")
        for side, subs in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, (1, 2, 3, 5))):
            side.set_major_locator(LogLocator(subs=subs))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(f"Fréchet distance, classifier\n(two halves of the test split: {floor:.2g})")
    handles, names = axes[0].get_legend_handles_labels()
    sketch.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    sketch.savefig(path, dpi=120)
    plt.close(sketch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the results of several benches")
    parser.add_argument("--figure", type=Path, help="a PNG of distances against cost")
    args = parser.parse_args()
    cells, floors = read(args.folder)
    print(best_table(cells, floors["fd_classifier"]))
    print()
    print(full_table(cells, floors))
    if args.figure:
        figure(cells, args.figure, floors["fd_classifier"])


if __name__ == "__main__":
    main()
