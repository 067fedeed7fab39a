"""Train, sweep and benchmark on a folder of photographs, by the commands of `rolldiff`.

python docs/learn/own_photographs.py [FOLDER]

Without a folder it cuts 96 squares out of the photographs that scikit-image ships. Everything is
written to the new folder `own_photographs`.
"""

import csv
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image

from rolldiff.data import Folder
from rolldiff.evaluation.metrics import pixel_distance

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg")
PHOTOGRAPHS += ("ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")


def cut_squares(folder, count=12, side=128):
    """Write random squares of the eight colour photographs in scikit-image's package."""
    import skimage

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for i in range(count):
            left, top = (int(random.integers(size - side + 1)) for size in photograph.size)
            square = photograph.crop((left, top, left + side, top + side))
            square.save(folder / f"{Path(name).stem}_{i}.png")


def rolldiff(*arguments, killed_when=None):
    """Print a command and run it; kill it as soon as a condition holds. Was it killed?"""
    print(f"\n$ {shlex.join(['rolldiff', *arguments])}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "rolldiff", *arguments])
    while process.poll() is None:
        if killed_when is not None and killed_when():
            process.kill()
            process.wait()
            print("(killed)", flush=True)
            return True
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return False


def lines(path):
    """The lines of a file, which need not exist."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def print_table(*rows):
    """Print rows as Markdown; the first is the head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    print("", head, "|---" * len(rows[0]) + "|", *body, sep="\n", flush=True)


def distances_of_halves(folder, image_size, *, splits=10):
    """The Fréchet distance between two sets of your photographs, by the size of the sets."""
    images = Folder(path=folder, image_size=image_size, channels=3).image
    generator, size, found = torch.Generator().manual_seed(0), len(images) // 2, {}
    while size >= 2:
        orders = [torch.randperm(len(images), generator=generator) for _ in range(splits)]
        pairs = [(images[order[:size]], images[order[-size:]]) for order in orders]
        found[size] = fmean(pixel_distance(a, b) for a, b in pairs)
        size //= 2
    return found


def main(
    folder=None,
    work=Path("own_photographs"),
    out=Path(__file__).parent / "pictures",
    *,
    steps=600,
    sweep_steps=200,
    seeds=(0, 1, 2),
    more=(),
):
    """Go from a folder of photographs to a report."""
    if folder is None:
        cut_squares(folder := work / "photographs")
    run, sweep, bench = work / "run", work / "sweep", work / "bench"

    # A small network for one, two and four groups; the first attempt is killed.
    data = ["data=folder", f"data.path={folder}", "data.image_size=32", "batch_size=32"]
    small = ["layout.patch=4", "report.samples=96", "report.steps=4", *more]
    train = [*data, *small, "training.num_groups=[1,2,4]"]
    often = "callbacks.checkpoint.every_n_train_steps=50"
    command = ["train", *train, f"max_steps={steps}", often, f"run_dir={run}"]
    if rolldiff(*command, killed_when=lambda: any(run.glob("checkpoints/step-*.ckpt"))):
        rolldiff("train", f"resume={run}")

    # Two settings with two values each: four short trainings, each in its own folder.
    choices = ["training.num_groups=[1],[1,2,4]", "optimizer.lr=5e-4,2e-3"]
    short = [f"max_steps={sweep_steps}", "progress=false"]
    rolldiff("train", "-m", *data, *small, *choices, *short, f"hydra.sweep.dir={sweep}")
    with (sweep / "sweep.csv").open(newline="", encoding="utf-8") as file:
        jobs = list(csv.DictReader(file))
    settings = ["training.num_groups", "optimizer.lr"]
    numbers = ["reported.fd_pixels.1", "objective"]
    rows = [[*map(job.get, settings), *(f"{float(job[n]):.0f}" for n in numbers)] for job in jobs]
    print_table(settings + numbers, *rows)

    # The checkpoint under many settings; killed after two of them, and called again.
    settings = ["bench.num_groups=[1,2,4]", "bench.overlap=[0,0.5]", "bench.steps=[4,8]"]
    settings += ["bench.features=[pixels]", f"bench.seeds=[{','.join(map(str, seeds))}]"]
    results = bench / "results.jsonl"
    command = ["bench", f"ckpt={run}", *settings, f"run_dir={bench}"]
    if rolldiff(*command, killed_when=lambda: len(lines(results)) >= 2):
        rolldiff(*command)

    halves = distances_of_halves(folder, 32)
    split_half = next(iter(halves.values()))
    rows = []
    for record in map(json.loads, lines(results)):
        distance = record["metrics"]["fd_pixels"]
        spread = "" if distance["std"] is None else f" ± {distance['std']:.1f}"
        settings = [record[name] for name in ("num_groups", "overlap", "steps", "nfe", "tokens")]
        ratio = f"{distance['mean'] / split_half:.1f}"
        rows.append(
            [*settings, f"{record['seconds']:.2f}", f"{distance['mean']:.1f}{spread}", ratio]
        )
    names = ["num_groups", "overlap", "steps", "network calls", "tokens", "seconds"]
    print_table([*names, "distance", "over split-half"], *sorted(rows))
    print_table(["images in each set", "distance"], *((n, f"{d:.1f}") for n, d in halves.items()))
    shutil.copy(bench / "cost.png", Path(out) / "own_photographs.png")
    shutil.copy(run / "samples.png", Path(out) / "own_photographs_samples.png")


if __name__ == "__main__":
    main(*sys.argv[1:2])
