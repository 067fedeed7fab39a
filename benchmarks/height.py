"""What local attention costs: decoding time, memory and the first row against the image's height.

    python benchmarks/height.py                                      a table
    python benchmarks/height.py --out benchmarks/results/NAME.json   and a JSON file
    python benchmarks/height.py --quick                              tiny sizes, to try the script

The weights are random; nothing is downloaded. Images have a fixed width, and groups of two rows of
tokens, so that a call has as many tokens at every height. All heights run interleaved, and each
figure is the median over rounds, see `engine_rounds.py`.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from engine_results import Results, bounded, machine
from engine_rounds import Cases
from torch import nn

from rolldiff import DecodeConfig, Decoder, Training

CPU = torch.device("cpu")
Models = dict[int, Decoder]
# What each figure must be at most, on two CPU cores.
TARGETS = {"growth": 1.05, "cache_tallest_over_lower": 1.0, "first_row_tallest_over_lower": 1.2}


@dataclass(frozen=True)
class Sizes:
    """The network and the images; rows and columns are those of tokens."""

    width: int = 192
    depth: int = 4
    heads: int = 6
    patch: int = 8
    window: int = 8
    columns: int = 32
    rows: Sequence[int] = (8, 16, 32, 64, 128)
    first_row: Sequence[int] = (32, 256)
    squares: Sequence[int] = (64, 128)
    square_groups: int = 16
    steps: int = 4
    rounds: int = 5


QUICK = Sizes(24, 2, 2, 2, 2, 4, (4, 8, 16), (8, 16), (8,), 4, 2, 1)


def decoder(sizes: Sizes, rows: int, columns: int, *, window: int | None) -> Decoder:
    """Random weights that let every token matter to those it sees."""
    torch.manual_seed(0)
    model = Decoder.build(
        image_size=(rows * sizes.patch, columns * sizes.patch),
        patch=sizes.patch,
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        window=window,
        training=Training((1, sizes.square_groups, *(max(1, r // 2) for r in every(sizes)))),
    )
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model.eval()


def every(sizes: Sizes) -> list[int]:
    """All heights."""
    return sorted({*sizes.rows, *sizes.first_row})


def config(rows: int, sizes: Sizes) -> DecodeConfig:
    """Groups of two rows of tokens."""
    return DecodeConfig(num_groups=rows // 2, steps=sizes.steps)


def measure(sizes: Sizes) -> Results:
    """All figures."""
    results = Results()
    lowest = decoder(sizes, every(sizes)[0], sizes.columns, window=sizes.window)
    models = {
        rows: lowest.resized((rows * sizes.patch, sizes.columns * sizes.patch))
        for rows in every(sizes)
    }
    measure_growth(results, sizes, models)
    measure_cache(results, sizes, models)
    measure_first_row(results, sizes, models)
    measure_squares(results, sizes)
    return results


def measure_growth(results: Results, sizes: Sizes, models: Models) -> None:
    """Seconds of a decoding at each height, and the exponent of a line through their logarithms."""
    cases: Cases = {
        f"{rows}": lambda rows=rows: models[rows].decode(None, config(rows, sizes), seed=0)
        for rows in sizes.rows
    }
    rounds = results.watch.time_rounds(cases, sizes.rounds, device=CPU)
    for rows in sizes.rows:
        results.put(f"seconds_{rows * sizes.patch}", rounds[f"{rows}"])
    logs = [math.log(rows) for rows in sizes.rows]
    middle, tall = sizes.rows[len(sizes.rows) // 2], sizes.rows[-1]
    slopes = []
    for i in range(sizes.rounds):
        seconds = [math.log(rounds[f"{rows}"][i]) for rows in sizes.rows]
        slopes.append(statistics.linear_regression(logs, seconds).slope)
    results.put("growth", slopes)
    # The lowest images are no higher than the window, so that their tokens see fewer others.
    results.put(
        "seconds_per_row_tallest_over_middle",
        [
            rounds[f"{tall}"][i] / tall / (rounds[f"{middle}"][i] / middle)
            for i in range(sizes.rounds)
        ],
    )


def measure_cache(results: Results, sizes: Sizes, models: Models) -> None:
    """The largest cache of a decoding, in megabytes."""
    peaks = {}
    for rows in every(sizes):
        run = models[rows].prepare(None, config(rows, sizes), seed=0)
        peaks[rows] = max(run.cache.nbytes for _ in run.states())
        results.put(f"cache_megabytes_{rows * sizes.patch}", [peaks[rows] / 1e6])
    low, high = sizes.first_row
    results.put("cache_tallest_over_lower", [peaks[high] / peaks[low]])


def measure_first_row(results: Results, sizes: Sizes, models: Models) -> None:
    """Seconds until the first row is final, and until a frame, a whole image, shows it."""

    def finished(rows: int) -> None:
        run = models[rows].prepare(None, config(rows, sizes), seed=0)
        next(state for state in run.states() if state.finished)

    def shown(rows: int) -> None:
        frames = models[rows].stream(None, config(rows, sizes), seed=0, preview=False)
        next(frame for frame in frames if frame.finished[0].all())

    cases: Cases = {
        f"{call.__name__} {rows}": lambda rows=rows, call=call: call(rows)
        for rows in sizes.first_row
        for call in (finished, shown)
    }
    with torch.inference_mode():
        rounds = results.watch.time_rounds(cases, 4 * sizes.rounds, device=CPU)
    low, high = sizes.first_row
    for name, case in (("first_row", "finished"), ("first_row_in_a_frame", "shown")):
        for rows in sizes.first_row:
            results.put(f"{name}_seconds_{rows * sizes.patch}", rounds[f"{case} {rows}"])
        results.ratio(f"{name}_tallest_over_lower", rounds, f"{case} {high}", f"{case} {low}")


def measure_squares(results: Results, sizes: Sizes) -> None:
    """Local against global attention, on square images of many tokens; one round."""
    for side in sizes.squares:
        local, everywhere = (
            decoder(sizes, side, side, window=window) for window in (sizes.window, None)
        )
        cases: Cases = {
            name: lambda model=model: model.decode(
                num_groups=sizes.square_groups, steps=sizes.steps, seed=0
            )
            for name, model in (("local", local), ("global", everywhere))
        }
        seconds = {}
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name] = time.perf_counter() - start
        results.put(f"global_over_local_{side**2}", [seconds["global"] / seconds["local"]])
        results.put(f"local_seconds_{side**2}", [seconds["local"]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    args = parser.parse_args()
    results = measure(sizes := QUICK if args.quick else Sizes())
    found = {
        **results.figures,
        "spread": results.spread,
        "rounds": {"repeated": results.watch.repeated, "noisy": results.watch.noisy},
        "sizes": asdict(sizes),
        "machine": machine(["cpu"], torch.get_num_threads()),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(bounded(results.figures, results.spread, TARGETS))


if __name__ == "__main__":
    main()
