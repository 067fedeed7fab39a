"""What a change did to the cost of decoding: this checkout against another one.

    git worktree add ../before COMMIT
    python benchmarks/engine_against.py ../before

Each checkout decodes in its own processes, in interleaved rounds, and a ratio is the median over
the rounds, so that a busy minute affects both. One image of 256 tokens, depth 6, 8 steps per group,
one thread; width 256 as in `engine.py`, and width 32, where the overhead of operations dominates.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

WIDTHS, GROUPS = (256, 32), (1, 4, 16)

DECODES = """
import json, statistics, sys, time
import rolldiff, torch
assert rolldiff.__file__.startswith(sys.argv[3]), rolldiff.__file__
from engine_loops import decoder
torch.set_num_threads(1)
found = {}
for width in json.loads(sys.argv[1]):
    model = decoder(16, width, 6, 4, torch.device("cpu"))
    for num_groups in json.loads(sys.argv[2]):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            model.decode(num_groups=num_groups, steps=8, seed=0)
            seconds.append(time.perf_counter() - start)
        found[f"width {width}, {num_groups} groups"] = statistics.median(seconds[1:])
print(json.dumps(found))
"""


def decodes(checkout: Path) -> dict[str, float]:
    """Seconds of each decode, by the library and the network of a checkout."""
    done = subprocess.run(
        [sys.executable, "-c", DECODES, json.dumps(WIDTHS), json.dumps(GROUPS), str(checkout)],
        cwd=checkout,  # found first, before an installed one
        env={"PYTHONPATH": str(checkout / "benchmarks")},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    here, other = Path(__file__).parents[1], args.other.resolve()
    rounds = [(decodes(here), decodes(other)) for _ in range(args.rounds)]
    print(f"{'':24} {'this':>8} {'other':>8}   this over other")
    for name in rounds[0][0]:
        ours, theirs = ([pair[i][name] for pair in rounds] for i in (0, 1))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{name:24} {statistics.median(ours):8.4f} {statistics.median(theirs):8.4f}   "
            f"{statistics.median(ratios):.3f}  ({min(ratios):.3f} … {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
