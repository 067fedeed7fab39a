"""`Tokenizer`: images to a grid of codes, and back by the grouped decoder.

An encoder gives a few bounded numbers per cell, finite scalar quantisation rounds each to one of a
few levels (Mentzer et al. 2023), and a `Decoder` conditioned on the grid decodes the image. All
parts are trained together by the decoder's loss, whose gradient passes through the rounding
unchanged.
"""

import copy
from collections.abc import Iterator, Sequence
from math import log2, prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.conditioning import TokenGrid
from rolldiff.decoder import Decoder, check_image
from rolldiff.diffusion.layout import image_sides
from rolldiff.diffusion.process import Shard
from rolldiff.errors import (
    WHOLE,
    UsageError,
    boolean,
    dense_tensor,
    instance,
    whole_number,
    whole_numbers,
)
from rolldiff.hub import Pretrained
from rolldiff.nn.transformer import MAX_DEPTH, MAX_WIDTH

__all__ = ["Encoder", "Tokenizer", "check_codes"]

MAX_CODES = 2**24


class Encoder(nn.Module):
    """A convolutional encoder: images `[B, C, H, W]` to a grid `[B, h, w, channels]`.

    Args:
        image_size: height and width in pixels, or one number for a square image.
        in_channels: `C`.
        factor: pixels per cell in each direction, a power of 2: `h = H / factor`.
        channels: numbers per cell.
        width: channels inside.
        depth: residual blocks at every resolution.
        stem: pixels in each direction that the first layer joins, a power of 2 up to `factor`.
        local: normalise over the channels of each place instead of the whole image, so that a cell
            depends on the pixels around it alone, in images of any size.

    Raises:
        UsageError: if a size is out of range, `factor` is not a power of 2 or does not divide the
            image, or `stem` is not a power of 2 that divides `factor`.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        in_channels: int = 3,
        factor: int = 2,
        channels: int = 3,
        width: int = 64,
        depth: int = 2,
        stem: int = 1,
        local: bool = False,
    ) -> None:
        super().__init__()
        size = image_sides(image_size)
        in_channels = whole_number(in_channels, "in_channels", maximum=MAX_WIDTH)
        channels = whole_number(channels, "channels", maximum=MAX_WIDTH)
        width = whole_number(width, "width", maximum=MAX_WIDTH)
        depth = whole_number(depth, "depth", minimum=0, maximum=MAX_DEPTH)
        factor = whole_number(factor, "factor")
        if factor & (factor - 1) or any(side % factor for side in size):
            raise UsageError(
                f"factor must be a power of 2 that divides the image {size}, got {factor}"
            )
        stem = whole_number(stem, "stem")
        if stem & (stem - 1) or factor % stem:
            raise UsageError(f"stem must be a power of 2 that divides {factor}, got {stem}")
        local = boolean(local, "local")
        if depth * factor.bit_length() > MAX_DEPTH:
            raise UsageError(
                f"depth must give at most {MAX_DEPTH} blocks in all, got {depth} at each of "
                f"{factor.bit_length()} resolutions"
            )
        self.config = {
            "image_size": list(size),
            "in_channels": in_channels,
            "factor": factor,
            "channels": channels,
            "width": width,
            "depth": depth,
            "stem": stem,
            "local": local,
        }
        self.factor, self.local = factor, local
        self.grid = (size[0] // factor, size[1] // factor)
        first = nn.Conv2d(in_channels, width, 3, padding=1)
        if stem > 1:
            first = nn.Conv2d(in_channels, width, stem, stride=stem)
        layers: list[nn.Module] = [first]
        for _ in range(int(log2(factor // stem))):
            layers += [_Residual(width, local=local) for _ in range(depth)]
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        layers += [_Residual(width, local=local) for _ in range(depth)]
        layers += [_norm(width, local=local), nn.SiLU(), nn.Conv2d(width, channels, 1)]
        self.layers = nn.Sequential(*layers)

    def resized(self, image_size: int | Sequence[int]) -> "Encoder":
        """The same weights for images of another size; only a `local` encoder is made for them.

        Raises:
            UsageError: if it is not local, or `factor` does not divide the size.
        """
        size, factor = image_sides(image_size), self.factor
        if not self.local or any(side % factor for side in size):
            raise UsageError(
                f"image_size must be a multiple of {factor} and the encoder local, got {size} and "
                f"local={self.local}"
            )
        other = copy.copy(self)
        other.config = self.config | {"image_size": list(size)}
        other.grid = (size[0] // factor, size[1] // factor)
        return other

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w channels"]:
        return self.layers(image).movedim(1, -1)


class _Residual(nn.Module):
    def __init__(self, width: int, *, local: bool) -> None:
        super().__init__()
        self.norm = _norm(width, local=local)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class _PlaceNorm(nn.LayerNorm):
    """Zero mean and unit variance over the channels of each place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _norm(width: int, *, local: bool) -> nn.Module:
    return _PlaceNorm(width) if local else nn.GroupNorm(1, width)


