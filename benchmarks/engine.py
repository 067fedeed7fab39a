"""What grouping costs: decodes with the exact cache, without it, and in one group.

    python benchmarks/engine.py                                     a table
    python benchmarks/engine.py --json                              the same as JSON
    python benchmarks/engine.py --out benchmarks/results/NAME.json  and write it
    python benchmarks/engine.py --quick                             tiny sizes, to try the card

Random weights, nothing to download. All of it runs in one process. What is compared takes turns and
a ratio is the median of the ratios of the turns, so a noisy machine hurts both sides alike.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_peers
import torch
from torch import Tensor, nn

from rolldiff import Decoder, Patches, Training, Transformer

# What each figure must reach on two CPU cores: at least, at most.
REACH = {
    "g16_cached_over_joint": (0, 1.5),
    "g16_uncached_over_cached": (15, math.inf),
    "g64_cached_over_joint": (0, 2.5),
    "overlap_half_cached_over_joint": (0, 1.6),
    "first_group_over_total": (0, 0.1),
    "loop_overhead": (0, 1.03),
    "loop_overhead_us": (-math.inf, 40),
    "small_g4_cached_over_joint": (0, 1.3),
    "small_g16_cached_over_joint": (0, 2.5),
    "max_relative_difference": (0, 1e-5),
    "growth_g16_minus_joint": (-math.inf, 0),
}

Turns = dict[str, list[float]]
Cases = dict[str, Callable[[], object]]


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


@dataclass
class Card:
    """Each figure with its range over the turns, and the table of the README."""

    figures: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)

    def put(self, key: str, values: Sequence[float]) -> None:
        self.figures[key] = statistics.median(values)
        self.spread[key] = (min(values), max(values))

    def ratio(self, key: str, turns: Turns, over: str, under: str) -> None:
        pairs = zip(turns[over], turns[under], strict=True)
        self.put(key, [a / b for a, b in pairs])


def in_turns(cases: Cases, turns: int, *, device: torch.device) -> Turns:
    """Seconds of each case, `turns` times, one after another; a first time is not counted."""
    seconds: Turns = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, case in cases.items():
            start = _now(device)
            case()
            if turn:
                seconds[name].append(_now(device) - start)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def decoder(side: int, width: int, depth: int, heads: int, device: torch.device) -> Decoder:
    """Random weights that let every token matter to every other."""
    torch.manual_seed(0)
    layout = Patches(side, channels=3, patch=1)
    model = Decoder(
        layout,
        Transformer(layout, width=width, depth=depth, heads=heads),
        prediction="velocity",
        training=Training(num_groups=[g for g in (1, 4, 16, 64, 256, 1024) if g <= side**2]),
    )
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.03)
    model.to(device).eval()
    if device.type == "cuda":
        model.compile()
    return model


def bare_loop(model: Decoder, batch: int, steps: int) -> Callable[[], Tensor]:
    """Euler's rule around the network of a velocity, and nothing else."""
    backbone, layout, device = model.backbone, model.layout, model.device
    noise = torch.randn(batch, layout.num_tokens, layout.token_dim, device=device)
    order = torch.arange(layout.num_tokens, device=device)
    times = torch.linspace(1, 0, steps + 1, device=device)

    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else None

    @torch.no_grad()
    @torch.autocast(device.type, dtype, enabled=cuda)
    def loop() -> Tensor:
        x_t, time = noise, backbone.embed_time(times)
        context = backbone.prepare(order, torch.zeros_like(order), batch=batch, dtype=dtype)
        for i in range(steps):
            x_t = x_t - backbone(x_t, time[i : i + 1], context) / steps
        return x_t

    return loop


