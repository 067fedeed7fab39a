"""Fine-tune a network for one group to all settings, against training for all from nothing.

    python benchmarks/finetune.py runs/finetune --seeds 0 1
    python benchmarks/finetune.py runs/finetune --table

All trainings are of the digits, count optimizer steps, and run one after another. What shrinks with
their length are the warm-up, a fifteenth of it, and the memory of the averaged weights, a third.
Each has a folder; run again, the command goes on with what is missing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUPS = [1, 2, 4, 8, 16]
ALL = f"training.num_groups={GROUPS}".replace(" ", "")
ONE = "training.num_groups=[1]"
RATE = 5e-3  # of the recipe of the digits
METRICS = ["fd_pixels", "fd_classifier", "seams"]


@dataclass(frozen=True)
class Arm:
    """A way to a checkpoint.

    Attributes:
        name: of its folder.
        share: its steps, over those of the network for one group.
        rate: the learning rate.
        settings: of `rolldiff train`.
        tuned: whether it starts from the network for one group, and is given all settings.
        rank: of LoRA adapters; 0 for none.
    """

    name: str
    share: float
    rate: float = RATE
    settings: tuple[str, ...] = ()
    tuned: bool = True
    rank: int = 0

    @property
    def images(self) -> float:
        """All images that its weights have seen, over those of the network for one group."""
        return self.share + self.tuned


FIRST = Arm("one-group", 1, settings=(ONE,), tuned=False)
ARMS = [
    FIRST,
    Arm("nothing-1.2", 1.2, settings=(ALL,), tuned=False),
    *(Arm(f"tuned-0.2-{rate:g}", 0.2, rate) for rate in (1e-2, 5e-3, 1.5e-3, 5e-4)),
    Arm("tuned-0.1-0.005", 0.1),
    Arm("half-0.2-0.005", 0.2, settings=("freeze=[backbone.blocks.0,backbone.blocks.1]",)),
    Arm("lora-0.2-0.02", 0.2, 2e-2, rank=8),
]


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        steps: of the network for one group.
        train: further settings of every training.
        bench: further settings of every measurement.
    """

    steps: int = 1500
    train: tuple[str, ...] = ()
    bench: tuple[str, ...] = ("bench.seeds=[0]", "bench.samples=1000", "bench.batch_size=1000")


QUICK = Sizes(
    steps=10,
    train=("nn.width=16", "nn.depth=2", "nn.heads=1", "batch_size=8"),
    bench=("bench.seeds=[0]", "bench.samples=16", "bench.pairs=16", "bench.features=[pixels]"),
)


def command(*words: str) -> None:
    """A command of rolldiff, in a process of its own."""
    subprocess.run([sys.executable, "-m", "rolldiff", *words], check=True)


def overrides(arm: Arm, folder: Path, *, seed: int, sizes: Sizes) -> list[str]:
    """The settings of a training by `rolldiff train`."""
    steps = round(arm.share * sizes.steps)
    start = [f"init={folder.parent / FIRST.name}", ALL] if arm.tuned else []
    return [
        "experiment=digits",
        "max_time=null",
        f"max_steps={steps}",
        f"optimizer.lr={arm.rate:g}",
        f"lit.warmup_steps={steps // 15}",
        f"callbacks.ema.decay={1 - 3 / max(steps, 4):.5f}",
        f"seed={seed}",
        "callbacks.samples=null",
        "+trainer.limit_val_batches=0",
        "report.num_groups=[1]",  # `rolldiff bench` measures
        "report.steps=1",
        "report.samples=16",
        *sizes.train,
        *arm.settings,
        *start,
    ]


def trained(arm: Arm, folder: Path, *, seed: int, sizes: Sizes) -> None:
    """Train, or go on with a training."""
    if (folder / "summary.json").is_file():
        return
    settings = overrides(arm, folder, seed=seed, sizes=sizes)
    if arm.rank:
        adapted(folder, settings, rank=arm.rank)
    elif (folder / "checkpoints").is_dir():
        command("train", f"resume={folder}")
    else:
        command("train", f"run_dir={folder}", *settings)