class Tokenizer(Pretrained):
    """An encoder, a quantiser and a decoder.

    Args:
        encoder: images to a grid of as many numbers per cell as there are `levels`.
        decoder: conditioned on one `TokenGrid` of these numbers.
        levels: the number of values that each number may take, 2 or more; their product is the
            codebook size, at most 2^24.

    Raises:
        UsageError: if a part is something else, or the grids or the numbers do not agree.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, *, levels: Sequence[int]) -> None:
        super().__init__()
        instance(encoder, Encoder, "encoder", "an Encoder")
        instance(decoder, Decoder, "decoder", "a Decoder")
        if decoder.latents:
            raise UsageError("decoder must be one of pictures, got one of latents")
        levels = whole_numbers(levels, "levels", minimum=2, maximum=MAX_CODES)
        if not levels or prod(levels) > MAX_CODES:
            raise UsageError(
                f"levels must hold numbers with a product of at most {MAX_CODES}, got {levels}"
            )
        grid = TokenGrid(*encoder.grid, channels=len(levels))
        if decoder.conditioning.parts != (grid,) or encoder.config["channels"] != len(levels):
            raise UsageError(
                f"encoder and decoder must agree on {grid}, got {decoder.conditioning.parts} and "
                f"{encoder.config['channels']} channels"
            )
        self.config = {"encoder": encoder, "decoder": decoder, "levels": list(levels)}
        self.encoder = encoder
        self.decoder = decoder
        # Imported here, because nothing but a tokenizer needs it and what it imports.
        from vector_quantize_pytorch import FSQ

        with torch.device("cpu"):  # it looks into its own numbers
            self.quantize = FSQ(list(levels))
        self.grid = encoder.grid
        self.codebook_size = prod(levels)

    def resized(self, image_size: int | Sequence[int]) -> "Tokenizer":
        """The same weights for images of another size; see `Encoder` and `Decoder.resized`."""
        other = copy.copy(self)
        encoder, decoder = self.encoder.resized(image_size), self.decoder.resized(image_size)
        other._modules = self._modules | {"encoder": encoder, "decoder": decoder}
        other.config = self.config | {"encoder": encoder, "decoder": decoder}
        other.grid = encoder.grid
        return other

    @property
    def num_tokens(self) -> int:
        """Codes per image."""
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.device

    def latents(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w levels"]:
        """The quantised grid; its gradient is that of the encoder.

        Raises:
            UsageError: if the images do not fit the decoder.
        """
        return self._quantized(image)[0].unflatten(1, self.grid)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """The codes of images, in raster order."""
        return self._quantized(image)[1].long()

    def dequantize(self, codes: Int[Tensor, "B N"]) -> Float[Tensor, "B h w levels"]:
        """The grid of some codes: the decoder's condition.

        Raises:
            UsageError: if their number is not that of an image, or one is out of range.
        """
        check_codes(codes, self.codebook_size, self.num_tokens)
        return self._dequantize(codes).unflatten(1, self.grid)

    def stream_latents(
        self, codes: Iterator[Int[Tensor, " B"]]
    ) -> Iterator[Float[Tensor, "B 1 levels"]]:
        """Codes that are still being generated, as a streamed condition of the decoder.

        Raises:
            UsageError: at once, if it is not an iterator; later, if a code is out of range.
        """
        instance(codes, Iterator, "codes", "an iterator over the codes of a batch")
        return (self._dequantize(check_codes(code, self.codebook_size)[:, None]) for code in codes)

    def loss(
        self,
        image: Tensor,
        *,
        generator: torch.Generator | None = None,
        shard: Shard = Shard(),
    ) -> Tensor:
        """The decoder's loss given the latents of the images; see `Decoder.loss`."""
        return self.decoder.loss(image, self.latents(image), generator=generator, shard=shard)

    def forward(self, image: Tensor, **options: Any) -> Tensor:
        """The loss, for wrappers that call a module, such as `DistributedDataParallel`."""
        return self.loss(image, **options)

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the decoder's backbone in place. See `Transformer.compile`."""
        self.decoder.compile(mode=mode)

    def _quantized(self, image: Tensor) -> tuple[Tensor, Tensor]:
        image = check_image(image, self.decoder.layout)
        if image.device != self.device:
            raise UsageError(f"image must be on the device {self.device}, got {image.device}")
        latents, codes = self.quantize(self.encoder(image).flatten(1, 2))
        return latents, codes

    def _dequantize(self, codes: Int[Tensor, "B k"]) -> Float[Tensor, "B k levels"]:
        return self.quantize.indices_to_codes(codes.long())


def check_codes(
    codes: Tensor, codebook_size: int, num_tokens: int | None = None
) -> Int[Tensor, "*codes"]:
    """The codes themselves.

    Args:
        codes: what a user passed, `[B, N]`, or `[B]` for one code per image.
        codebook_size: number of different codes.
        num_tokens: `N`, or None for `[B]`.

    Raises:
        UsageError: if their shape, type or range is wrong.
    """
    dense_tensor(codes, "codes", WHOLE)
    shape = () if num_tokens is None else (num_tokens,)
    if codes.ndim != 1 + len(shape) or codes.shape[1:] != shape or not len(codes):
        expected = ", ".join(map(str, ("B", *shape)))
        raise UsageError(f"codes must have shape ({expected}), got {tuple(codes.shape)}")
    low, high = (int(end) for end in codes.long().aminmax())
    if not 0 <= low <= high < codebook_size:
        raise UsageError(f"codes must be in 0 … {codebook_size - 1}, got {low} … {high}")
    return codes
