"""The layout: an orthonormal change of coordinates between an image and its tokens.

A layout preserves lengths, so white noise in pixels is white noise in tokens, and a likelihood is
the same in both. Tokens are in **raster order** here; `schedule.py` defines the decode order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from rolldiff.errors import UsageError

__all__ = ["Layout", "Patches"]


@runtime_checkable
class Layout(Protocol):
    """The interface of a layout. All sizes are in pixels or tokens."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images."""
        ...

    @property
    def num_tokens(self) -> int:
        """`N`, tokens per image."""
        ...

    @property
    def token_dim(self) -> int:
        """`D`, channels per token."""
        ...

    @property
    def coords(self) -> Float[Tensor, "N 3"]:
        """Level, row and column of each token; rows and columns in token units, from 0."""
        ...

    def tokens(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Cut images into tokens."""
        ...

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Reassemble images; the exact inverse of `tokens`."""
        ...


@dataclass(frozen=True)
class Patches:
    """Square patches in raster order: token `i` holds the pixels of one patch.

    `N = (H / patch) (W / patch)` and `D = C patch^2`. With `patch=1` a token is a pixel.

    Args:
        image_size: height and width in pixels, or one number for a square image.
        channels: channels of the image.
        patch: side of a patch in pixels; must divide the height and the width.

    Raises:
        UsageError: if a size is below 1 or `patch` does not divide the image.
    """

    image_size: int | Sequence[int]
    channels: int = 3
    patch: int = 1

    def __post_init__(self) -> None:
        size = self.image_size
        # One spelling only, so that equal layouts compare equal.
        object.__setattr__(
            self, "image_size", (size, size) if isinstance(size, int) else tuple(size)
        )
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(
                f"image_size must be one or two sizes of 1 or more, got {self.image_size}"
            )
        if self.channels < 1:
            raise UsageError(f"channels must be 1 or more, got {self.channels}")
        if self.patch < 1 or any(side % self.patch for side in self.size):
            raise UsageError(
                f"patch must divide image_size, got patch {self.patch} and image_size "
                f"{self.image_size}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return cast(tuple[int, int], self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    @property
    def num_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch**2

    @property
    def coords(self) -> Float[Tensor, "N 3"]:
        rows, columns = self.grid
        grids = torch.meshgrid(
            torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij"
        )
        return torch.stack([g.flatten() for g in grids], dim=-1)

    def tokens(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        p = self.patch
        return rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        p, (h, w) = self.patch, self.grid
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)
