"""The layout: an orthonormal change of coordinates between an image and its tokens.

A layout preserves lengths, so white noise in pixels is white noise in tokens, and a likelihood is
the same in both. Tokens are in **raster order** here; `schedule.py` defines the decode order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rolldiff.errors import UsageError, dense_tensor, instance, whole_number, whole_numbers

__all__ = [
    "MAX_TOKENS",
    "Layout",
    "Patches",
    "check_count",
    "check_layout",
    "check_shape",
    "highest",
    "image_sides",
    "resized",
    "same_layout",
    "touched",
]

MAX_TOKENS = 2**20  # an image of 1024 x 1024 pixels, each a token


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
        UsageError: if a size is below 1, `patch` does not divide the image, or the image has more
            than 2^20 tokens.
    """

    image_size: int | Sequence[int]
    channels: int = 3
    patch: int = 1

    def __post_init__(self) -> None:
        # One spelling only, so that equal layouts compare equal.
        object.__setattr__(self, "image_size", image_sides(self.image_size))
        object.__setattr__(self, "channels", whole_number(self.channels, "channels"))
        object.__setattr__(self, "patch", whole_number(self.patch, "patch"))
        if any(side % self.patch for side in self.size):
            raise UsageError(
                f"patch must divide image_size, got patch {self.patch} and image_size "
                f"{self.image_size}"
            )
        check_count(self)

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
            torch.zeros(1, device="cpu"),
            torch.arange(float(rows), device="cpu"),
            torch.arange(float(columns), device="cpu"),
            indexing="ij",
        )
        return torch.stack([g.flatten() for g in grids], dim=-1)

    def tokens(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        check_shape(image, self.image_shape, "image")
        p = self.patch
        return rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        check_shape(tokens, (self.num_tokens, self.token_dim), "tokens")
        p, (h, w) = self.patch, self.grid
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)


def check_count(layout: Any) -> None:
    """Refuse a layout of more tokens or numbers than can be computed with."""
    if layout.num_tokens > MAX_TOKENS or layout.num_tokens * layout.token_dim >= 2**31:
        raise UsageError(
            f"image_size, channels and patch must give at most {MAX_TOKENS} tokens and fewer than "
            f"2^31 numbers, got image_size {layout.image_size}, channels {layout.channels} and "
            f"patch {layout.patch}"
        )


def image_sides(image_size: object) -> tuple[int, int]:
    """Height and width from what a user passes: two sizes, or one for a square image.

    Raises:
        UsageError: if it is neither.
    """
    name = "image_size"
    if isinstance(image_size, str) or not hasattr(image_size, "__len__"):
        side = whole_number(image_size, name)
        return side, side
    if getattr(image_size, "ndim", 1) == 0:  # a number of NumPy or torch
        side = whole_number(image_size, name)
        return side, side
    sides = whole_numbers(image_size, name)
    if len(sides) != 2:
        raise UsageError(f"{name} must be one or two sizes of 1 or more, got {sides}")
    return sides[0], sides[1]


def check_layout(layout: object) -> Layout:
    """The layout itself.

    Raises:
        UsageError: if it is something else.
    """
    return cast(Layout, instance(layout, Layout, "layout", "a layout such as Patches(32)"))


def resized(layout: Layout, image_size: int | Sequence[int]) -> Layout:
    """The same layout for images of another size.

    Args:
        layout: a `Patches`; other layouts have one size.
        image_size: height and width in pixels, or one number for a square image.

    Raises:
        UsageError: if the layout has one size only, or its patches do not fit.
    """
    size = image_sides(image_size)
    if not isinstance(layout, Patches):
        raise UsageError(f"image_size must be that of the layout {layout}, got {size}")
    p = layout.patch
    if any(side % p for side in size):
        nearest = tuple(max(p, round(side / p) * p) for side in size)
        raise UsageError(
            f"image_size must be a multiple of the patch, {p}: got {size}; the nearest is {nearest}"
        )
    return replace(layout, image_size=size)


def highest(layout: Layout, value: Shaped[Tensor, " N"]) -> Shaped[Tensor, "H W"]:
    """For each pixel, the highest value of the tokens that it depends on.

    Args:
        layout: of the tokens. A layout whose pixels depend on several tokens, as those in
            `bands.py`, has a method `highest(value)`.
        value: a number for each token, in raster order.
    """
    own = getattr(layout, "highest", None)
    if own is not None:
        return own(value)
    # Numbers of tokens are exact in float32.
    tokens = value.float().view(1, -1, 1).expand(1, -1, layout.token_dim)
    return layout.image(tokens)[0].amax(0).to(value.dtype)


def touched(layout: Layout, mask: Bool[Tensor, "H W"]) -> Bool[Tensor, " N"]:
    """The tokens, in raster order, on which some pixel of a mask depends."""
    # Random numbers: a product with a token's coefficients is 0 with probability 0.
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *layout.image_shape, dtype=torch.float64, generator=generator) + 1
    return (layout.tokens(image * mask.cpu())[0].abs() > 1e-12).any(-1).to(mask.device)


def same_layout(a: Layout, b: Layout) -> bool:
    """Whether two layouts cut images alike, even if their classes do not define equality."""
    if type(a) is not type(b):
        return False
    alike = a.image_shape == b.image_shape and a.token_dim == b.token_dim
    return a == b or (alike and torch.equal(a.coords, b.coords))


def check_shape(value: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse anything but a batch of tensors of a shape."""
    if dense_tensor(value, name).shape[1:] != shape or value.ndim != len(shape) + 1:
        raise UsageError(
            f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(value.shape)}"
        )
