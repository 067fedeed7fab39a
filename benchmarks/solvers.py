"""Solvers of one checkpoint side by side: distances against network calls, a table per group count.

python benchmarks/solvers.py benchmarks/digits/solvers.jsonl
"""

import argparse
import json
from pathlib import Path

METRICS = ("fd_classifier", "fd_pixels")


def table(rows: list[dict]) -> str:
    """A line per solver and number of steps, in the order of the calls."""
    lines = ["| solver | steps | calls | " + " | ".join(METRICS) + " |", "|---" * 5 + "|"]
    for row in sorted(rows, key=lambda row: (row["nfe"], row["solver"])):
        cells = [row["metrics"][name] for name in METRICS]
        values = [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in cells]
        head = [row["solver"], str(row["steps"]), str(row["nfe"])]
        lines.append("| " + " | ".join(head + values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.jsonl of `rolldiff bench`")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    for groups in sorted({row["num_groups"] for row in rows}):
        chosen = [row for row in rows if row["num_groups"] == groups]
        print(f"### num_groups={groups}\n\n{table(chosen)}\n")


if __name__ == "__main__":
    main()
