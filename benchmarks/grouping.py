"""Does grouping help? One table and one figure, from the results of several benches.

python benchmarks/grouping.py benchmarks/fashion_mnist/small --figure grouping.png

The folder holds the `results.jsonl` of each training as NAME-sSEED.jsonl, or NAME-sSEED-PART.jsonl
if there are several; `universal` is the checkpoint for all settings, every other name a network
trained for one setting. `peers.json`, of peers.py, and `times.jsonl`, a bench on an idle machine,
whose seconds count, may lie beside them. A spread (±) is that of trainings with different seeds;
with an asterisk there is one training, and it is that of the noise.
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
        setting: in a few words.
        nfe: network calls.
        tokens: token evaluations per image.
        seconds: relative to one group with 16 steps; None if it was not timed.
        values: the means of each training, by metric.
        noise: the standard deviation over the seeds of the noise, by metric; of the first training.
    """

    model: str
    setting: str
    nfe: int
    tokens: int
    seconds: float | None
    values: Mapping[str, Sequence[float]]
    noise: Mapping[str, float | None]

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
    for (model, label), same in found.items():
        first = same[0]
        metrics = [name for name in METRICS if name in first["metrics"]]
        yield Cell(
            model=model,
            setting=label,
            nfe=first["nfe"],
            tokens=first["tokens"],
            seconds=times[label] / unit if unit and label in times else None,
            values={m: [row["metrics"][m]["mean"] for row in same] for m in metrics},
            noise={m: first["metrics"][m]["std"] for m in metrics},
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
    """The best setting of each model within each budget, by the first metric."""
    metric = next(iter(METRICS))
    models = list(dict.fromkeys(cell.model for cell in cells))
    joint = [cell for cell in cells if cell.setting == "1 group, 16 steps"]
    calls, tokens = joint[0].nfe, joint[0].tokens
    budgets: dict[str, Callable[[Cell], bool]] = {
        "at any cost": lambda cell: True,
        f"at most {calls} calls": lambda cell: cell.nfe <= calls,
        f"at most {4 * calls} calls": lambda cell: cell.nfe <= 4 * calls,
        f"at most {1.1 * tokens:.0f} tokens": lambda cell: cell.tokens <= 1.1 * tokens,
    }
    if joint[0].seconds is not None:
        budgets["at most 1.1 of the time"] = lambda cell: (
            cell.seconds is not None and cell.seconds <= 1.1
        )
    lines = ["| best | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for name, within in budgets.items():
        texts = []
        for model in models:
            inside = [cell for cell in cells if cell.model == model and within(cell)]
            cell = min(inside, key=lambda c: c.mean(metric), default=None)
            texts.append(f"{cell.text(metric, floor)}: {cell.setting}" if cell else "–")
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
    sketch, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, cost, name in zip(
        axes, ("nfe", "tokens"), ("network calls", "token evaluations per image"), strict=True
    ):
        for number, model in enumerate(dict.fromkeys(cell.model for cell in cells)):
            these = [cell for cell in cells if cell.model == model]
            axis.scatter(
                [getattr(cell, cost) for cell in these],
                [cell.mean(metric) for cell in these],
                marker="os^Dv"[number],
                label=model,
            )
            # A peer has no groups to name; its points stand at their calls.
            for cell in these if model in (UNIVERSAL, SPECIALIST) else ():
                label = cell.setting.removesuffix(", 16 steps").removesuffix(", overlap 0")
                at = getattr(cell, cost), cell.mean(metric)
                # The names of the first model above its points, those of the others below.
                by = (-3, 6 if number == 0 else -12)
                axis.annotate(label, at, by, textcoords="offset points", fontsize=7)
        axis.margins(x=0.45, y=0.2)
        axis.set(xlabel=name, xscale="log" if cost == "nfe" else "linear", yscale="log")
        for side in (axis.yaxis, axis.xaxis) if cost == "nfe" else (axis.yaxis,):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(f"Fréchet distance, classifier\n(two halves of the test split: {floor:.2g})")
    axes[0].legend(fontsize=8)
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
