"""A DiT of diffusers, trained as an ordinary diffusion model, becomes a grouped decoder.

python docs/learn/dit_grouped.py
"""

import time
import warnings
from pathlib import Path

import matplotlib
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from torch.nn import functional as F

from rolldiff import Decoder, Training
from rolldiff.data import Digits
from rolldiff.evaluation.metrics import pixel_distance
from rolldiff.integrations.dit import load_dit, to_diffusers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GROUPS = (1, 2, 4, 8, 16)
STEPS = 20  # a divisor of 1000, so that diffusers does not round its timesteps


def network(width=64, depth=2):
    """An untrained DiT for digits: 16 tokens of 2 x 2 pixels, ten labels and one for no label."""
    dit = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=depth,
        in_channels=1,
        out_channels=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    modulations = [block.norm1.linear for block in dit.transformer_blocks]
    for layer in [*modulations, dit.proj_out_1, dit.proj_out_2]:  # as DiT's own code starts
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return dit


def batches(data, steps, batch_size=128):
    """Random digits with their labels."""
    for _ in range(steps):
        index = torch.randint(len(data.image), (batch_size,))
        yield data.image[index], data.label[index]


def optimize(parameters, losses, *, steps, lr):
    """An optimizer step for each loss; the learning rate rises and falls."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def ddpm_losses(dit, data, steps):
    """The loss of an ordinary diffusion model: the noise of an image with one timestep."""
    scheduler = DDPMScheduler()
    for image, label in batches(data, steps):
        noise, t = torch.randn_like(image), torch.randint(1000, label.shape)
        x_t = scheduler.add_noise(image, noise, t)
        yield F.mse_loss(dit(x_t, t, class_labels=label).sample, noise)


@torch.no_grad()
def ddim(dit, noise, label, steps=STEPS):
    """Sample by the scheduler of diffusers."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x_t = noise
    for t in scheduler.timesteps:
        eps = dit(x_t, t.expand(len(x_t)), class_labels=label).sample
        x_t = scheduler.step(eps, t, x_t).prev_sample
    return x_t


def grouped(decoder, noise, label):
    """The same digits by each number of groups, all from the same noise."""
    found = {}
    for groups in GROUPS:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            image = decoder.decode(label, noise=noise, num_groups=groups, steps=STEPS).image
        found[groups] = image.clamp(-1, 1)
        if groups == 4 and told:
            print(f"4 groups: {told[0].message}")
    return found


def variety(image, label):
    """The variance of the pixels among images of one label, summed over pixels."""
    return sum(float(image[label == c].var(0).sum()) for c in range(10)) / 10


def draw(before, after, label, out):
    """Five threes and five sevens by each number of groups, before and after the fine-tuning."""
    chosen = torch.cat([(label == c).nonzero()[:5, 0] for c in (3, 7)])
    rows = {f"groups {groups}": (before[groups], after[groups]) for groups in (1, 2, 4, 16)}
    figure = plt.figure(figsize=(13, 3.2), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.03)
    titles = ("before: trained for one group", "after: fine-tuned for all group counts")
    for side, (half, title) in enumerate(zip(halves, titles, strict=True)):
        half.suptitle(title)
        for axes, (name, images) in zip(half.subplots(4, 10), rows.items(), strict=True):
            axes[0].set_ylabel(name)
            for axis, image in zip(axes, images[side][chosen], strict=True):
                axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
                axis.set(xticks=[], yticks=[])
    figure.savefig(out / "dit_grouped.png", dpi=80)


def main(out=Path(__file__).parent / "pictures", *, steps=2000, tuning=600, samples=1000, seed=0):
    """Train a DiT, read it, measure it with groups, train it further, measure it again."""
    torch.manual_seed(seed)
    data = Digits()
    dit = network().train()
    start = time.perf_counter()
    optimize(dit.parameters(), ddpm_losses(dit, data, steps), steps=steps, lr=1e-2)
    print(f"{steps} steps as a diffusion model took {time.perf_counter() - start:.0f} s")

    first = load_dit(dit.eval(), latents=False)
    label = data.label[:samples]
    noise = torch.randn(len(label), 1, 8, 8)
    theirs = ddim(dit, noise, label)
    before = grouped(first, noise, label)
    print(f"largest difference to diffusers: {(before[1] - theirs.clamp(-1, 1)).abs().max():.0e}\n")

    start = time.perf_counter()
    decoder = Decoder(**first.config | {"training": Training(num_groups=GROUPS)}).train()
    losses = (decoder.loss(image, label) for image, label in batches(data, tuning))
    optimize(decoder.parameters(), losses, steps=tuning, lr=5e-3)
    print(f"{tuning} steps for all group counts took {time.perf_counter() - start:.0f} s")
    after = grouped(decoder.eval(), noise, label)

    again = ddim(to_diffusers(decoder), noise, label)
    print(
        f"largest difference back in diffusers: {(after[1] - again.clamp(-1, 1)).abs().max():.0e}\n"
    )

    print("| num_groups | distance before | after | variety before | after |")
    print("|---|---|---|---|---|")
    whole = variety(data.image, data.label)
    for groups in GROUPS:
        images = before[groups], after[groups]
        distances = [f"{pixel_distance(data.image, image):.2f}" for image in images]
        varieties = [f"{variety(image, label) / whole:.0%}" for image in images]
        print(f"| {' | '.join([str(groups), *distances, *varieties])} |")
    draw(before, after, label, Path(out))


if __name__ == "__main__":
    main()
