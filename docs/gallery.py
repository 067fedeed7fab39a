"""Writes `gallery.md` and its films: every kind of schedule, decoded by checkpoints of digits.

    rolldiff train run_dir=RUN
    rolldiff train experiment=digits_orders run_dir=ORDERS
    python docs/gallery.py RUN ORDERS

Each film shows a scheduling matrix, how far it has come, and one digit of each class.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rolldiff import DecodeConfig, Decoder, Frame, GroupSchedule
from rolldiff.cli import config_dir
from rolldiff.evaluation.images import INK, PAPER, make_grid, save_gif

HERE = Path(__file__).parent
PAGE = HERE / "gallery.md"
FOLDER = HERE / "pictures" / "gallery"
FRAMES = 24  # of a film
DATA, NOW, PREVIEW = (8, 48, 107), (200, 30, 30), (255, 166, 76)


class Item(NamedTuple):
    """A film of the gallery.

    Attributes:
        name: of its file.
        title: its heading.
        settings: of `rolldiff decode`.
        about: what to look at.
        ckpt: the checkpoint, RUN or ORDERS.
    """

    name: str
    title: str
    settings: str
    about: str
    ckpt: str = "RUN"


PARTS = {
    "Groups and overlap": (
        Item(
            "one_group",
            "One group",
            "num_groups=1 steps=16",
            "Ordinary diffusion. All tokens move together, so every row of the preview becomes "
            "sharp at the same moment.",
        ),
        Item(
            "four_groups",
            "Four groups, one after another",
            "num_groups=4 steps=16",
            "Groupwise Diffusion. Each group takes 16 steps, and then never changes again.",
        ),
        Item(
            "four_groups_half",
            "Four groups, overlap 0.5",
            "num_groups=4 overlap=0.5 steps=16",
            "A group starts when the one before it is half done. Two groups move at a time.",
        ),
        Item(
            "a_group_per_token",
            "One group per token",
            "num_groups=16 steps=16",
            "Autoregression over the 16 tokens of 2 x 2 pixels. Each is drawn by a diffusion "
            "of 16 steps.",
        ),
        Item(
            "four_groups_together",
            "Four groups, overlap 1",
            "num_groups=4 overlap=1.0 steps=16",
            "All groups start together: the images are those of one group, bit for bit.",
        ),
    ),
    "Schedules of other systems": (
        Item(
            "diffusion_forcing",
            "Diffusion Forcing",
            "num_groups=8 steps=16 decode=diffusion_forcing decode.uncertainty_scale=2",
            "Its pyramid. A group starts `uncertainty_scale` steps after the one before it.",
        ),
        Item(
            "skyreels",
            "SkyReels-V2 and AR-Diffusion",
            "num_groups=8 steps=20 decode=skyreels decode.ar_step=5",
            "A group starts `ar_step` steps after the one before it; their groups are frames of a "
            "video.",
        ),
        Item(
            "srm",
            "Spatial Reasoning Models",
            "num_groups=8 overlap=0.5 decode=srm decode.max_steps=72",
            "`max_steps` is the number of steps of the whole decoding. With the overlap it "
            "determines the steps of a group, here 16.",
        ),
        Item(
            "rolling_diffusion",
            "Rolling Diffusion",
            "num_groups=16 steps=16 decode=rolling_diffusion decode.window=4",
            "A window of four groups moves over the image, whose times are evenly spaced.",
        ),
        Item(
            "magi",
            "MAGI-1",
            "num_groups=8 steps=16 decode=magi decode.window_size=4",
            "A chunk starts when the one before it has done a quarter of its steps.",
        ),
    ),
    "Decode orders": (
        Item(
            "bottom_to_top",
            "Bottom to top",
            "num_groups=4 steps=16 order=bottom_to_top",
            "The other direction. One checkpoint was trained for all orders of this part.",
            "ORDERS",
        ),
        Item(
            "left_to_right",
            "Left to right",
            "num_groups=4 steps=16 order=left_to_right",
            "Groups are columns.",
            "ORDERS",
        ),
        Item(
            "random",
            "A random order",
            "num_groups=8 steps=16 order=random:0",
            "Tokens in a fixed random order, two in a group.",
            "ORDERS",
        ),
    ),
    "Guidance": (
        Item(
            "guidance",
            "Classifier-free guidance",
            "num_groups=4 steps=16 guidance=1.5",
            "The prediction is moved away from that without a label, in every group. Digits become "
            "more alike within a class.",
        ),
    ),
}
INTRO = """# Gallery

Every film shows ten digits, one of each class, decoded from the same noise. On the left is the
scheduling matrix: a row per group, time from left to right, white for noise and blue for data. The
red line is the current step. Grey pixels are final; orange ones are a preview, the network's
estimate of what is still to come. The last frame is the result.

