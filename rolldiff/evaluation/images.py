"""Image files: grids, labelled rows and GIFs for people to look at, and sets of images to measure.

Images are in [-1, 1]; what is outside is clipped. Files are written whole, see `rolldiff.files`.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

from rolldiff.errors import UsageError
from rolldiff.files import written_whole

__all__ = [
    "all_finite",
    "as_pictures",
    "film",
    "labelled_rows",
    "make_grid",
    "save_gif",
    "save_images",
    "save_latents",
    "save_npz",
    "save_picture",
    "to_bytes",
    "to_picture",
]

INK, PAPER = (30, 30, 30), (255, 255, 255)


def as_pictures(
    image: Float[Tensor, "B C H W"], decode: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "B c H2 W2"]:
    """Pictures of latents: what `decode` makes of them, else their first three channels as colours.

    Latents are about of unit variance, so -3 … 3 is shown as black to white. Of two channels, the
    first is shown as grey.

    Args:
        image: the latents.
        decode: from latents to pictures, as `Autoencoder.decode`; None for none.
    """
    if decode is not None:
        return decode(image)
    return image[:, : 3 if image.shape[1] >= 3 else 1] / 3


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
    tiles = to_bytes(image).repeat(scale, 1).repeat(scale, 2)
    tiles = np.pad(tiles, ((0, -count % columns), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return Image.fromarray(rearrange(tiles, "(r c) h w k -> (r h) (c w) k", c=columns))


def to_picture(image: Float[Tensor, "1 C H W"]) -> Image.Image:
    """A single image as it is, without a border."""
    return Image.fromarray(to_bytes(image)[0])


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
    options = film(images, seconds=seconds, hold=hold)
    with written_whole(path) as part:
        images[0].save(part, format="GIF", **options)


def film(images: Sequence[Image.Image], *, seconds: float, hold: float) -> dict[str, Any]:
    """What Pillow is told to save the first of some frames as a film of all; see `save_gif`."""
    # Browsers slow anything below 20 ms per frame down to 100 ms.
    duration = max(20, round(1000 * seconds / len(images)))
    durations = [duration] * (len(images) - 1) + [round(1000 * hold)]
    return {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a grid or labelled rows in the format that the name ends in."""
    with written_whole(path) as part:
        picture.save(part)


def save_images(images: Iterable[Float[Tensor, "B C H W"]], folder: str | Path) -> int:
    """Write every image to a PNG file of its own: `000000.png`, `000001.png`, ….

    Args:
        images: batches, one channel or three.
        folder: a new or an empty folder.

    Returns:
        The number of images.

    Raises:
        UsageError: if the folder holds other files, there is no image, or one is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"folder must be a new or an empty one, got {folder}")
    count = 0
    for image in images:
        for pixels in _finite_bytes(image):
            save_picture(Image.fromarray(pixels), folder / f"{count:06d}.png")
            count += 1
    if not count:
        raise UsageError("images must hold one image or more, got none")
    return count


def save_npz(images: Iterable[Float[Tensor, "B C H W"]], path: str | Path) -> int:
    """Write all images to one file as the evaluators of ADM read it: `arr_0`, `[N, H, W, 3]` bytes.

    Args:
        images: batches, one channel or three.
        path: the file; its name ends in `.npz`.

    Returns:
        The number of images.

    Raises:
        UsageError: if there is no image, one is not finite, or they are of several sizes.
    """
    blocks = [_finite_bytes(image) for image in images]
    count = sum(len(block) for block in blocks)
    if not count:
        raise UsageError("images must hold one image or more, got none")
    sizes = sorted({block.shape[1:] for block in blocks})
    if len(sizes) > 1:
        raise UsageError(f"images must be of one size, got {' and '.join(map(str, sizes))}")
    # Block by block, where `np.savez` would need all of them in one array.
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *sizes[0])}
    with (
        written_whole(path) as part,
        zipfile.ZipFile(part, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
    return count


def save_latents(images: Iterable[Float[Tensor, "B C H W"]], path: str | Path) -> int:
    """Write latents to one file of safetensors as `data=latents` reads it: `latents [N, C, h, w]`.

    Args:
        images: batches of latents.
        path: the file.

    Returns:
        The number of images.

    Raises:
        UsageError: if there is no image, or one is not finite.
    """
    parts = [image.detach().cpu().contiguous() for image in images]
    if not parts:
        raise UsageError("images must hold one image or more, got none")
    latents = torch.cat(parts)
    if not all_finite(latents):
        raise UsageError("image must be finite, got latents that are not")
    with written_whole(path) as part:
        save_file({"latents": latents}, part)
    return len(latents)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy of as many values."""
    return not values.numel() or all(end.isfinite() for end in values.aminmax())


def _finite_bytes(image: Float[Tensor, "B C H W"]) -> np.ndarray:
    if not all_finite(image):
        raise UsageError("image must be finite, got pixels that are not")
    return to_bytes(image)


def to_bytes(image: Float[Tensor, "B C H W"]) -> np.ndarray:
    """Values in [-1, 1] as bytes `[B, H, W, 3]`.

    Raises:
        UsageError: if the images are no pictures, as latents of several channels.
    """
    if image.shape[1] not in (1, 3):
        raise UsageError(f"image must have 1 or 3 channels, got {image.shape[1]}")
    byte = ((image.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return byte.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
