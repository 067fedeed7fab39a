"""An ordinary diffusion model by another library, beside our one group.

python benchmarks/peers.py RUN --out benchmarks/digits
python benchmarks/peers.py RUN --out FOLDER --only DiT --split test --training-images 10000

The networks of `diffusers` get the data, the parameters, the images seen, the averaging of weights
and the learning-rate schedule that the run had; each is trained with several peak learning rates.
Everything is measured with the same features and labels. A training that was stopped goes on. Of a
run that is not finished the settings count, and its own row is left out: a bench has it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from rolldiff import Decoder
from rolldiff.evaluation.features import Extractor, Pixels, train_classifier
from rolldiff.evaluation.measure import extract_features
from rolldiff.evaluation.metrics import frechet_distance
from rolldiff.hub import read_checkpoint

EVERY = 200  # steps between two checkpoints


@dataclass(frozen=True)
class Task:
    """What the run did, which a peer does too.

    Attributes:
        size: side of the images in pixels.
        channels: of the images.
        patch: side of a token.
        classes: number of labels.
        parameters: of our network.
        steps: of the optimizer.
        warmup: of them, with a growing learning rate.
        ema: decay of the averaged weights.
    """

    size: int
    channels: int
    patch: int
    classes: int
    parameters: int
    steps: int
    warmup: int
    ema: float


def nearest(make: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """The network whose width, in small steps, brings it nearest to a number of parameters."""
    networks = []
    for width in range(1, 200):
        networks.append(make(width))
        if count(networks[-1]) > parameters:
            break
    return min(networks[-2:], key=lambda network: abs(count(network) - parameters))


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def dit(task: Task) -> nn.Module:
    """A diffusion transformer with the patches of ours."""

    def make(width: int) -> nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=width,
            in_channels=task.channels,
            num_layers=4,
            sample_size=task.size,
            patch_size=task.patch,
            num_embeds_ada_norm=task.classes,
        )

    return nearest(make, task.parameters)


def unet(task: Task) -> nn.Module:
    """A U-Net of two levels, or three for more than 16 pixels, with attention in the lowest one."""
    factors = (1, 1.6) if task.size <= 16 else (1, 1.6, 1.6)

    def make(width: int) -> nn.Module:
        return UNet2DModel(
            sample_size=task.size,
            in_channels=task.channels,
            out_channels=task.channels,
            layers_per_block=1,
            block_out_channels=tuple(4 * round(factor * width) for factor in factors),
            down_block_types=("DownBlock2D",) * (len(factors) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(factors) - 1),
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=task.classes,
        )

    return nearest(make, task.parameters)


def flow_loss(network: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Flow matching: the velocity from data to noise, uniform times."""
    u, eps = torch.rand(len(x)), torch.randn_like(x)
    t = u[:, None, None, None]
    y = network((1 - t) * x + t * eps, timestep=1000 * u, class_labels=label).sample
    return (y - (eps - x)).square().mean()