The two checkpoints were trained in about five minutes each on two CPU cores:

    rolldiff train run_dir=RUN
    rolldiff train experiment=digits_orders run_dir=ORDERS

The command below a film makes it without the matrix. `python docs/gallery.py RUN ORDERS` makes all
films and this page. [schedules.md](schedules.md) explains the settings. Ten digits do not say which
setting is better; [choose.md](choose.md) has measurements.
"""


def items() -> list[Item]:
    """All films, in order."""
    return [item for part in PARTS.values() for item in part]


def command(item: Item) -> str:
    """What makes the film, without the matrix."""
    return f"rolldiff decode ckpt={item.ckpt} {item.settings} num_images=10 out={item.name}.gif"


def page() -> str:
    """The text of `gallery.md`."""
    lines = [INTRO]
    for title, part in PARTS.items():
        lines.append(f"## {title}\n")
        for item in part:
            picture = f"![{item.title}: matrix and film](pictures/gallery/{item.name}.gif)"
            lines.append(f"### {item.title}\n\n{item.about}\n\n{picture}\n\n    {command(item)}\n")
    return "\n".join(lines)


def decode_config(item: Item) -> DecodeConfig:
    """What the command decodes with."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return instantiate(compose("decode", item.settings.split()).decode, _convert_="all")


def coloured(frame: Frame) -> Tensor:
    """Digits `[B, 3, H, W]`: grey where they are final, orange where they are a preview."""
    grey = (frame.image.clamp(-1, 1) + 1) / 2
    preview = (0.3 + 0.7 * grey) * torch.tensor(PREVIEW).view(3, 1, 1) / 255
    return torch.where(frame.finished, grey, preview) * 2 - 1


def palette() -> Image.Image:
    """The colours of all films: greys, previews, those of the matrix, and the current step."""
    shares = np.linspace(0, 1, 32)[:, None]
    greys = shares * np.full(3, 255)
    previews = (0.3 + 0.7 * shares) * np.array(PREVIEW)
    blues = shares * np.array(PAPER) + (1 - shares) * np.array(DATA)
    colours = np.concatenate([greys, previews, blues, [NOW]]).round().astype(np.uint8)
    picture = Image.new("P", (1, 1))
    picture.putpalette(colours.tobytes())
    return picture


def matrix(schedule: GroupSchedule, *, height: int, width: int) -> Image.Image:
    """The scheduling matrix, a row per group: white for noise, blue for data."""
    noise = schedule.matrix.T[..., None].numpy()
    colours = noise * np.array(PAPER) + (1 - noise) * np.array(DATA)
    picture = Image.fromarray(colours.round().astype(np.uint8))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def frames(decoder: Decoder, item: Item, *, scale: int = 6) -> Iterator[Image.Image]:
    """The matrix and the current step, and beside them two rows of five digits."""
    config = decode_config(item)
    schedule = config.schedule(decoder.layout)
    colours = palette()
    font = ImageFont.load_default(13)
    classes = decoder.conditioning.num_classes
    for frame in decoder.stream(
        range(classes), config, seed=1, frames=min(FRAMES, schedule.num_steps)
    ):
        digits = make_grid(coloured(frame), columns=5, scale=scale)
        width, height = 2 * digits.height, digits.height
        page = Image.new("RGB", (width + digits.width + 30, height + 44), PAPER)
        page.paste(matrix(schedule, height=height, width=width), (10, 10))
        page.paste(digits, (width + 20, 10))
        draw = ImageDraw.Draw(page)
        step = round((1 - frame.tau) * schedule.num_steps)
        x = 10 + round(step / schedule.num_steps * width)
        draw.rectangle((10, 10, 10 + width, 10 + height), outline=INK)
        draw.line((x, 6, x, 14 + height), fill=NOW, width=2)
        draw.text((10, height + 20), f"step {step} of {schedule.num_steps}", INK, font=font)
        share = f"{float(frame.finished.float().mean()):.0%} of the pixels are final"
        draw.text((width + 22, height + 20), share, INK, font=font)
        yield page.quantize(palette=colours, dither=Image.Dither.NONE)


def main() -> None:
    """Make all films and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run of `rolldiff train`")
    parser.add_argument("orders", help="a run of `rolldiff train experiment=digits_orders`")
    args = parser.parse_args()
    decoders = {
        "RUN": Decoder.from_pretrained(args.run).eval(),
        "ORDERS": Decoder.from_pretrained(args.orders).eval(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for item in items():
        save_gif(frames(decoders[item.ckpt], item), FOLDER / f"{item.name}.gif")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
