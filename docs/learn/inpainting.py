"""Inpainting and variations of digits: what stays, what changes, and what it costs.

python docs/learn/inpainting.py RUN

RUN is the folder that `rolldiff train` has made.
"""

import sys
from math import cos, log10, pi, sin
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from rolldiff import Decoder
from rolldiff.editing import group_mask, invert, row_mask

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def masks_of(image):
    """True in the pixels that are decoded again. A token has 2 x 2 pixels."""
    masks = {
        "all": row_mask(image, 0, 8),
        "lower half": row_mask(image, 4, 8),
        "box of whole tokens": torch.zeros(8, 8, dtype=torch.bool),
        "box across tokens": torch.zeros(8, 8, dtype=torch.bool),
    }
    masks["box of whole tokens"][2:6, 2:6] = True
    masks["box across tokens"][3:5, 3:5] = True
    return masks


def rms(difference):
    """The root of the mean square."""
    return float(difference.square().mean().sqrt())


def seam(image, mask):
    """The RMS step from a pixel to its neighbour on the other side of the mask's edge."""
    down, right = image.diff(dim=2)[..., mask.diff(dim=0)], image.diff(dim=3)[..., mask.diff(dim=1)]
    return rms(torch.cat([down, right], dim=-1))


def inpaint(decoder, image, label):
    """Decode a part again: what is kept bit for bit, the step at the edge, and the cost."""
    print(
        "| decoded again | num_groups | largest change elsewhere | seam | network calls | tokens |"
    )
    print("|---|---|---|---|---|---|")
    for name, mask in masks_of(image).items():
        for num_groups in (1, 4):
            decoded = decoder.decode(label, image=image, mask=mask, num_groups=num_groups, seed=0)
            change, ratio = "–", "–"
            if not mask.all():
                change = f"{(decoded.image - image)[..., ~mask].abs().max():g}"
                ratio = f"{seam(decoded.image, mask) / seam(image, mask):.2f}"
            cost = f"{decoded.cost.nfe} | {decoded.cost.tokens}"
            print(f"| {name} | {num_groups} | {change} | {ratio} | {cost} |", flush=True)
    whole = decoder.decode(label, num_groups=2, seed=0).image
    lower = row_mask(whole, 4, 8)
    again = decoder.decode(label, image=whole, mask=lower, num_groups=1, seed=0).image
    apart = (again - whole).abs().max()
    print(f"\nDecoded in two groups, and its lower half again: {apart:g} apart")


def relabel(decoder, image, label, *, read):
    """Decode a part again with another label, and let a classifier read the digits."""
    print(
        "\n| decoded again | guidance | read as the new label | as the old one |\n|---|---|---|---|"
    )
    new = (label + 5) % 10
    for name, mask in list(masks_of(image).items())[:3]:
        for guidance in (0.0, 2.0):
            decoded = decoder.decode(new, image=image, mask=mask, guidance=guidance, seed=0).image
            shares = [(read(decoded) == y).float().mean() for y in (new, label)]
            print(f"| {name} | {guidance:g} | {shares[0]:.0%} | {shares[1]:.0%} |", flush=True)


def there_and_back(decoder, image, label, **ask):
    """The noise of images, and what it is decoded to."""
    noise = invert(decoder, image, label, **ask)
    return noise, decoder.decode(label, noise=noise, **ask).image


def round_trip(decoder, image, label, *, steps):
    """To the noise of the images and back."""
    print("\n| num_groups | steps | PSNR of the way there and back | RMS of the noise |")
    print("|---|---|---|---|")
    for num_groups in (1, 4, 16):
        for count in steps:
            ask = {"num_groups": num_groups, "steps": count}
            noise, back = there_and_back(decoder, image, label, **ask)
            psnr = 20 * log10(2 / rms(back - image))
            print(f"| {num_groups} | {count} | {psnr:.0f} dB | {rms(noise):.2f} |", flush=True)


def mixed(noise, fresh, strength):
    """Noise of the same size between two: along a quarter of a circle."""
    return cos(strength * pi / 2) * noise + sin(strength * pi / 2) * fresh


def fresh_group(decoder, image, label, *, fresh):
    """The image with fresh noise in the third of four groups, and where that is."""
    ask = {"num_groups": 4, "steps": 16}
    noise, third = invert(decoder, image, label, **ask), group_mask(decoder, [2], **ask)
    return decoder.decode(label, noise=torch.where(third, fresh, noise), **ask).image, third


