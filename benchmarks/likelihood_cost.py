"""What a likelihood costs: seconds per image, by the number of groups.

    python benchmarks/likelihood_cost.py           28 x 28 pixels, one token per pixel
    python benchmarks/likelihood_cost.py --quick   8 x 8 pixels, to try the script

The weights are random, which does not change the cost. The exact divergence takes as many products
per evaluation as a group has numbers, so at one group per pixel a single one.
"""

import argparse
from collections.abc import Iterator

import torch

from rolldiff import Decoder, LikelihoodConfig, Training

WIDTH, DEPTH, HEADS = 64, 4, 2
EVALUATIONS = 4  # of a step of the solver
BOUND_CALLS = 16


def rows(side: int, counts: tuple[int, ...]) -> Iterator[list[str]]:
    """Of each group count: exact divergence, Hutchinson's, and the bound."""
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=side,
        channels=1,
        patch=1,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        training=Training(counts),
    ).eval()
    image = torch.randint(0, 256, (1, 1, side, side)) / 255 * 2 - 1
    exact = LikelihoodConfig(divergence="exact", tolerance=None)
    hutchinson = LikelihoodConfig(divergence="hutchinson", tolerance=None)
    bound = LikelihoodConfig(method="bound", samples=BOUND_CALLS)
    for count in counts:

        def run(how: LikelihoodConfig, count: int = count) -> tuple[float, int]:
            with torch.no_grad():
                found = decoder.log_likelihood(
                    image, num_groups=count, steps=1, likelihood=how, seed=0
                )
            return found.seconds, found.products

        run(bound)  # warm
        seconds, products = run(exact)
        probed, _ = run(hutchinson)
        bounded, _ = run(bound)
        yield [
            f"{count:,}",
            f"{products // EVALUATIONS:,}",
            f"{seconds / EVALUATIONS:.3g}",
            f"{probed / EVALUATIONS:.3g}",
            f"{bounded:.3g}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    quick = parser.parse_args().quick
    heads = ["num_groups", "products", "exact", "Hutchinson, one probe", f"bound, {BOUND_CALLS}"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for row in rows(8 if quick else 28, (1, 4, 64) if quick else (1, 7, 28, 784)):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
