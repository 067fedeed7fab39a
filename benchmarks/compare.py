"""One metric of several benchmarks side by side, for the configurations that they share.

python benchmarks/compare.py fd_classifier mixture=RUN/bench/results.jsonl clean=...
"""

import argparse
import json
from pathlib import Path

from rolldiff.evaluation.report import config_label


def read(path: Path, metric: str) -> dict[str, str]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if metric in row["metrics"]:
            mean, std = (row["metrics"][metric][key] for key in ("mean", "std"))
            spread = "" if std is None else f" ± {std:.3f}"
            found[config_label(row)] = f"{mean:.3f}{spread}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metric", help="fd_classifier, fd_pixels, seams, …")
    parser.add_argument("benches", nargs="+", help="NAME=results.jsonl")
    args = parser.parse_args()
    pairs = (bench.split("=", 1) for bench in args.benches)
    tables = {name: read(Path(path), args.metric) for name, path in pairs}
    print(f"| {args.metric} | " + " | ".join(tables) + " |")
    print("|---" * (1 + len(tables)) + "|")
    first, *others = tables.values()
    for setting, value in first.items():
        if all(setting in table for table in others):
            values = [value, *(table[setting] for table in others)]
            print(f"| {setting} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
