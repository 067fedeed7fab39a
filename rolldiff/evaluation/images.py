"""Image files for people to look at: grids, labelled rows, GIFs. Images are in [-1, 1]."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rolldiff.errors import UsageError

__all__ = ["labelled_rows", "make_grid", "save_gif"]

INK, PAPER = (30, 30, 30), (255, 255, 255)


def make_grid(
    image: Float[Tensor, "B C H W"], *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Images in a grid, each enlarged by an integer factor and separated by a thin border.

    Args:
        image: values in [-1, 1]; one channel or three.
        columns: images per row; by default the grid is about square.
        scale: enlargement; by default small images become about 48 pixels high.
    """
    count, _, height, _ = image.shape
    columns = columns or max(1, round(count**0.5))
    scale = scale or max(1, 48 // height)
    tiles = _to_bytes(image).repeat(scale, 1).repeat(scale, 2)
    tiles = np.pad(tiles, ((0, -count % columns), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return Image.fromarray(rearrange(tiles, "(r c) h w k -> (r h) (c w) k", c=columns))


def labelled_rows(images: Mapping[str, Float[Tensor, "B C H W"]]) -> Image.Image:
    """One row of images per label, with the label on its left."""
    rows = [make_grid(image, columns=len(image)) for image in images.values()]
    font = ImageFont.load_default(14)
    margin = 16 + max(int(font.getlength(label)) for label in images)
    size = margin + max(row.width for row in rows), sum(row.height for row in rows)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    top = 0
    for label, row in zip(images, rows, strict=True):
        page.paste(row, (margin, top))
        draw.text((8, top + row.height // 2), label, fill=INK, font=font, anchor="lm")
        top += row.height
    return page


def save_gif(
    frames: Iterable[Image.Image], path: str | Path, *, seconds: float = 4.0, hold: float = 1.5
) -> None:
    """Write frames as an endlessly repeated GIF.

    Args:
        frames: the images, in order.
        path: the file to write.
        seconds: duration of all frames together, approximately.
        hold: seconds for which the last frame is shown.

    Raises:
        UsageError: if there is no frame.
    """
    images = list(frames)
    if not images:
        raise UsageError("frames must hold one image or more, got none")
    # Browsers slow anything below 20 ms per frame down to 100 ms.
    duration = max(20, round(1000 * seconds / len(images)))
    durations = [duration] * (len(images) - 1) + [round(1000 * hold)]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
    )


def _to_bytes(image: Float[Tensor, "B C H W"]) -> np.ndarray:
    """Values in [-1, 1] as bytes `[B, H, W, 3]`."""
    byte = ((image.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return byte.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
