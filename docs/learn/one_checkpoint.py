"""One checkpoint, every num_groups: the same digits by many schedules, with their cost.

rolldiff train run_dir=RUN
python docs/learn/one_checkpoint.py RUN
"""

import sys
import warnings
from pathlib import Path
from statistics import median

import matplotlib
import torch

from rolldiff import DecodeConfig, Decoder
from rolldiff.data import Digits
from rolldiff.evaluation.metrics import pixel_distance
from rolldiff.evaluation.report import split_half_distance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TINT = torch.tensor([1.0, 0.65, 0.3])  # of pixels that are not final

SETTINGS = [
    DecodeConfig(num_groups=1),
    DecodeConfig(num_groups=1, steps=64),
    *(DecodeConfig(num_groups=g, overlap=0.0) for g in (2, 4, 8, 16)),
    *(DecodeConfig(num_groups=g, overlap=0.5) for g in (4, 16)),
    DecodeConfig(num_groups=4, overlap=1.0),
]


def check(decoder, label):
    """Three promises about the same weights, the same labels and the same noise."""
    one = decoder.decode(label, num_groups=1, seed=0).image
    for num_groups in (2, 4, 8, 16):
        image = decoder.decode(label, num_groups=num_groups, overlap=1.0, seed=0).image
        assert torch.equal(image, one)
    print("At overlap 1, 2, 4, 8 and 16 groups give the image of one group, bit for bit.")

    cached = decoder.decode(label, num_groups=4, seed=0)
    again = decoder.decode(label, num_groups=4, seed=0, cache=False)
    difference = (cached.image - again.image).abs().max()
    print(f"4 groups with and without the cache differ by at most {difference:.0e};", end=" ")
    print(f"they evaluate {cached.cost.tokens} and {again.cost.tokens} tokens per image.")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder.decode(label, num_groups=3, seed=0)
    print(f"3 groups give a warning: {caught[0].message}")


def seconds(decoder, label, rounds):
    """Time relative to the first setting, and until the first group is final, by setting."""
    costs = [[decoder.decode(label, c, seed=0).cost for c in SETTINGS] for _ in range(rounds + 1)]
    for by_round in zip(*costs[1:], strict=True):  # the first round warms up
        ratios = [c.seconds / r[0].seconds for c, r in zip(by_round, costs[1:], strict=True)]
        first = [c.seconds_to_first_group / c.seconds for c in by_round]
        yield by_round[0], median(ratios), median(first)


def distances(decoder, data, count, seeds):
    """The distance of decoded to scanned digits: the mean and the spread over seeds."""
    chosen = torch.randperm(len(data.image), generator=torch.Generator().manual_seed(0))
    label, real = data.label[chosen[:count]], data.image[chosen[count : 2 * count]]
    for config in SETTINGS:
        images = [decoder.decode(label, config, seed=seed).image for seed in range(seeds)]
        found = torch.tensor([pixel_distance(real, image) for image in images])
        yield f"{found.mean():.3f} ± {found.std():.3f}"


def side_by_side(image, finished):
    """Images in a row, in colour; pixels that are not final are tinted."""
    grey = (image.clamp(-1, 1)[:, 0, :, :, None] + 1) / 2  # [B, H, W, 1]
    colour = torch.where(finished[..., None], grey, (0.3 + 0.7 * grey) * TINT)
    return torch.cat(list(torch.nn.functional.pad(colour, (0, 0, 1, 1, 1, 1), value=1)), 1).numpy()


def draw_settings(decoder, configs):
    """A row per setting: its scheduling matrix, ten digits half way, and the same at the end."""
    figure, axes = plt.subplots(
        len(configs),
        3,
        figsize=(13, 0.68 * len(configs)),
        width_ratios=[1.5, 5, 5],
        layout="constrained",
    )
    for row, c in zip(axes, configs, strict=True):
        matrix = c.schedule(decoder.layout).matrix
        row[0].imshow(matrix.T.numpy(), aspect="auto", cmap="Blues_r", interpolation="none")
        row[0].axvline((len(matrix) - 1) / 2, color="tab:orange")
        name = f"num_groups {c.num_groups}" + f"\noverlap {c.overlap:g}" * (c.num_groups > 1)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        frames = decoder.stream(torch.arange(10), c, seed=0, frames=2)
        for axis, frame in zip(row[1:], frames, strict=True):
            axis.imshow(side_by_side(frame.image, frame.finished), interpolation="none")
            axis.axis("off")
    for axis, title in zip(axes[0], ("times of the groups", "half way", "at the end"), strict=True):
        axis.set_title(title)
    return figure


def draw_training(decoder, columns=14):
    """What a moving group sees, as times of the tokens: in decodings, and in training."""
    trained, generator = decoder.training_distribution, torch.Generator().manual_seed(1)
    draw = trained.sample(columns, trained.tables(decoder.layout.coords)[1], generator)
    window, clean = (
        x.repeat_interleave(columns // len(x), 0) for x in (draw.window, draw.clean.long())
    )
    last = window.amax(1, keepdim=True)
    first = torch.where(clean == 0, window, last).amin(1, keepdim=True)
    chosen = first + (torch.rand(columns, 1, generator=generator) * (last - first + 1)).long()
    shown = torch.where(window <= chosen, draw.t, 1)  # a window does not see those after it
    met = []
    for c, i in zip(
        (SETTINGS[2:8] * columns)[:columns], torch.rand(columns, generator=generator), strict=True
    ):
        schedule = c.schedule(decoder.layout)
        met.append(schedule.matrix[int(i * schedule.num_steps), schedule.group])
    figure, axes = plt.subplots(2, columns, figsize=(13, 2.1), layout="constrained")
    for row, times, name in zip(axes, (met, shown), ("decoding", "training"), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, t in zip(row, times, strict=True):
            axis.imshow(t.view(4, 4).numpy(), cmap="Blues_r", vmin=0, vmax=1)
    return figure


def main(run, *, out=Path(__file__).parent / "pictures", count=800, seeds=3, rounds=5):
    """Check, measure and draw one checkpoint under many settings."""
    decoder, data = Decoder.from_pretrained(run), Digits()
    check(decoder, data.label[:10])
    print(
        "\n| num_groups | overlap | steps | calls | tokens | time of 1 image | time of 64 |", end=""
    )
    print(" first group final after | fd_pixels |\n" + "|---" * 9 + "|")
    alone = seconds(decoder, data.label[:1], rounds)
    batch = seconds(decoder, data.label[:64], rounds)
    columns = zip(SETTINGS, alone, batch, distances(decoder, data, count, seeds), strict=True)
    for c, (_, one, _), (cost, many, first), distance in columns:
        print(
            f"| {c.num_groups} | {c.overlap:g} | {c.steps} | {cost.nfe} | {cost.tokens} |", end=""
        )
        print(f" {one:.1f}x | {many:.1f}x | {first:.0%} | {distance} |", flush=True)
    floor = split_half_distance(data.image[: 2 * count])
    print(f"\nTwo random sets of {count} scans: {floor:.3f}")
    configs = [c for c in SETTINGS if c.steps == 16]
    figures = {"": draw_settings(decoder, configs), "_training": draw_training(decoder)}
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.set(xticks=[], yticks=[])
        figure.savefig(Path(out) / f"one_checkpoint{name}.png", dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1])
