"""One metric of several benchmarks side by side, for the configurations that they share.

python benchmarks/compare.py fd_classifier mixture=RUN/bench/results.jsonl clean=...

Several files of one name are trainings with different seeds. The spread (±) is then the standard
deviation of their means, otherwise that of the seeds of the noise.

python benchmarks/compare.py --all fd_classifier universal=A.jsonl,B.jsonl alone=C.jsonl,D.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from rolldiff.evaluation.report import config_label


def read(paths: Sequence[Path], metric: str) -> dict[str, str]:
    """The metric of every configuration that all files have, as text."""
    found: dict[str, list[dict]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if metric in row["metrics"]:
                found.setdefault(config_label(row), []).append(row["metrics"][metric])
    return {label: text(rows) for label, rows in found.items() if len(rows) == len(paths)}


def text(rows: Sequence[dict]) -> str:
    means = [row["mean"] for row in rows]
    std = rows[0]["std"] if len(rows) == 1 else stdev(means)
    return f"{fmean(means):.3f}" + ("" if std is None else f" ± {std:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metric", help="fd_classifier, fd_pixels, seams, …")
    parser.add_argument("benches", nargs="+", help="NAME=results.jsonl[,results.jsonl…]")
    parser.add_argument("--all", action="store_true", help="also what some of them lack")
    args = parser.parse_args()
    pairs = (bench.split("=", 1) for bench in args.benches)
    tables = {name: read([Path(p) for p in paths.split(",")], args.metric) for name, paths in pairs}
    print(f"| {args.metric} | " + " | ".join(tables) + " |")
    print("|---" * (1 + len(tables)) + "|")
    for setting in dict.fromkeys(setting for table in tables.values() for setting in table):
        values = [table.get(setting, "–") for table in tables.values()]
        if "–" in values and not args.all:
            continue
        print(f"| {setting} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
