"""A training in two processes, killed at random moments: does it end with the same weights?

    python benchmarks/reliability.py --kills 20 --out benchmarks/results/reliability-cpu.json

The training is a small one on digits, on the CPU. It is run once in one process, once in two, and
then in two processes that are killed by SIGKILL again and again, one rank, all ranks or the process
that started them, and resumed. `identical` says whether all files of weights have the same bytes as
those of the two processes that were left alone.
"""

import argparse
import csv
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from rolldiff.files import write_text

SETTINGS = [
    "max_time=null",
    "batch_size=32",
    "progress=false",
    "nn.width=32",
    "nn.depth=2",
    "nn.heads=2",
    "training.num_groups=[1,2,4]",
    "data.held_out=0.5",
    "report.samples=64",
    "report.steps=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "callbacks.samples=null",
    "callbacks.checkpoint.every_n_train_steps=50",
]
VICTIMS = ("rank 0", "rank 1", "all ranks", "the launcher")


def command(folder: Path, *, steps: int, devices: int) -> list[str]:
    """The command that begins a training, or goes on with it."""
    words = [sys.executable, "-m", "rolldiff", "train"]
    begun = list(folder.glob("*.ckpt")) + list(folder.glob("checkpoints/*.ckpt"))
    if begun:
        return [*words, f"resume={folder}", "progress=false"]
    shutil.rmtree(folder, ignore_errors=True)
    return [
        *words,
        *SETTINGS,
        f"max_steps={steps}",
        f"trainer.devices={devices}",
        f"run_dir={folder}",
    ]


def children(pid: int) -> list[int]:
    """The processes of a training by their rank; none where it has not started them yet."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [p for p in map(int, text.split()) if b"spawn_main" in _words(p)]


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def killed(words: list[str], victim: str, *, wait: float) -> tuple[str, float, str]:
    """Run a command, and kill a part of it after some seconds.

    Returns:
        What was killed, empty if it had come to its end; the seconds from then until all of its
        processes were gone; and its last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            job.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            ranks = children(job.pid)
            chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "all ranks": ranks}
            if len(ranks) < 2:  # before their start, or after the end of one
                victim = "the launcher"
            targets = chosen.get(victim, [job.pid])
            start = time.monotonic()
            for pid in targets:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            job.wait()
            while any(_words(pid) for pid in ranks):
                time.sleep(0.05)
            seconds = time.monotonic() - start
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.startswith("rolldiff: ")]
            return victim, seconds, lines[-1] if lines else ""
        if job.returncode:
            errors.seek(0)
            raise SystemExit(errors.read())
        return "", 0.0, ""


def weights(folder: Path) -> bytes:
    """The bytes of the weights of a finished training."""
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    with (folder / "logs/metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # of one process as of two: the network is too small for more
    )
    with tempfile.TemporaryDirectory() as root:
        one, two = Path(root, "one"), Path(root, "two")
        for folder, devices in ((one, 1), (two, 2)):
            start = time.monotonic()
            words = command(folder, steps=options.steps, devices=devices)
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            duration = time.monotonic() - start
        kills: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        trainings, identical, seconds = 0, 0, []
        while sum(kills.values()) < options.kills or (Path(root) / f"run{trainings}").exists():
            folder = Path(root) / f"run{trainings}"
            victim = VICTIMS[sum(kills.values()) % len(VICTIMS)]
            words = command(folder, steps=options.steps, devices=2)
            over = sum(kills.values()) >= options.kills
            wait = 3600.0 if over else draw.uniform(0.1, 0.9) * duration
            victim, took, line = killed(words, victim, wait=wait)
            if victim:
                kills[victim] += 1
                seconds.append(took)
                lines["a message" if line else "no message"] += victim != "the launcher"
                print(
                    f"{victim} after {wait:.1f} s, all gone after {took:.1f} s: {line}", flush=True
                )
            if (folder / "summary.json").exists():
                trainings += 1
                identical += weights(folder) == weights(two)
                print(f"training {trainings} ended, {identical} identical", flush=True)
        a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        found = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "steps": options.steps,
            "kills": dict(kills),
            "trainings": trainings,
            "identical": identical,
            "seconds_until_gone": {
                "median": sorted(seconds)[len(seconds) // 2],
                "max": max(seconds),
            },
            "messages": dict(lines),
            "loss_difference": max(
                abs(x - y) for x, y in zip(losses(one), losses(two), strict=True)
            ),
            "weight_difference": max(float((a[name] - b[name]).abs().max()) for name in a),
        }
    write_text(options.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
