"""How probable is an image? Bits per dimension of digits, and what they tell and do not tell.

rolldiff train run_dir=RUN
python docs/learn/likelihood.py RUN
"""

import math
import sys
from pathlib import Path

import matplotlib
import torch
from omegaconf import OmegaConf

from rolldiff import Decoder
from rolldiff.data import Digits
from rolldiff.evaluation.bits import held_out

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEVELS = 17  # greys of a scan
BOUND = {"method": "bound", "levels": LEVELS}
FLOW = {"method": "ode", "levels": LEVELS, "divergence": "hutchinson", "probes": 4}


def mean(x):
    """The mean and its standard error."""
    return f"{x.mean():.3f} ± {x.std() / math.sqrt(len(x)):.3f}"


def pixels_alone(train, image):
    """Bits per dimension of a model that knows how often each pixel has each grey, and no more."""
    train, image = (((x.flatten(1) + 1) / 2 * (LEVELS - 1)).round().long() for x in (train, image))
    counts = torch.nn.functional.one_hot(train, LEVELS).sum(0) + 1  # [pixels, levels]
    p = counts / counts.sum(1, keepdim=True)
    return -p[torch.arange(image.shape[1]), image].log2().mean(1)


def by_groups(decoder, image, label, *, few, samples):
    """Bits per dimension by the number of groups: the bound of all images, the flow of a few."""
    print("| num_groups | bound | bound of the first few | flow of the first few |")
    print("|---|---|---|---|")
    for num_groups in (1, 4, 16):
        settings = {"num_groups": num_groups, "seed": 0}
        bound = decoder.log_likelihood(image, label, samples=samples, **BOUND, **settings)
        tight = decoder.log_likelihood(image[:few], label[:few], samples=256, **BOUND, **settings)
        flow = decoder.log_likelihood(image[:few], label[:few], **FLOW, **settings)
        cells = [found.bits_per_dim for found in (bound, tight, flow)]
        print(f"| {num_groups} | {' | '.join(map(mean, cells))} |", flush=True)


def changed(image, label):
    """The images and labels, changed in several ways."""
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return {
        "as scanned": (image, label),
        "wrong label": (image, (label + 1) % 10),
        "mirrored": (image.flip(3), label),
        "upside down": (image.flip(2), label),
        "negative": (-image, label),
        "pixels shuffled": (image.flatten(2)[:, :, shuffle].view_as(image), label),
        "black": (-torch.ones_like(image), label),
    }


def by_change(decoder, image, label, samples):
    """Bits per dimension of changed images, all by the same noise."""
    print("\n| images | bits per dimension | as scanned is more probable |\n|---|---|---|")
    found = {}
    for name, (x, cond) in changed(image, label).items():
        settings = {"num_groups": 4, "samples": samples, "seed": 0}
        found[name] = decoder.log_likelihood(x, cond, **BOUND, **settings).bits_per_dim
        worse = (found["as scanned"] < found[name]).double().mean()
        share = "–" if name == "as scanned" else f"{worse:.0%}"
        print(f"| {name} | {mean(found[name])} | {share} |", flush=True)
    return found


def classify(decoder, image, *, samples, common):
    """The label under which each image is most probable."""
    bits = [
        decoder.log_likelihood(
            image,
            torch.full((len(image),), label),
            num_groups=4,
            samples=samples,
            seed=0 if common else label,
            **BOUND,
        ).bits_per_dim
        for label in range(10)
    ]
    return torch.stack(bits).argmin(0)


def draw(image, found, columns=8):
    """Histograms of the bits per dimension; the most and the least probable scans."""
    figure = plt.figure(figsize=(12, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axis = left.subplots()
    for name in ("as scanned", "wrong label", "mirrored"):
        axis.hist(
            found[name].numpy(), bins=torch.arange(1.5, 5, 0.1).numpy(), alpha=0.6, label=name
        )
    axis.set(xlabel="bits per dimension (right is less probable)", ylabel="images")
    axis.legend()
    bits, order = found["as scanned"].sort()
    axes = right.subplots(2, columns)
    rows = {"most probable": slice(columns), "least probable": slice(-columns, None)}
    for row, (name, part) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, i, value in zip(row, order[part], bits[part], strict=True):
            axis.imshow(image[i, 0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="none")
            axis.set(xticks=[], yticks=[], title=f"{value:.2f}")
    return figure


@torch.no_grad()
def main(run, *, out=Path(__file__).parent / "pictures", count=200, few=8, samples=64, tested=100):
    """Bits per dimension of digits by groups, of changed digits, and a classifier made of them."""
    decoder = Decoder.from_pretrained(run)
    settings = OmegaConf.load(Path(run) / "config.yaml").data
    data = Digits(held_out=settings.held_out, seed=settings.seed)
    image, label = held_out(data, count)
    seen = "were held out of" if data.held_out else "were seen in"
    print(f"{len(image)} scans, which {seen} the training\n")
    print(f"any grey is as probable: {math.log2(LEVELS):.3f} bits per dimension")
    print(f"each pixel alone: {mean(pixels_alone(data.image, image))} bits per dimension\n")
    by_groups(decoder, image, label, few=few, samples=samples)
    found = by_change(decoder, image, label, samples)
    print(f"\n| samples | noise | correct of {tested} |\n|---|---|---|")
    for k in (4, 16):
        for common in (False, True):
            guess = classify(decoder, image[:tested], samples=k, common=common)
            correct = int((guess == label[:tested]).sum())
            noise = "the same for all labels" if common else "different for each label"
            print(f"| {k} | {noise} | {correct} |", flush=True)
    draw(image, found).savefig(Path(out) / "likelihood.png", dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1])