class Pointwise(nn.Module):
    """A network that costs nothing, to see what the loop around it does."""

    causal = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def embed_time(self, t: Tensor) -> Tensor:
        return t[..., None]

    def prepare(self, *place: Any, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(cached=None)

    def forward(self, x_t: Tensor, time: Tensor, context: Any, start: int = 0) -> Tensor:
        return self.linear(x_t) + time


def measure_groups(card: Card, sizes: Sizes, device: torch.device) -> None:
    """One network, decoded in few and in many groups."""
    model = decoder(sizes.side, sizes.width, sizes.depth, sizes.heads, device)
    batch, steps = sizes.batch, sizes.steps

    def decode(num_groups: int, overlap: float = 0.0, *, cache: bool = True) -> Callable:
        return lambda: model.decode(
            num_images=batch,
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            seed=0,
            cache=cache,
        )

    turns = in_turns(
        {
            "bare": bare_loop(model, batch, steps),
            "joint": decode(1),
            "g16": decode(16),
            "half": decode(16, 0.5),
            "g64": decode(64),
        },
        sizes.turns,
        device=device,
    )
    card.ratio("g16_cached_over_joint", turns, "g16", "joint")
    card.ratio("g64_cached_over_joint", turns, "g64", "joint")
    card.ratio("overlap_half_cached_over_joint", turns, "half", "joint")
    card.ratio("loop_overhead", turns, "joint", "bare")
    slow = in_turns({"plain": decode(16, cache=False), "g16": decode(16)}, 1, device=device)
    card.ratio("g16_uncached_over_cached", slow, "plain", "g16")

    card.put("first_group_over_total", [_first(model, sizes, device) for _ in range(sizes.turns)])
    differences = []
    for overlap in (0.0, 0.5):
        kept, plain = (decode(16, overlap, cache=cache)().image for cache in (True, False))
        differences.append(((kept - plain).norm() / plain.norm()).item())
    card.put("max_relative_difference", [max(differences)])

    for num_groups in sizes.groups:
        decoded = decode(num_groups)()
        card.table.append({"num_groups": num_groups, "overlap": 0.0, **asdict(decoded.cost)})
        card.table[-1]["images"] = batch
    pixel = card.table[-1]["seconds"] / batch
    card.put("pixel_ar_seconds_per_image", [pixel])
    card.put("pixel_ar_tokens_per_second", [card.table[-1]["tokens"] / pixel])
    for overlap, cache in ((0.5, True), (0.0, False)):
        cost = decode(16, overlap, cache=cache)().cost
        card.table.append({"num_groups": 16, "overlap": overlap, **asdict(cost), "images": batch})


def _first(model: Decoder, sizes: Sizes, device: torch.device) -> float:
    """Seconds to the first finished group of 16, over seconds to the last."""
    start, first = _now(device), None
    frames = model.stream(
        num_images=sizes.batch, num_groups=16, steps=sizes.steps, seed=0, preview=False
    )
    for frame in frames:
        if first is None and frame.finished.any():
            first = _now(device) - start
    assert first is not None
    return first / (_now(device) - start)


def measure_small(card: Card, sizes: Sizes, device: torch.device) -> None:
    """Batch 1, where a call costs more than its tokens; and the peers beside it."""
    shape = (sizes.small_side, sizes.small_width, sizes.depth, sizes.small_heads)
    model, steps = decoder(*shape, device), sizes.small_steps
    cases: Cases = {
        f"g{num_groups}": (
            lambda num_groups=num_groups: model.decode(num_groups=num_groups, steps=steps, seed=0)
        )
        for num_groups in (1, 4, 16)
    }
    found = engine_peers.loops(*shape, steps=steps, device=device)
    turns = in_turns(cases | found, 2 * sizes.turns, device=device)
    for name in ("g4", "g16"):
        card.ratio(f"small_{name}_cached_over_joint", turns, name, "g1")
    card.put("small_joint_seconds", turns["g1"])
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
    turns = in_turns(cases, 5 * sizes.turns, device=device)

    def a_step(name: str) -> list[float]:
        pairs = zip(turns[f"{name} {long}"], turns[f"{name} {short}"], strict=True)
        return [(a - b) / (long - short) * 1e6 for a, b in pairs]

    ours, bare = a_step("ours"), a_step("bare")
    card.put("loop_overhead_us", [a - b for a, b in zip(ours, bare, strict=True)])
    card.put("bare_loop_us", bare)


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
    turns = in_turns(cases, sizes.few, device=device)
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


def measure(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The whole card."""
    card, cores = Card(), torch.get_num_threads()
    for part, threads in (
        (measure_groups, cores),
        (measure_growth, cores),
        (measure_small, 1),
        (measure_loop, 1),
    ):
        torch.set_num_threads(threads)
        part(card, sizes, device)
    torch.set_num_threads(cores)
    prefix = "cuda_" if device.type == "cuda" else ""
    return {
        **{prefix + key: value for key, value in card.figures.items()},
        "spread": {prefix + key: value for key, value in card.spread.items()},
        "table": card.table,
        "sizes": asdict(sizes),
        "machine": _machine(device, cores),
    }


def _machine(device: torch.device, cores: int) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    return {
        "device": name,
        "threads": {"groups and growth": cores, "small and loop": 1},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def readable(card: dict[str, Any]) -> str:
    """The card as two tables."""
    machine = card["machine"]
    threads = ", ".join(f"{count} for {what}" for what, count in machine["threads"].items())
    lines = [f"{machine['device']}, torch {machine['torch']}, threads: {threads}", ""]
    for key, (low, high) in card["spread"].items():
        least, most = REACH.get(key.removeprefix("cuda_"), (None, None))
        wanted = ""
        if least is not None and most is not None:
            rule = f"at most {most:g}" if most < math.inf else f"at least {least:g}"
            wanted = f"{rule}: {'reached' if least <= card[key] <= most else 'MISSED'}"
        lines.append(f"{key:38} {card[key]:10.4g}  ({low:.4g} … {high:.4g})  {wanted}".rstrip())
    lines += ["", "num_groups  overlap  cached     nfe  tokens  seconds"]
    lines += [
        f"{row['num_groups']:10}  {row['overlap']:7g}  {row['cached']!s:6}  {row['nfe']:6}"
        f"  {row['tokens']:6}  {row['seconds']:7.2f}"
        for row in card["table"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    card = measure(QUICK if asked.quick else Sizes(), torch.device(asked.device))
    text = json.dumps(card, indent=2)
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text if asked.json else readable(card))


if __name__ == "__main__":
    main()