def eps_loss(network: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """The noise, at one of 1,000 discrete times (DDPM)."""
    t, eps = torch.randint(1000, (len(x),)), torch.randn_like(x)
    y = network(DDIMScheduler().add_noise(x, eps, t), timestep=t, class_labels=label).sample
    return (y - eps).square().mean()


@torch.no_grad()
def samples(
    network: nn.Module, label: Tensor, steps: int, *, scheduler: SchedulerMixin, shape: tuple
) -> Tensor:
    """Noise to images, by the steps of a scheduler."""
    scheduler.set_timesteps(steps)
    x_t = torch.randn(len(label), *shape)
    for t in scheduler.timesteps:
        y = network(x_t, timestep=t.expand(len(label)), class_labels=label).sample
        x_t = scheduler.step(y, t, x_t).prev_sample
    return x_t


def ddim() -> SchedulerMixin:
    """DDIM without noise, without clipping the estimates."""
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


@dataclass(frozen=True)
class Peer:
    """How another library's model is made, trained and sampled."""

    name: str
    make: Callable[[Task], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    scheduler: Callable[[], SchedulerMixin]


PEERS = (
    Peer("diffusers DiT, flow matching", dit, flow_loss, FlowMatchEulerDiscreteScheduler),
    Peer("diffusers U-Net, DDPM and DDIM", unet, eps_loss, ddim),
)


def train(peer: Peer, rate: float, *, task: Task, data: Any, kept: Path) -> nn.Module:
    """Averaged weights after some steps: warm-up, then a cosine, as `rolldiff train` does."""
    torch.manual_seed(0)
    network = peer.make(task).train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(task.ema))
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / task.warmup, total_iters=task.warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps - task.warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [task.warmup])
    parts = {"network": network, "average": average, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        done = state["done"]
    data.load_state_dict({"batches": done})
    bar = tqdm(data.train_dataloader(), f"{peer.name} {rate}", initial=done, total=task.steps)
    for image, label in bar:
        loss = peer.loss(network, image, label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if done >= task.warmup:
            average.update_parameters(network)
        done += 1
        if done % EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"random": torch.get_rng_state(), "done": done}
            torch.save(state, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
    return average.module.eval()


@dataclass(frozen=True)
class Ruler:
    """What images are compared with.

    Attributes:
        label: of the images; samples get the same ones.
        extractors: the features.
        real: of the images compared with, by the names of metrics.
    """

    label: Tensor
    extractors: Sequence[Extractor]
    real: Mapping[str, Tensor]

    def measure(
        self, draw: Callable[[Tensor, int, int], Tensor], *, steps: list[int], seeds: int
    ) -> Iterator[dict[str, object]]:
        """Distances by steps, each over some seeds."""
        for number in steps:
            values: dict[str, list[float]] = {}
            start = time.perf_counter()
            for seed in range(seeds):
                torch.manual_seed(seed)
                parts = self.label.split(100)
                image = torch.cat([draw(label, number, seed) for label in parts])
                for extractor in self.extractors:
                    found = extract_features(image, extractor, device=torch.device("cpu"))
                    for kind in ("", "_train"):
                        key = f"{extractor.distance_name}{kind}"
                        if key in self.real:
                            distance = float(frechet_distance(self.real[key], found))
                            values.setdefault(key, []).append(distance)
            yield {"nfe": number, "seconds": (time.perf_counter() - start) / seeds} | {
                key: {
                    "mean": float(torch.tensor(v).mean()),
                    "std": float(torch.tensor(v).std()) if seeds > 1 else None,
                }
                for key, v in values.items()
            }


def ruler(config: dict[str, Any], *, split: str | None, training_images: int | None) -> Ruler:
    """The images to compare with: those of the training, or those of another split."""
    other = {} if split is None else {"split": split, "reference_images": None}
    data = instantiate(config | other)
    known = data
    if training_images is not None:
        known = instantiate(config | {"reference_images": training_images})
    extractors = [train_classifier(known.image, known.label), Pixels()]
    real = {}
    for extractor in extractors:
        for images, kind in ((data, ""), (known, "_train")):
            if kind and known is data:
                continue
            found = extract_features(images.image, extractor, device=torch.device("cpu"))
            real[f"{extractor.distance_name}{kind}"] = found
    return Ruler(data.label, extractors, real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder of `rolldiff train`")
    parser.add_argument("--out", type=Path, required=True, help="a folder for peers.json")
    parser.add_argument("--only", default="", help="peers whose name has this in it")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32], help="of sampling")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--split", help="of a hub's data; without, that of the training")
    parser.add_argument("--training-images", type=int, help="see bench.training_images")
    args = parser.parse_args()

    config = OmegaConf.to_container(OmegaConf.load(args.run / "config.yaml"))
    finished = (args.run / "summary.json").is_file()
    summary = json.loads((args.run / "summary.json").read_text()) if finished else {}
    decoder = read_checkpoint(args.run if finished else args.run / "last.ckpt", Decoder).eval()
    layout = decoder.layout
    channels, size, _ = layout.image_shape
    task = Task(
        size=size,
        channels=channels,
        patch=layout.patch,
        classes=decoder.conditioning.num_classes,
        parameters=count(decoder),
        steps=summary.get("steps", config["max_steps"]),
        warmup=config["lit"]["warmup_steps"],
        ema=config["callbacks"]["ema"]["decay"],
    )
    data = instantiate(config["data"] | {"max_steps": task.steps})
    against = ruler(config["data"], split=args.split, training_images=args.training_images)
    args.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {}

    def measured(name: str, parameters: int, draw: Callable[[Tensor, int, int], Tensor]) -> None:
        cells = list(against.measure(draw, steps=args.steps, seeds=args.seeds))
        table[name] = {"parameters": parameters, "cells": cells}
        card = {
            "images_seen": task.steps * config["batch_size"],
            "num_tokens": layout.num_tokens,
            "samples": len(against.label),
            "seeds": args.seeds,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "table": table,
        }
        (args.out / "peers.json").write_text(json.dumps(card, indent=1) + "\n")

    def ours(label: Tensor, steps: int, seed: int) -> Tensor:
        return decoder.decode(label, steps=steps, seed=int(torch.randint(2**31, ()))).image

    if finished:
        measured("rolldiff, num_groups 1", task.parameters, ours)
    for number, peer in enumerate(p for p in PEERS if args.only in p.name):
        for rate in args.rates:
            kept = args.out / f"peer-{number}-{rate:g}.ckpt"
            network = train(peer, rate, task=task, data=data, kept=kept)

            def theirs(
                label: Tensor, steps: int, seed: int, peer: Peer = peer, net: nn.Module = network
            ) -> Tensor:
                shape = tuple(layout.image_shape)
                return samples(net, label, steps, scheduler=peer.scheduler(), shape=shape)

            measured(f"{peer.name}, rate {rate:g}", count(network), theirs)
    print("| model | parameters | " + " | ".join(f"NFE {n}" for n in args.steps) + " |")
    print("|---|---" + "|---" * len(args.steps) + "|")
    for name, row in table.items():
        shown = [
            f"{c['fd_classifier']['mean']:.3g} / {c['fd_pixels']['mean']:.3f}" for c in row["cells"]
        ]
        print(f"| {name} | {row['parameters']:,} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
