"""An encoder of your own, trained together with rolldiff as its decoder, in plain PyTorch.

python docs/learn/your_encoder.py
"""

import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from torch import nn

from rolldiff import Decoder, TokenGrid, Training
from rolldiff.data import Digits
from rolldiff.evaluation.metrics import psnr

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GROUPS = (1, 2, 4, 8, 16)


class Encoder(nn.Module):
    """Images `[B, 1, 8, 8]` to a grid of codes `[B, 4, 4, channels]`, numbers in [-1, 1]."""

    def __init__(self, channels=2, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 2, stride=2),  # 8 x 8 to 4 x 4
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 1),
            nn.Tanh(),
        )

    def forward(self, image):
        return self.layers(image).movedim(1, -1)  # channels last, as a TokenGrid takes them


def build(channels=2):
    """An encoder, and a decoder that is conditioned on its codes."""
    decoder = Decoder.build(
        image_size=8,
        channels=1,
        patch=2,  # 4 x 4 image tokens, one above each code
        width=64,
        depth=3,
        condition=TokenGrid(4, 4, channels=channels),
        prediction="velocity",
        training=Training(num_groups=GROUPS),
    )
    return Encoder(channels), decoder


def train(encoder, decoder, image, *, steps, batch_size=128, lr=5e-3):
    """Train both by the loss of the decoder, whose gradient reaches the encoder by the codes."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        batch = image[torch.randint(len(image), (batch_size,))]
        loss = decoder.loss(batch, encoder(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    encoder.eval(), decoder.eval()


def save(encoder, decoder, folder):
    """Write both parts."""
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    decoder.save_pretrained(folder / "decoder")


def load(folder):
    """Read both parts; the decoder's file also holds its settings, that of the encoder does not."""
    encoder = Encoder()
    encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    return encoder.eval(), Decoder.from_pretrained(folder / "decoder")


def stream(decoder, codes, *, overlap=0.0, **options):
    """Decode while the codes arrive row by row: each frame, and how many rows it has waited for."""
    arrived = 0

    def rows():
        nonlocal arrived
        for row in codes.unbind(1):  # your network connection, or your generative model
            arrived += 1
            yield row  # [B, 4, channels]

    settings = {"num_groups": 4, "overlap": overlap, "steps": 16, "seed": 0}
    for frame in decoder.stream(rows(), num_images=len(codes), **settings, **options):
        yield frame, arrived


def main(out=Path(__file__).parent / "pictures", steps=1500, seed=0):
    """Train, measure reconstructions of digits that were not trained on, stream one, draw all."""
    torch.manual_seed(seed)
    data = Digits(held_out=0.1)
    image, _ = data.held_out_images
    encoder, decoder = build()
    start = time.perf_counter()
    train(encoder, decoder, data.image, steps=steps)
    print(f"{steps} steps on {len(data.image)} digits took {time.perf_counter() - start:.0f} s\n")
    with tempfile.TemporaryDirectory() as folder:
        save(encoder, decoder, Path(folder))
        encoder, decoder = load(Path(folder))
    with torch.no_grad():
        codes = encoder(image)

    print(f"| decoded with | PSNR of {len(image)} other digits |\n|---|---|")
    decoded = {}
    for groups in GROUPS:
        decoded[groups] = decoder.decode(codes, num_groups=groups, steps=16, seed=0).image
        print(f"| num_groups={groups} | {psnr(image, decoded[groups]):.1f} dB |")
    print(f"| principal components | {psnr(image, components(data.image, image)):.1f} dB |")

    print("\n| overlap | pixel rows final | code rows arrived | network calls |\n|---|---|---|---|")
    for overlap in (0.0, 0.5):
        final = 0
        for frame, arrived in stream(decoder, codes[:1], overlap=overlap, preview=False):
            if (count := int(frame.finished.all(1).sum())) > final:
                final = count
                print(f"| {overlap} | {final} of 8 | {arrived} of 4 | {frame.nfe} |")
    whole = decoder.decode(codes[:1], num_groups=4, overlap=0.5, steps=16, seed=0).image
    print(f"\nlast frame equal to decoding with all codes: {torch.equal(frame.image, whole)}")
    draw(image, decoded, list(stream(decoder, codes[:1], frames=8)), codes[0], Path(out))


def components(image, other):
    """Other images by their largest principal components, as many as an image has codes."""
    mean = image.flatten(1).mean(0)
    axes = torch.linalg.svd(image.flatten(1) - mean, full_matrices=False).Vh[:32]
    return ((other.flatten(1) - mean) @ axes.T @ axes + mean).view_as(other)


def draw(image, decoded, frames, codes, out):
    """Ten digits and their reconstructions; below, the frames of one stream."""
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.4, 3.2])
    rows = {"original": image} | {f"groups {g}": decoded[g] for g in (1, 4, 16)}
    above.suptitle("Digits that were not trained on, and their reconstructions")
    below.suptitle(
        "One digit, decoded with 4 groups while its codes arrive (red: final down to here)"
    )
    for axes, (name, images) in zip(above.subplots(4, 10), rows.items(), strict=True):
        axes[0].set_ylabel(name, fontsize=11)
        for axis, one in zip(axes, images, strict=False):
            axis.imshow(one[0].numpy(), cmap="gray", vmin=-1, vmax=1)
    grid = below.subplots(2, len(frames))
    grid[0, 0].set_ylabel("codes")
    grid[1, 0].set_ylabel("image")
    for (top, bottom), (frame, arrived) in zip(grid.T, frames, strict=True):
        final = int(frame.finished.all(1).sum())
        colour = torch.cat([codes, -codes.mean(-1, keepdim=True)], dim=-1) / 2 + 0.5
        colour[arrived:] = 1  # white: not here yet
        top.imshow(colour.numpy(), extent=(0, 4, 4, 0))
        top.grid(color="0.7")
        top.set(xticks=range(5), yticks=range(5), title=f"{arrived} of 4 rows")
        top.tick_params(length=0, labelbottom=False, labelleft=False)
        bottom.imshow(frame.image[0, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
        bottom.axhline(final - 0.5, color="tab:red", linewidth=3)
        bottom.set(xlabel=f"{final} of 8 rows")
    for axis in [*above.axes, *grid[1]]:
        axis.set(xticks=[], yticks=[])
    figure.savefig(out / "your_encoder.png", dpi=80)


if __name__ == "__main__":
    main()
