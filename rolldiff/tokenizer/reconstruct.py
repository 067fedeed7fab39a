"""`reconstruct`: a picture of any size to its codes, and back from top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rolldiff.decoder import DecodeConfig, Frame
from rolldiff.errors import UsageError, dense_tensor, instance
from rolldiff.tokenizer.tokenizer import Tokenizer

__all__ = ["Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """The codes of pictures, and how they are decoded.

    Attributes:
        tokenizer: for the size of the padded pictures.
        latents: `[B, h, w, levels]`, the grid of codes as numbers.
        size: height and width of the pictures in pixels.
    """

    tokenizer: Tokenizer
    latents: Float[Tensor, "B h w levels"]
    size: tuple[int, int]

    @property
    def bits_per_pixel(self) -> float:
        """Bits of the codes for each pixel of a picture."""
        bits = self.tokenizer.num_tokens * math.log2(self.tokenizer.codebook_size)
        return bits / math.prod(self.size)

    def stream(
        self,
        config: DecodeConfig = DecodeConfig(),
        *,
        seed: int | torch.Generator | None = None,
        frames: int | None = None,
        preview: bool = True,
    ) -> Iterator[Frame]:
        """The pictures while they are decoded; see `Decoder.stream`."""
        height, width = self.size
        stream = self.tokenizer.decoder.stream(
            self.latents, config, seed=seed, frames=frames, preview=preview
        )
        for frame in stream:
            yield replace(
                frame,
                image=frame.image[..., :height, :width],
                finished=frame.finished[:height, :width],
            )


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, image: Float[Tensor, "B C H W"]) -> Reconstruction:
    """Encode pictures of any size.

    A picture that the cells do not fill is padded with its last rows and columns, which are cut
    off again.

    Args:
        tokenizer: with a `local` encoder and a decoder with a window, for sizes other than that of
            its training.
        image: the pictures, floating point, in [-1, 1].

    Raises:
        UsageError: if the pictures have other channels than the tokenizer, values out of range, or
            a size that it cannot take.
    """
    instance(tokenizer, Tokenizer, "tokenizer", "a Tokenizer")
    channels = tokenizer.decoder.layout.image_shape[0]
    dense_tensor(image, "image")
    if image.ndim != 4 or image.shape[1] != channels or not image.numel():
        raise UsageError(f"image must have shape (B, {channels}, H, W), got {tuple(image.shape)}")
    height, width = image.shape[2:]
    unit = math.lcm(tokenizer.encoder.factor, getattr(tokenizer.decoder.layout, "patch", 1))
    padding = (0, -width % unit, 0, -height % unit)
    padded = F.pad(image.to(tokenizer.device), padding, mode="replicate")
    size = (padded.shape[2], padded.shape[3])
    if size != tuple(tokenizer.decoder.layout.image_shape[1:]):
        tokenizer = tokenizer.resized(size)
    return Reconstruction(tokenizer, tokenizer.latents(padded), (height, width))
