"""The targets of the engine benchmark, and how its results are printed."""

import math
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_rounds import Rounds, Stopwatch

# What each figure must reach on two CPU cores, and `cuda_…` on a GPU: at least, at most.
TARGETS = {
    "g16_cached_over_joint": (0, 1.5),
    "g16_every_token_over_cached": (12, math.inf),
    "g64_cached_over_joint": (0, 2.5),
    "overlap_half_cached_over_joint": (0, 1.4),
    "first_group_over_total": (0, 0.1),
    "loop_overhead": (0, 1.03),
    "loop_overhead_us": (-math.inf, 40),
    "small_g4_cached_over_joint": (0, 1.3),
    "small_g16_cached_over_joint": (0, 2.5),
    "max_relative_difference": (0, 1e-5),
    "growth_g16_minus_joint": (-math.inf, 0),
    "cuda_max_relative_difference": (0, 1e-5),
    "cuda_b1_g16_cached_over_joint": (0, 2),
    "cuda_b64_g16_cached_over_joint": (0, 1.2),
    "cuda_training_utilisation": (0.45, math.inf),
}


@dataclass
class Results:
    """Each metric with its range over the rounds, the cost table, and the stopwatch."""

    figures: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def put(self, key: str, values: Sequence[float]) -> None:
        self.figures[key] = statistics.median(values)
        self.spread[key] = (min(values), max(values))

    def ratio(self, key: str, rounds: Rounds, over: str, under: str) -> None:
        pairs = zip(rounds[over], rounds[under], strict=True)
        self.put(key, [a / b for a, b in pairs])


def machine(devices: Sequence[str], cores: int) -> dict[str, Any]:
    """The machine of the measurements."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if "cuda" in devices:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": ", ".join(_named(device) for device in devices),
        "threads": {"groups and growth": cores, "small and loop": 1} if "cpu" in devices else {},
        **versions,
        "commit": commit.stdout.strip() or "unknown",
    }


def _named(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return name


def readable(results: dict[str, Any]) -> str:
    """The results as two tables."""
    machine = results["machine"]
    threads = ", ".join(f"{count} for {what}" for what, count in machine["threads"].items())
    head = f"{machine['device']}, torch {machine['torch']}"
    repeated, noisy = results["rounds"]["repeated"], results["rounds"]["noisy"]
    lines = [f"{head}, threads: {threads}" if threads else head]
    lines += [f"noisy rounds: {repeated} repeated, {noisy} kept", ""]
    for key, (low, high) in results["spread"].items():
        wanted = ""
        if key in TARGETS:
            least, most = TARGETS[key]
            rule = f"at most {most:g}" if most < math.inf else f"at least {least:g}"
            wanted = f"{rule}: {'reached' if least <= results[key] <= most else 'MISSED'}"
        lines.append(f"{key:38} {results[key]:10.4g}  ({low:.4g} … {high:.4g})  {wanted}".rstrip())
    return "\n".join([*lines, "", markdown(results)] if results["table"] else lines)


def bounded(
    figures: Mapping[str, float],
    spread: Mapping[str, tuple[float, float]],
    targets: Mapping[str, float],
) -> str:
    """A table of figures, some of which have a target that they may reach and not exceed."""
    lines = ["| figure | median | range | target |", "|---|---|---|---|"]
    for name, (low, high) in spread.items():
        target = ""
        if name in targets:
            verdict = "reached" if figures[name] <= targets[name] else "missed"
            target = f"at most {targets[name]:g}: {verdict} "
        lines.append(f"| `{name}` | {figures[name]:.4g} | {low:.4g} … {high:.4g} | {target}|")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/cost.md."""
    lines = [
        "| num_groups | overlap | cache | nfe | tokens | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["table"]:
        overlap = f"{row['overlap']:g}" if row["num_groups"] > 1 else "–"
        lines.append(
            f"| {row['num_groups']} | {overlap} | {'yes' if row['cache'] else 'no'} "
            f"| {row['nfe']:,} | {row['tokens']:,} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines)
