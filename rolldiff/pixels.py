"""`load_image`: an encoded picture of any kind to bytes.

A picture is turned as its EXIF orientation says, its colours are converted to sRGB as its ICC
profile says, and transparency is filled with a background colour. Greys of 16 bits are scaled to 8;
of colours of 16 bits, Pillow reads the upper 8. What has no known black and white is refused: whole
numbers of 32 bits, and floating-point numbers outside of [0, 1].
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from rolldiff.errors import UsageError, reason

__all__ = ["Color", "Load", "Record", "load_image"]

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF files


@dataclass(frozen=True, slots=True)
class Record:
    """A picture that is not decoded yet.

    Attributes:
        name: identifies it in error messages.
        data: its encoded bytes, or the path or URL of its file; None if it is missing.
        label: its class, 0 without classes; None if it is missing.
    """

    name: str
    data: bytes | str | Path | None
    label: int | None


Load = Callable[[Record], Tensor]


def load_image(
    record: Record, *, image_size: int | None, channels: int, background: Color = WHITE
) -> UInt8[Tensor, "C H W"]:
    """Decode a picture, crop it to its central square and resize it.

    A picture that already has the requested size keeps its exact pixel values. Of an animation, the
    first frame is taken. A broken ICC profile counts as sRGB, broken EXIF data as upright.

    Args:
        record: the encoded picture.
        image_size: side of the square in pixels; None leaves the picture as large as it is.
        channels: 1 for grey, 3 for RGB.
        background: the colour behind transparent pixels.

    Raises:
        UsageError: if the picture or its label is missing, or the data is not a picture, is
            damaged, has no known black and white, or has more than 179 million pixels.
    """
    if record.data is None or record.label is None:
        missing = "no picture" if record.data is None else "no label"
        raise UsageError(f"data must be pictures with labels, got {record.name}: {missing}")
    try:
        with _in_silence(), _opened(record.data) as file, Image.open(file) as opened:
            image = _in_mode(_plain(opened, background), "L" if channels == 1 else "RGB")
            if image_size is not None and image.size != (image_size, image_size):
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
            pixels = np.array(image).reshape(image.height, image.width, channels)
    # Decoders raise almost any exception on a damaged file.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its message is about Python objects
        why = "of no known format" if unknown else reason(error)
        raise UsageError(f"data must be pictures, got {record.name}: {why}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def _in_silence() -> Iterator[None]:
    # Pillow warns of odd metadata, and of half the number of pixels that it refuses.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(data: bytes | str | Path) -> Iterator[IO[bytes]]:
    if isinstance(data, bytes):
        yield io.BytesIO(data)
    elif "://" in str(data):
        # It comes with torch, and reads from the hub and from archives.
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(data, "rb") as file:
            yield file
    else:
        with open(data, "rb") as file:
            yield file


def _plain(image: Image.Image, background: Color) -> Image.Image:
    """The picture upright, in sRGB and opaque; of a mode that converts to L and RGB."""
    image.load()
    with suppress(Exception):  # of damaged EXIF data; the pixels are sound
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    alpha = _alpha(image)
    plain = _in_srgb(_eight_bits(image), image.info.get("icc_profile"))
    if alpha is None:
        return plain
    filled = Image.new("RGB", image.size, background)
    filled.paste(_in_mode(plain, "RGB"), mask=alpha)
    return filled


def _alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of every pixel, or None if all are opaque."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A")
    palette = image.palette.mode if image.palette else ""
    transparent = image.info.get("transparency")
    if transparent is None and not palette.endswith("A"):
        return None
    if image.mode.startswith("I"):  # one grey value is transparent
        return Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture without its opacity, of mode L, RGB, CMYK or YCbCr."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = _tiff_tag(image, BITS_PER_SAMPLE, (16,))[0]
        return _grey(image, white=2**bits - 1)
    if image.mode == "I":
        raise ValueError("whole numbers of 32 bits have no known white")
    if image.mode == "F":
        values = np.asarray(image)
        if not ((values >= 0) & (values <= 1)).all():
            found = f"{values.min():g} … {values.max():g}"
            raise ValueError(f"floating-point values must be in [0, 1], got {found}")
        return _grey(image, white=1)
    if image.mode in ("1", "L", "LA"):
        return _in_mode(image, "L")
    return image if image.mode in ("RGB", "CMYK", "YCbCr") else image.convert("RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _grey(image: Image.Image, *, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.float64) / white
    # Pillow sees to it for 8 bits only.
    if _tiff_tag(image, PHOTOMETRIC, None) == WHITE_IS_ZERO:
        values = 1 - values
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    return getattr(image, "tag_v2", {}).get(tag, default)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode)
    return image if transform is None else _transformed(image, transform)


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of an ICC profile; None if it changes nothing, or is of no use."""
    try:
        spaces = (ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"))
        transform = ImageCms.buildTransform(*spaces, mode, "RGB")
    except Exception:  # it is broken, or of another colour space than the picture
        return None
    if mode == "CMYK":
        return transform
    # Most profiles are sRGB in another wording. Rounding must not change these pictures.
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(colors).convert(mode)
    change = np.asarray(_transformed(probe, transform)) - np.asarray(probe.convert("RGB"), np.int16)
    return None if np.abs(change).max() <= 2 else transform


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None  # only a change in place returns nothing
    return changed
