"""Pictures for people: labelled grids of images, and films of a decode."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["film", "rows", "sheet"]

INK, PAPER = (30, 30, 30), (255, 255, 255)


def _pixels(image: Float[Tensor, "B C H W"]) -> np.ndarray:
    """Values in [-1, 1] as bytes, channels last, grey as RGB."""
    byte = ((image.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return byte.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def sheet(
    image: Float[Tensor, "B C H W"], *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Images in a grid, each enlarged a whole number of times and set apart by a thin border.

    Args:
        image: values in [-1, 1]; one channel or three.
        columns: images in a row; by default the grid is about square.
        scale: enlargement; by default small images become about 48 pixels high.
    """
    count, _, height, _ = image.shape
    columns = columns or max(1, round(count**0.5))
    scale = scale or max(1, 48 // height)
    tiles = _pixels(image).repeat(scale, 1).repeat(scale, 2)
    tiles = np.pad(tiles, ((0, -count % columns), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return Image.fromarray(rearrange(tiles, "(r c) h w k -> (r h) (c w) k", c=columns))


def rows(images: Mapping[str, Float[Tensor, "B C H W"]]) -> Image.Image:
    """One row of images a label, the label on its left."""
    strips = [sheet(image, columns=len(image)) for image in images.values()]
    font = ImageFont.load_default(14)
    margin = 16 + max(int(font.getlength(label)) for label in images)
    width = margin + max(strip.width for strip in strips)
    page = Image.new("RGB", (width, sum(strip.height for strip in strips)), PAPER)
    draw = ImageDraw.Draw(page)
    top = 0
    for label, strip in zip(images, strips, strict=True):
        page.paste(strip, (margin, top))
        draw.text((8, top + strip.height // 2), label, fill=INK, font=font, anchor="lm")
        top += strip.height
    return page


def film(
    pages: Iterable[Image.Image], path: str | Path, *, seconds: float = 4.0, rest: float = 1.5
) -> None:
    """Write pages as an endless GIF of about `seconds`, resting on the last page.

    Raises:
        ValueError: if there is no page.
    """
    shown = list(pages)
    if not shown:
        raise ValueError("pages must hold a page at least, got none")
    # Browsers slow anything below 20 ms a frame down to 100 ms.
    each = max(20, round(1000 * seconds / len(shown)))
    durations = [each] * (len(shown) - 1) + [round(1000 * rest)]
    shown[0].save(
        path, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0
    )
