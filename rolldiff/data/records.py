"""From an encoded picture to pixels.

A *record* is a picture as a source keeps it: its bytes or its file, a label, and a name to tell the
user by if it cannot be read.
"""

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from rolldiff.errors import reason

__all__ = ["Corrupt", "Record", "decoded", "pixels"]

Corrupt = Literal["skip", "refuse"]


@dataclass(frozen=True)
class Record:
    """A picture that is not decoded yet.

    Attributes:
        name: what the user knows it by.
        picture: its bytes as stored, or the file that holds them.
        label: its class, or 0.
    """

    name: str
    picture: bytes | Path
    label: int


def pixels(record: Record, *, image_size: int, channels: int) -> UInt8[Tensor, "C H W"]:
    """Decode, cut the middle square out, resize it.

    A picture that has the size already is taken as it is, bit by bit.

    Args:
        record: the picture.
        image_size: side of the square in pixels.
        channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: if it is no picture, or a damaged one.
    """
    data = record.picture
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    # A damaged file makes the decoders raise whatever it provokes.
    except Exception as error:
        raise ValueError(f"data must be pictures, got {record.name}: {reason(error)}") from error
    if picture.size != (image_size, image_size):
        size = (image_size, image_size)
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    array = np.array(picture).reshape(image_size, image_size, channels)
    return torch.from_numpy(array).permute(2, 0, 1)


def decoded(
    records: Iterable[Record], *, image_size: int, channels: int, corrupt: Corrupt
) -> tuple[UInt8[Tensor, "N C H W"], Tensor]:
    """All pictures and their labels, one after another.

    Args:
        records: the pictures.
        image_size: side in pixels.
        channels: 1 or 3.
        corrupt: whether what cannot be read is skipped, with a warning, or refused.

    Raises:
        ValueError: if a picture is refused, or if none is left.
    """
    image, label = [], []
    for record in records:
        try:
            image.append(pixels(record, image_size=image_size, channels=channels))
        except ValueError as error:
            if corrupt == "refuse":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            continue
        label.append(record.label)
    if not image:
        raise ValueError("data must hold a picture at least, got none")
    return torch.stack(image), torch.tensor(label)