def vary(decoder, image, label, *, read):
    """Decode a mixture of an image's own noise and fresh noise."""
    print("\n| strength | change (RMS) | read as its label | with label + 5: change, read as it |")
    print("|---|---|---|---|")
    noise, new = invert(decoder, image, label, steps=16), (label + 5) % 10
    fresh = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for strength in (0, 0.25, 0.5, 0.75, 1):
        start, columns = mixed(noise, fresh, strength), []
        for y in (label, new):
            varied = decoder.decode(y, noise=start, steps=16).image
            columns.append((rms(varied - image), float((read(varied) == y).float().mean())))
        (own, own_read), (other, new_read) = columns
        print(f"| {strength} | {own:.2f} | {own_read:.0%} | {other:.2f}, {new_read:.0%} |")


def pictures(decoder, image, label):
    """Rows of the figure: a name, images, and the mask of what was decoded again."""
    masks, new = masks_of(image), (label + 5) % 10
    lower = masks["lower half"]
    yield "original", image, None
    yield "Inpainting", None, None
    for seed in (0, 1, 2):
        again = decoder.decode(label, image=image, mask=lower, seed=seed).image
        yield f"lower half, seed {seed}", again, lower
    again = decoder.decode(new, image=image, mask=lower, guidance=2.0, seed=0).image
    yield "lower half, label + 5", again, lower
    for name in ("box of whole tokens", "box across tokens"):
        again = decoder.decode(label, image=image, mask=masks[name], seed=0).image
        yield name, again, masks[name]
    yield "Variations: own noise mixed with fresh noise", None, None
    noise = invert(decoder, image, label, steps=16)
    fresh = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for strength in (0, 0.25, 0.5, 1):
        varied = decoder.decode(label, noise=mixed(noise, fresh, strength), steps=16).image
        yield f"strength {strength}", varied, None
    yield "strength 0, label + 5", decoder.decode(new, noise=noise, steps=16).image, None
    varied, third = fresh_group(decoder, image, label, fresh=fresh)
    yield "fresh in group 3 of 4", varied, third


def draw(rows, path):
    """One digit per column; orange lines enclose what was decoded again or had fresh noise."""
    heights = [0.45 if images is None else 1 for _, images, _ in rows]
    figure, axes = plt.subplots(
        len(rows),
        len(rows[0][1]),
        figsize=(8.5, 0.75 * sum(heights)),
        gridspec_kw={"height_ratios": heights, "hspace": 0.08, "wspace": 0.08},
    )
    for line, (name, images, mask) in zip(axes, rows, strict=True):
        for i, axis in enumerate(line):
            axis.set(xticks=[], yticks=[], frame_on=images is not None)
            if images is not None:
                axis.imshow(images[i, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
            if mask is not None:
                y, x = (torch.nonzero(mask.any(dim))[:, 0] for dim in (1, 0))
                box = plt.Rectangle((x[0] - 0.5, y[0] - 0.5), len(x), len(y), fill=False, lw=1.6)
                box.set(edgecolor="darkorange", clip_on=False, zorder=9)
                axis.add_patch(box)
        if images is None:
            line[0].text(0, 0.15, name, weight="bold", transform=line[0].transAxes)
        else:
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(run, out=Path(__file__).parent / "pictures", count=500, steps=(16, 64)):
    """Print the tables for the first `count` digits, and draw ten."""
    decoder, digits = Decoder.from_pretrained(run), load_digits()
    image = torch.from_numpy(digits.images).float()[:count, None] / 8 - 1
    label = torch.from_numpy(digits.target).long()[:count]
    neighbours = KNeighborsClassifier(3).fit(digits.data, digits.target)

    def read(image):
        """What the nearest digits of the data say that an image is."""
        pixels = (image.clamp(-1, 1) + 1) * 8
        return torch.from_numpy(neighbours.predict(pixels.flatten(1).numpy()))

    inpaint(decoder, image, label)
    relabel(decoder, image, label, read=read)
    round_trip(decoder, image[:20], label[:20], steps=steps)
    vary(decoder, image, label, read=read)
    draw(list(pictures(decoder, image[:10], label[:10])), Path(out) / "inpainting.png")


if __name__ == "__main__":
    main(sys.argv[1])