def adapted(folder: Path, settings: list[str], *, rank: int) -> None:
    """Train LoRA adapters of all linear layers of the blocks, and merge them into the weights."""
    import lightning as L
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    from rolldiff import Decoder
    from rolldiff.cli import config_dir
    from rolldiff.training.initial import start_from

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"run_dir={folder}", "num_classes=10", *settings])
    L.seed_everything(cfg.seed, verbose=False)
    decoder = instantiate(cfg.decoder, _convert_="all")
    start_from(decoder, Decoder.from_pretrained(cfg.init))
    layers = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv", "out", "up", "down"])
    adapters = LoraModel(decoder.backbone, layers, "default")
    count = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    lit = instantiate(cfg.lit, model=decoder.train(), _convert_="all")
    trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(cfg.callbacks.ema)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    trainer.fit(lit, datamodule=instantiate(cfg.data, _convert_="all"))
    decoder.backbone = adapters.merge_and_unload()
    decoder.eval().save_pretrained(folder)
    summary = {"steps": trainer.global_step, "trained_parameters": count}
    (folder / "summary.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")


def measured(arm: Arm, folder: Path, *, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The lines of a benchmark: all group counts, one after another and half overlapping."""
    command(
        "bench",
        f"ckpt={folder}",
        "data=digits",
        f"bench.num_groups={GROUPS}".replace(" ", ""),
        "bench.overlap=[0,0.5]",
        "bench.steps=[16]",
        "bench.joint_steps=[]",
        *sizes.bench,
    )
    for line in (folder / "bench/results.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def line(arm: Arm, found: dict[str, Any], *, seed: int, sizes: Sizes) -> dict[str, Any]:
    """What is kept of a line of a benchmark."""
    means = {name: found["metrics"][name]["mean"] for name in METRICS if name in found["metrics"]}
    return {
        "arm": arm.name,
        "seed": seed,
        "steps": round(arm.share * sizes.steps),
        "images": arm.images,
        "rate": arm.rate,
        "num_groups": found["num_groups"],
        "overlap": found["overlap"],
        **means,
        "noise_seeds": found["seeds"],
        "samples": found["samples"],
        "device": found["device"],
        "threads": found["threads"],
        "torch": found["versions"]["torch"],
        "checkpoint": found["checkpoint"],
        "extractors": found["extractors"],
    }


def run(folder: Path, out: Path, *, seeds: list[int], sizes: Sizes, only: list[str]) -> None:
    """Trainings and measurements, whose lines replace those that a file has of them."""
    lines = read(out) if out.is_file() else []
    for seed in seeds:
        for arm in ARMS:
            if only and arm is not FIRST and arm.name not in only:
                continue
            place = folder / str(seed) / arm.name
            place.parent.mkdir(parents=True, exist_ok=True)
            trained(arm, place, seed=seed, sizes=sizes)
            found = list(measured(arm, place, sizes=sizes))
            lines = [each for each in lines if (each["arm"], each["seed"]) != (arm.name, seed)]
            lines += [line(arm, each, seed=seed, sizes=sizes) for each in found]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """A row per way to a checkpoint; means over the trainings, and half the range between them."""
    groups = sorted({each["num_groups"] for each in lines})
    metrics = [name for name in METRICS if name in lines[0] and name != "seams"]
    head = ["training", "images", "rate", "seeds", *(f"{g}" for g in groups)]
    head += [f"{name}, all settings" for name in metrics] + ["seams"]
    rows = [head, ["---"] * len(head)]
    found = {each["arm"] for each in lines}
    for name in [arm.name for arm in ARMS if arm.name in found]:
        own = [each for each in lines if each["arm"] == name]
        seeds = sorted({each["seed"] for each in own})
        cells = [name, f"{own[0]['images']:g}", f"{own[0]['rate']:g}", str(len(seeds))]
        for g in groups:
            values = [e["fd_pixels"] for e in own if e["num_groups"] == g and e["overlap"] == 0]
            cells.append(f"{statistics.mean(values):.3f}")
        for metric in metrics:
            means = [statistics.mean(e[metric] for e in own if e["seed"] == s) for s in seeds]
            spread = f" ± {(max(means) - min(means)) / 2:.3f}" if len(seeds) > 1 else ""
            cells.append(f"{statistics.mean(means):.3f}{spread}")
        seams = [e["seams"] for e in own if e.get("seams") is not None]
        cells.append(f"{min(seams):.3f} … {max(seams):.3f}" if seams else "–")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the trainings")
    parser.add_argument("--out", type=Path, help="the file of results; FOLDER/finetune.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument(
        "--only", nargs="+", default=[], help="names of trainings, beside the first"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    args = parser.parse_args()
    out = args.out or args.folder / "finetune.jsonl"
    if not args.table:
        sizes = QUICK if args.quick else Sizes()
        run(args.folder, out, seeds=args.seeds, sizes=sizes, only=args.only)
    print(table(read(out)))


if __name__ == "__main__":
    main()
