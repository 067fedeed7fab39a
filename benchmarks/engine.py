"""What grouping costs: decoding with the exact cache, without it, and in one group.

    python benchmarks/engine.py                                     tables
    python benchmarks/engine.py --json                              the same as JSON
    python benchmarks/engine.py --out benchmarks/results/NAME.json  and written to a file
    python benchmarks/engine.py --quick                             tiny sizes, to try the script
    python benchmarks/engine.py --device cuda                       a GPU alone, without the CPU

If there is a GPU, its metrics are added as `cuda_…`, see `engine_cuda.py`.

The weights are random; nothing is downloaded. All variants run interleaved in one process, and each
ratio is the median over rounds of its ratio in a round. Rounds that other work on the machine made
slow are repeated, see `engine_rounds.py`.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine_cuda
import engine_peers
import torch
from engine_loops import Pointwise, bare_loop, decoder, every_token, products
from engine_results import Results, machine, readable
from engine_rounds import Cases

from rolldiff import DecodeOutput, Decoder, Patches


@dataclass(frozen=True)
class Sizes:
    """The networks and settings; sides are in tokens, one token per pixel."""

    side: int = 32
    width: int = 192
    depth: int = 6
    heads: int = 6
    batch: int = 4
    steps: int = 4
    small_side: int = 16
    small_width: int = 256
    small_heads: int = 4
    small_steps: int = 8
    growth: Sequence[int] = (16, 32, 64)
    groups: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    rounds: int = 7
    few: int = 3


QUICK = Sizes(8, 24, 2, 2, 2, 2, 8, 24, 2, 2, (4, 8), (1, 4, 16, 64), 2, 1)


def measure_groups(results: Results, sizes: Sizes, device: torch.device) -> None:
    """One network, decoding with few and many groups."""
    model = decoder(sizes.side, sizes.width, sizes.depth, sizes.heads, device)
    batch, steps = sizes.batch, sizes.steps

    def decode(num_groups: int, overlap: float = 0.0, *, cache: bool = True) -> DecodeOutput:
        decoded = model.decode(
            num_images=batch,
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            seed=0,
            cache=cache,
        )
        row = {"num_groups": num_groups, "overlap": decoded.overlap, "cache": cache}
        rows[tuple(row.values())] = row | asdict(decoded.cost)
        return decoded

    rows: dict[tuple, dict[str, Any]] = {}
    joint = {"bare": bare_loop(model, batch, steps), "joint": lambda: decode(1)}
    rounds = results.watch.time_rounds(joint, 4 * sizes.rounds, device=device)
    results.ratio("loop_overhead", rounds, "joint", "bare")
    rounds = results.watch.time_rounds(
        {
            "joint": lambda: decode(1),
            "g16": lambda: decode(16),
            "half": lambda: decode(16, 0.5),
            "g64": lambda: decode(64),
        },
        sizes.rounds,
        device=device,
    )
    results.ratio("g16_cached_over_joint", rounds, "g16", "joint")
    results.ratio("g64_cached_over_joint", rounds, "g64", "joint")
    results.ratio("overlap_half_cached_over_joint", rounds, "half", "joint")
    costs = [decode(16).cost for _ in range(sizes.rounds)]
    results.put("first_group_over_total", [c.seconds_to_first_group / c.seconds for c in costs])

    differences, seconds = [], []
    for overlap in (0.0, 0.5):
        kept, plain = decode(16, overlap), decode(16, overlap, cache=False)
        differences.append(((kept.image - plain.image).norm() / plain.image.norm()).item())
        seconds.append(plain.cost.seconds / kept.cost.seconds)
    results.put("max_relative_difference", [max(differences)])
    results.put("g16_uncached_over_cached", seconds[:1])
    everything = results.watch.time_rounds(
        {
            "all": every_token(model, 16, batch=sizes.batch, steps=sizes.steps),
            "g16": lambda: decode(16),
        },
        1,
        device=device,
    )
    results.ratio("g16_every_token_over_cached", everything, "all", "g16")

    for num_groups in sizes.groups:
        decode(num_groups)
    results.table = [row | {"images": batch} for _, row in sorted(rows.items(), key=_by_groups)]
    pixel = rows[sizes.groups[-1], 0.0, True]
    results.put("pixel_ar_seconds_per_image", [pixel["seconds"] / batch])
    results.put("pixel_ar_tokens_per_second", [pixel["tokens"] * batch / pixel["seconds"]])


def _by_groups(item: tuple[tuple, Any]) -> tuple:
    (num_groups, overlap, cache), _ = item
    return not cache, num_groups, overlap


def measure_small(results: Results, sizes: Sizes, device: torch.device) -> None:
    """Batch 1, where a call costs more than its tokens; and the baselines."""
    shape = (sizes.small_side, sizes.small_width, sizes.depth, sizes.small_heads)
    model, steps = decoder(*shape, device), sizes.small_steps
    groups = {f"g{count}": count for count in (1, 4, 16)}
    cases: Cases = {
        name: lambda count=count: model.decode(num_groups=count, steps=steps, seed=0)
        for name, count in groups.items()
    }
    alone: Cases = {
        f"{name} alone": products(model, count, steps) for name, count in groups.items()
    }
    rounds = results.watch.time_rounds(cases | alone, 4 * sizes.rounds, device=device)
    for name in ("g4", "g16"):
        results.ratio(f"small_{name}_cached_over_joint", rounds, name, "g1")
        results.ratio(f"small_{name}_products_over_joint", rounds, f"{name} alone", "g1 alone")
    results.put("small_joint_seconds", rounds["g1"])
    found = engine_peers.loops(*shape, steps=steps, device=device)
    rounds = results.watch.time_rounds(found | {"g1": cases["g1"]}, sizes.few, device=device)
    for name in found:
        results.ratio(f"small_{name}_over_joint", rounds, name, "g1")


def measure_loop(results: Results, sizes: Sizes, device: torch.device) -> None:
    """Microseconds per step beyond a bare loop, without the fixed cost of a decoding."""
    layout = Patches(4, channels=3)
    model = Decoder(layout, Pointwise(3), prediction="velocity").to(device)
    short, long = 20, 520
    cases: Cases = {}
    for steps in (short, long):
        cases[f"ours {steps}"] = lambda steps=steps: model.decode(steps=steps, seed=0)
        cases[f"bare {steps}"] = bare_loop(model, 1, steps)
        if (theirs := engine_peers.flow_loop(model, steps)) is not None:
            cases[f"diffusers {steps}"] = theirs
    rounds = results.watch.time_rounds(cases, 5 * sizes.rounds, device=device)

    def a_step(name: str) -> list[float]:
        pairs = zip(rounds[f"{name} {long}"], rounds[f"{name} {short}"], strict=True)
        return [(a - b) / (long - short) * 1e6 for a, b in pairs]

    ours, bare = a_step("ours"), a_step("bare")
    results.put("loop_overhead_us", [a - b for a, b in zip(ours, bare, strict=True)])
    results.put("bare_loop_us", bare)
    if f"diffusers {short}" in cases:
        pairs = zip(a_step("diffusers"), bare, strict=True)
        results.put("diffusers_loop_overhead_us", [a - b for a, b in pairs])


def measure_growth(results: Results, sizes: Sizes, device: torch.device) -> None:
    """How seconds grow with the tokens: the exponent of a line through their logarithms."""
    models = [decoder(side, sizes.width, sizes.depth, sizes.heads, device) for side in sizes.growth]
    cases: Cases = {}
    for model in models:
        for num_groups in (1, 16):
            cases[f"{model.layout.num_tokens} in {num_groups}"] = (
                lambda model=model, num_groups=num_groups: model.decode(
                    num_groups=num_groups, steps=sizes.steps, seed=0
                )
            )
    rounds = results.watch.time_rounds(cases, sizes.few, device=device)
    tokens = [model.layout.num_tokens for model in models]

    def exponents(num_groups: int) -> list[float]:
        logs = [math.log(n) for n in tokens]
        found = []
        for i in range(sizes.few):
            seconds = [math.log(rounds[f"{n} in {num_groups}"][i]) for n in tokens]
            found.append(statistics.linear_regression(logs, seconds).slope)
        return found

    joint, grouped = exponents(1), exponents(16)
    results.put("growth_joint", joint)
    results.put("growth_g16", grouped)
    results.put("growth_g16_minus_joint", [b - a for a, b in zip(joint, grouped, strict=True)])


def measure(devices: Sequence[str], *, quick: bool = False) -> dict[str, Any]:
    """All results, or those of some devices."""
    results, cores, sizes = Results(), torch.get_num_threads(), {}
    if "cpu" in devices:
        sizes["sizes"] = asdict(ours := QUICK if quick else Sizes())
        measure_cpu(results, ours, cores)
    if "cuda" in devices:
        sizes["cuda_sizes"] = asdict(theirs := engine_cuda.QUICK if quick else engine_cuda.Sizes())
        engine_cuda.measure(results, theirs, torch.device("cuda"))
    return {
        **results.figures,
        "spread": results.spread,
        "rounds": {"repeated": results.watch.repeated, "noisy": results.watch.noisy},
        "table": results.table,
        **sizes,
        "machine": machine(devices, cores),
    }


def measure_cpu(results: Results, sizes: Sizes, cores: int) -> None:
    """The metrics of a CPU, each part with its threads."""
    for part, threads in (
        (measure_groups, cores),
        (measure_growth, cores),
        (measure_small, 1),
        (measure_loop, 1),
    ):
        torch.set_num_threads(threads)
        part(results, sizes, torch.device("cpu"))
    torch.set_num_threads(cores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one's figures")
    args = parser.parse_args()
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = measure([args.device] if args.device else there, quick=args.quick)
    text = json.dumps(results, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else readable(results))


if __name__ == "__main__":
    main()
