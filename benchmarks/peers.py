"""An ordinary diffusion model by another library, beside our one group, on the digits.

python benchmarks/peers.py RUN --out benchmarks/digits

The networks of `diffusers` get as many parameters, images seen, averaged weights and learning-rate
decay as the run had; each is trained with several peak learning rates and the best one is kept for
it. Everything is measured in this one process with the same features, labels and sample counts.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from rolldiff import Decoder
from rolldiff.data import Digits
from rolldiff.evaluation.features import Pixels, train_classifier
from rolldiff.evaluation.metrics import frechet_distance

BATCH, EMA, WARMUP, CLASSES = 128, 0.998, 100, 10


def dit() -> nn.Module:
    """A diffusion transformer with 2 x 2 patches, as ours."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=19,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )


def unet() -> nn.Module:
    """A U-Net of two levels, with attention in the lower one."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 52),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=CLASSES,
    )


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


def samples(network: nn.Module, label: Tensor, steps: int, scheduler: SchedulerMixin) -> Tensor:
    """Noise to images, by the steps of a scheduler."""
    scheduler.set_timesteps(steps)
    x_t = torch.randn(len(label), 1, 8, 8)
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
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    scheduler: Callable[[], SchedulerMixin]
    rates: tuple[float, ...]


PEERS = (
    Peer(
        "diffusers DiT, flow matching",
        dit,
        flow_loss,
        FlowMatchEulerDiscreteScheduler,
        (1e-3, 3e-3),
    ),
    Peer("diffusers U-Net, DDPM and DDIM", unet, eps_loss, ddim, (1e-3, 3e-3)),
)


def train(peer: Peer, rate: float, data: Digits, steps: int) -> nn.Module:
    """Averaged weights after some steps: warm-up, then a cosine, as `rolldiff train` does."""
    torch.manual_seed(0)
    network = peer.make().train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [WARMUP])
    for done, (image, label) in enumerate(
        tqdm(data.train_dataloader(), desc=f"{peer.name} {rate}")
    ):
        loss = peer.loss(network, image, label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if done >= WARMUP:
            average.update_parameters(network)
    return average.module.eval()


@torch.no_grad()
def measured(
    draw: Callable[[Tensor, int, int], Tensor], data: Digits, extractors: dict[str, nn.Module]
) -> Iterator[dict[str, object]]:
    """Distances by steps, each over three seeds."""
    real = {name: extractor(data.image) for name, extractor in extractors.items()}
    for steps in (4, 8, 16, 32):
        values: dict[str, list[float]] = {f"fd_{name}": [] for name in extractors}
        start = time.perf_counter()
        for seed in range(3):
            image = torch.cat(
                [draw(label, steps, 10 * seed + i) for i, label in enumerate(data.label.split(600))]
            )
            for name, extractor in extractors.items():
                values[f"fd_{name}"].append(float(frechet_distance(real[name], extractor(image))))
        found = {
            key: {"mean": float(torch.tensor(v).mean()), "std": float(torch.tensor(v).std())}
            for key, v in values.items()
        }
        yield {"nfe": steps, "seconds": (time.perf_counter() - start) / 3} | found


def write(folder: Path, table: dict[str, object], steps: int, samples: int) -> None:
    card = {
        "images_seen": steps * BATCH,
        "samples": samples,
        "seeds": 3,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "table": table,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder of `rolldiff train`")
    parser.add_argument("--out", type=Path, required=True, help="a folder for peers.json")
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    steps = summary["images_seen"] // BATCH
    data = Digits(batch_size=BATCH, max_steps=steps)
    extractors = {
        "classifier": train_classifier(data.image, data.label),
        "pixels": Pixels(),
    }
    decoder = Decoder.from_pretrained(args.run).eval()

    def ours(label: Tensor, steps: int, seed: int) -> Tensor:
        return decoder.decode(label, steps=steps, seed=seed).image

    table = {
        "rolldiff, num_groups 1": {
            "parameters": summary["parameters"],
            "cells": list(measured(ours, data, extractors)),
        }
    }
    for peer in PEERS:
        for rate in peer.rates:
            network = train(peer, rate, data, steps)

            def theirs(
                label: Tensor, steps: int, seed: int, peer: Peer = peer, net: nn.Module = network
            ) -> Tensor:
                torch.manual_seed(seed)
                return samples(net, label, steps, peer.scheduler())

            table[f"{peer.name}, rate {rate:g}"] = {
                "parameters": sum(p.numel() for p in network.parameters()),
                "cells": list(measured(theirs, data, extractors)),
            }
            write(args.out, table, steps, len(data.image))
    print("| model | parameters | " + " | ".join(f"NFE {n}" for n in (4, 8, 16, 32)) + " |")
    print("|---|---|---|---|---|---|")
    for name, row in table.items():
        shown = [
            f"{c['fd_classifier']['mean']:.3g} ± {c['fd_classifier']['std']:.1g} / "
            f"{c['fd_pixels']['mean']:.3f} ± {c['fd_pixels']['std']:.3f}"
            for c in row["cells"]
        ]
        print(f"| {name} | {row['parameters']:,} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
