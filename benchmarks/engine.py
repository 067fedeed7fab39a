"""What grouping costs: decodes with the exact cache, without it, and in one group.

    python benchmarks/engine.py                                     a table
    python benchmarks/engine.py --json                              the same as JSON
    python benchmarks/engine.py --out benchmarks/results/NAME.json  and write it
    python benchmarks/engine.py --quick                             tiny sizes, to try the card
    python benchmarks/engine.py --device cuda                       a GPU alone, without the CPU

Where there is a GPU, its figures are added as `cuda_…`, see `engine_cuda.py`.

Random weights, nothing to download. All of it runs in one process. What is compared takes turns and
a ratio is the median of the ratios of the turns; turns that other work on the machine disturbed are
taken again, see `engine_turns.py`.
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
from engine_card import Card, machine, readable
from engine_loops import Pointwise, bare_loop, decoder, every_token, products
from engine_turns import Cases

from rolldiff import Decoded, Decoder, Patches


@dataclass(frozen=True)
class Sizes:
    """The networks and decodes of the card; sides are in tokens, one token a pixel."""

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
    turns: int = 7
    few: int = 3


QUICK = Sizes(8, 24, 2, 2, 2, 2, 8, 24, 2, 2, (4, 8), (1, 4, 16, 64), 2, 1)


def measure_groups(card: Card, sizes: Sizes, device: torch.device) -> None:
    """One network, decoded in few and in many groups."""
    model = decoder(sizes.side, sizes.width, sizes.depth, sizes.heads, device)
    batch, steps = sizes.batch, sizes.steps

    def decode(num_groups: int, overlap: float = 0.0, *, cache: bool = True) -> Decoded:
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
    turns = card.watch.turns(joint, 4 * sizes.turns, device=device)
    card.ratio("loop_overhead", turns, "joint", "bare")
    turns = card.watch.turns(
        {
            "joint": lambda: decode(1),
            "g16": lambda: decode(16),
            "half": lambda: decode(16, 0.5),
            "g64": lambda: decode(64),
        },
        sizes.turns,
        device=device,
    )
    card.ratio("g16_cached_over_joint", turns, "g16", "joint")
    card.ratio("g64_cached_over_joint", turns, "g64", "joint")
    card.ratio("overlap_half_cached_over_joint", turns, "half", "joint")
    costs = [decode(16).cost for _ in range(sizes.turns)]
    card.put("first_group_over_total", [c.seconds_to_first_group / c.seconds for c in costs])

    differences, seconds = [], []
    for overlap in (0.0, 0.5):
        kept, plain = decode(16, overlap), decode(16, overlap, cache=False)
        differences.append(((kept.image - plain.image).norm() / plain.image.norm()).item())
        seconds.append(plain.cost.seconds / kept.cost.seconds)
    card.put("max_relative_difference", [max(differences)])
    card.put("g16_uncached_over_cached", seconds[:1])
    everything = card.watch.turns(
        {"all": every_token(model, 16, sizes.batch, sizes.steps), "g16": lambda: decode(16)},
        1,
        device=device,
    )
    card.ratio("g16_every_token_over_cached", everything, "all", "g16")

    for num_groups in sizes.groups:
        decode(num_groups)
    card.table = [row | {"images": batch} for _, row in sorted(rows.items(), key=_by_groups)]
    pixel = rows[sizes.groups[-1], 0.0, True]
    card.put("pixel_ar_seconds_per_image", [pixel["seconds"] / batch])
    card.put("pixel_ar_tokens_per_second", [pixel["tokens"] * batch / pixel["seconds"]])


def _by_groups(item: tuple[tuple, Any]) -> tuple:
    (num_groups, overlap, cache), _ = item
    return not cache, num_groups, overlap


def measure_small(card: Card, sizes: Sizes, device: torch.device) -> None:
    """Batch 1, where a call costs more than its tokens; and the peers beside it."""
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
    turns = card.watch.turns(cases | alone, 4 * sizes.turns, device=device)
    for name in ("g4", "g16"):
        card.ratio(f"small_{name}_cached_over_joint", turns, name, "g1")
        card.ratio(f"small_{name}_products_over_joint", turns, f"{name} alone", "g1 alone")
    card.put("small_joint_seconds", turns["g1"])
    found = engine_peers.loops(*shape, steps=steps, device=device)
    turns = card.watch.turns(found | {"g1": cases["g1"]}, sizes.few, device=device)
    for name in found:
        card.ratio(f"small_{name}_over_joint", turns, name, "g1")


def measure_loop(card: Card, sizes: Sizes, device: torch.device) -> None:
    """Microseconds that a step costs beyond a bare loop; what a decode costs once is left out."""
    layout = Patches(4, channels=3)
    model = Decoder(layout, Pointwise(3), prediction="velocity").to(device)
    short, long = 20, 520
    cases: Cases = {}
    for steps in (short, long):
        cases[f"ours {steps}"] = lambda steps=steps: model.decode(steps=steps, seed=0)
        cases[f"bare {steps}"] = bare_loop(model, 1, steps)
        if (theirs := engine_peers.flow_loop(model, steps)) is not None:
            cases[f"diffusers {steps}"] = theirs
    turns = card.watch.turns(cases, 5 * sizes.turns, device=device)

    def a_step(name: str) -> list[float]:
        pairs = zip(turns[f"{name} {long}"], turns[f"{name} {short}"], strict=True)
        return [(a - b) / (long - short) * 1e6 for a, b in pairs]

    ours, bare = a_step("ours"), a_step("bare")
    card.put("loop_overhead_us", [a - b for a, b in zip(ours, bare, strict=True)])
    card.put("bare_loop_us", bare)
    if f"diffusers {short}" in cases:
        pairs = zip(a_step("diffusers"), bare, strict=True)
        card.put("diffusers_loop_overhead_us", [a - b for a, b in pairs])


def measure_growth(card: Card, sizes: Sizes, device: torch.device) -> None:
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
    turns = card.watch.turns(cases, sizes.few, device=device)
    tokens = [model.layout.num_tokens for model in models]

    def exponents(num_groups: int) -> list[float]:
        logs = [math.log(n) for n in tokens]
        found = []
        for turn in range(sizes.few):
            seconds = [math.log(turns[f"{n} in {num_groups}"][turn]) for n in tokens]
            found.append(statistics.linear_regression(logs, seconds).slope)
        return found

    joint, grouped = exponents(1), exponents(16)
    card.put("growth_joint", joint)
    card.put("growth_g16", grouped)
    card.put("growth_g16_minus_joint", [b - a for a, b in zip(joint, grouped, strict=True)])


def measure(devices: Sequence[str], *, quick: bool = False) -> dict[str, Any]:
    """The whole card, or that of some devices."""
    card, cores, sizes = Card(), torch.get_num_threads(), {}
    if "cpu" in devices:
        sizes["sizes"] = asdict(ours := QUICK if quick else Sizes())
        measure_cpu(card, ours, cores)
    if "cuda" in devices:
        sizes["cuda_sizes"] = asdict(theirs := engine_cuda.QUICK if quick else engine_cuda.Sizes())
        engine_cuda.measure(card, theirs, torch.device("cuda"))
    return {
        **card.figures,
        "spread": card.spread,
        "turns": {"again": card.watch.again, "disturbed": card.watch.disturbed},
        "table": card.table,
        **sizes,
        "machine": machine(devices, cores),
    }


def measure_cpu(card: Card, sizes: Sizes, cores: int) -> None:
    """The figures of a CPU, each part with its threads."""
    for part, threads in (
        (measure_groups, cores),
        (measure_growth, cores),
        (measure_small, 1),
        (measure_loop, 1),
    ):
        torch.set_num_threads(threads)
        part(card, sizes, torch.device("cpu"))
    torch.set_num_threads(cores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one's figures")
    asked = parser.parse_args()
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    card = measure([asked.device] if asked.device else there, quick=asked.quick)
    text = json.dumps(card, indent=2)
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text if asked.json else readable(card))


if __name__ == "__main__":
    main()
