"""Layouts whose tokens are scales or frequencies instead of places: `Haar` and `DCT`.

Both are orthonormal, so noise and likelihoods are those of the pixels. An image becomes *bands*,
small images of coefficients; each band is cut into square patches, and each patch is a token. The
level of a band is its place in the order from coarse to fine, which every decode order keeps: the
first groups are a coarse image, the later ones its details.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from rolldiff.diffusion.layout import check_count, check_shape, image_sides
from rolldiff.errors import UsageError, whole_number

__all__ = ["DCT", "Haar"]


class _Bands:
    """What both layouts share: sizes, and which pixels depend on a token."""

    image_size: int | Sequence[int]
    channels: int
    patch: int

    @property
    def _spans(self) -> list[int]:
        """Of each band, how many pixels one of its coefficients spans."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return cast(tuple[int, int], self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    @property
    def num_tokens(self) -> int:
        height, width = self.size
        return height * width // self.patch**2

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch**2

    def highest(self, value: Shaped[Tensor, " N"]) -> Shaped[Tensor, "H W"]:
        """For each pixel, the highest value of the tokens that it depends on."""
        return _highest(value, self._spans, self.size, p=self.patch)


@dataclass(frozen=True)
class Haar(_Bands):
    """The Haar wavelet transform: a coarse image, and details in three directions per level.

    Level 0 is the coarse image of `H / 2^levels` rows, level `i` the details from that scale to
    twice its rows. With `s = 1 / sqrt(2)` a pair `(a, b)` becomes `(s (a + b), s (a - b))`, along
    rows and along columns.

    Args:
        image_size: height and width in pixels, or one number for a square image.
        channels: channels of the image.
        levels: how often the image is halved.
        patch: side of a token in coefficients; `2^levels patch` must divide the height and width.

    Raises:
        UsageError: if a size is below 1, the sizes do not divide each other, or there are more than
            2^20 tokens.
    """

    image_size: int | Sequence[int]
    channels: int = 3
    levels: int = 2
    patch: int = 1

    def __post_init__(self) -> None:
        _plain(self, "levels")
        _check_unit(self, 2**self.levels * self.patch, "2^levels patch")

    @cached_property
    def _bands(self) -> list[tuple[int, int]]:
        """Of each band, its level and how many pixels one of its coefficients spans."""
        levels = [(0, 2**self.levels)]
        for level in range(1, self.levels + 1):
            levels += [(level, 2 ** (self.levels - level + 1))] * 3
        return levels

    @property
    def _spans(self) -> list[int]:
        return [span for _, span in self._bands]

    @property
    def coords(self) -> Float[Tensor, "N 3"]:
        """Level, row and column; rows and columns in tokens of the finest details."""
        return _coords(self._bands, self.size, self.patch, unit=2)

    def tokens(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        check_shape(image, self.image_shape, "image")
        coarse, bands = image, list[Tensor]()
        for _ in range(self.levels):
            left, right = _halves(coarse, -1)
            (coarse, below), (across, both) = _halves(left, -2), _halves(right, -2)
            bands = [below, across, both, *bands]
        return _cut([coarse, *bands], self.patch)

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        check_shape(tokens, (self.num_tokens, self.token_dim), "tokens")
        coarse, *bands = _joined(tokens, self._spans, self.size, p=self.patch)
        for i in range(self.levels):
            below, across, both = bands[3 * i : 3 * i + 3]
            left, right = _whole(coarse, below, -2), _whole(across, both, -2)
            coarse = _whole(left, right, -1)
        return coarse


@dataclass(frozen=True)
class DCT(_Bands):
    """The discrete cosine transform of square blocks, frequency by frequency.

    The band of frequency `(u, v)` holds this coefficient of every block, and its level is `u + v`.

    Args:
        image_size: height and width in pixels, or one number for a square image.
        channels: channels of the image.
        block: side of a block in pixels.
        patch: side of a token in blocks; `block patch` must divide the height and width.

    Raises:
        UsageError: if a size is below 1, the sizes do not divide each other, or there are more than
            2^20 tokens.
    """

    image_size: int | Sequence[int]
    channels: int = 3
    block: int = 4
    patch: int = 1

    def __post_init__(self) -> None:
        _plain(self, "block")
        _check_unit(self, self.block * self.patch, "block patch")

    @cached_property
    def _frequencies(self) -> list[tuple[int, int]]:
        pairs = [(u, v) for u in range(self.block) for v in range(self.block)]
        return sorted(pairs, key=lambda pair: (sum(pair), pair))

    @property
    def _spans(self) -> list[int]:
        return [self.block] * self.block**2

    @property
    def coords(self) -> Float[Tensor, "N 3"]:
        """Level, row and column; rows and columns in tokens."""
        bands = [(u + v, self.block) for u, v in self._frequencies]
        return _coords(bands, self.size, self.patch, unit=self.block)

    def _cosines(self, like: Tensor) -> Float[Tensor, "b b"]:
        """`sqrt(2 / b) cos(pi u (n + 1/2) / b)`, the first row divided by `sqrt(2)`."""
        n = torch.arange(self.block, dtype=torch.float64)
        cosines = (torch.pi / self.block * n[:, None] * (n + 0.5)).cos() * (2 / self.block) ** 0.5
        cosines[0] /= 2**0.5
        return cosines.to(like)

    def tokens(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        check_shape(image, self.image_shape, "image")
        m, b = self._cosines(image), self.block
        blocks = rearrange(image, "n c (h x) (w y) -> n c h w x y", x=b, y=b)
        blocks = m @ blocks @ m.T
        return _cut([blocks[..., u, v] for u, v in self._frequencies], self.patch)

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        check_shape(tokens, (self.num_tokens, self.token_dim), "tokens")
        m, b = self._cosines(tokens), self.block
        bands = _joined(tokens, self._spans, self.size, p=self.patch)
        place = {pair: i for i, pair in enumerate(self._frequencies)}
        index = [place[u, v] for u in range(b) for v in range(b)]
        blocks = torch.stack([bands[i] for i in index], dim=-1).unflatten(-1, (b, b))
        return rearrange(m.T @ blocks @ m, "n c h w x y -> n c (h x) (w y)")


def _plain(layout: Haar | DCT, name: str) -> None:
    """One spelling only, so that equal layouts compare equal."""
    object.__setattr__(layout, "image_size", image_sides(layout.image_size))
    object.__setattr__(layout, name, whole_number(getattr(layout, name), name, maximum=64))
    for side in ("channels", "patch"):
        object.__setattr__(layout, side, whole_number(getattr(layout, side), side))


def _check_unit(layout: Haar | DCT, unit: int, name: str) -> None:
    if any(side % unit for side in layout.size):
        raise UsageError(
            f"{name} must divide image_size, got {unit} and image_size {layout.image_size}"
        )
    check_count(layout)


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along the rows (-2) or the columns (-1)."""
    a, b = x.unflatten(dim, (-1, 2)).unbind(dim)
    return (a + b) * 0.5**0.5, (a - b) * 0.5**0.5


def _whole(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The inverse of `_halves`."""
    pair = ((low + high) * 0.5**0.5, (low - high) * 0.5**0.5)
    return torch.stack(pair, dim=dim).flatten(dim - 1, dim)


def _cut(bands: Sequence[Tensor], p: int) -> Float[Tensor, "B N D"]:
    cut = "b c (h p) (w q) -> b (h w) (c p q)"
    return torch.cat([rearrange(band, cut, p=p, q=p) for band in bands], dim=1)


def _joined(
    tokens: Shaped[Tensor, "B N D"], spans: Sequence[int], size: tuple[int, int], *, p: int
) -> list[Tensor]:
    grids = _grids(spans, size, p=p)
    parts = tokens.split([h * w for h, w in grids], dim=1)
    join = "b (h w) (c p q) -> b c (h p) (w q)"
    return [
        rearrange(part, join, h=h, w=w, p=p, q=p) for part, (h, w) in zip(parts, grids, strict=True)
    ]


def _grids(spans: Sequence[int], size: tuple[int, int], *, p: int) -> list[tuple[int, int]]:
    """Rows and columns of tokens of each band."""
    return [(size[0] // span // p, size[1] // span // p) for span in spans]


def _highest(
    value: Shaped[Tensor, " N"], spans: Sequence[int], size: tuple[int, int], *, p: int
) -> Shaped[Tensor, "H W"]:
    grids = _grids(spans, size, p=p)
    parts = value.split([h * w for h, w in grids])
    bands = [
        part.view(grid).repeat_interleave(span * p, dim=0).repeat_interleave(span * p, dim=1)
        for part, grid, span in zip(parts, grids, spans, strict=True)
    ]
    return torch.stack(bands).amax(0)


def _coords(
    bands: Sequence[tuple[int, int]], size: tuple[int, int], p: int, *, unit: int
) -> Float[Tensor, "N 3"]:
    """Level, row and column of each token, in tokens of bands whose coefficients span `unit`."""
    parts = []
    for level, span in bands:
        rows, columns = (
            torch.arange(float(side // span // p), device="cpu") * (span / unit) for side in size
        )
        grids = torch.meshgrid(
            torch.tensor([float(level)], device="cpu"), rows, columns, indexing="ij"
        )
        parts.append(torch.stack([grid.flatten() for grid in grids], dim=-1))
    return torch.cat(parts)
