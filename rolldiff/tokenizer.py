"""Images to a grid of codes, and back by the grouped decoder.

An encoder gives a few bounded numbers a cell, finite scalar quantisation rounds each to one of a
few levels (Mentzer et al. 2023), and a `Decoder` conditioned on the grid draws the image. All is
trained at once by the decoder's own loss: its gradient goes through the rounding as if it were not
there.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.conditioning import Conditions
from rolldiff.conditions import TokenGrid
from rolldiff.decoder import Decoder
from rolldiff.hub import Pretrained
from rolldiff.layout import check_image
from rolldiff.nn.encoder import Encoder

__all__ = ["Tokenizer"]


class Tokenizer(Pretrained):
    """An encoder, a quantiser and a decoder.

    Args:
        encoder: images to a grid of as many numbers a cell as there are `levels`.
        decoder: conditioned on one `TokenGrid` of these numbers.
        levels: how many values each number may take; their product is the size of the codebook.

    Raises:
        ValueError: if the grids or the numbers do not agree.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, *, levels: Sequence[int]) -> None:
        super().__init__()
        # Imported here: only tokenizers need it, and what it brings.
        from vector_quantize_pytorch import FSQ

        grid = TokenGrid(*encoder.grid, channels=len(levels))
        if decoder.condition.parts != (grid,) or encoder.config["channels"] != len(levels):
            raise ValueError(
                f"encoder and decoder must agree on {grid}, got {decoder.condition.parts} and "
                f"{encoder.config['channels']} channels"
            )
        self.config = {"encoder": encoder, "decoder": decoder, "levels": list(levels)}
        self.encoder = encoder
        self.decoder = decoder
        self.quantize = FSQ(list(levels))
        self.grid = encoder.grid
        self.codes = prod(levels)

    @property
    def num_tokens(self) -> int:
        """Codes an image."""
        return self.grid[0] * self.grid[1]

    @property
    def condition(self) -> Conditions:
        """Of the whole: none, for the image itself is what it is told."""
        return Conditions()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.device

    def latents(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w levels"]:
        """The quantised grid; its gradient is that of the encoder.

        Raises:
            ValueError: if the images are not those of the decoder.
        """
        image = check_image(image, self.decoder.layout)
        quantised, _ = self.quantize(self.encoder(image).flatten(1, 2))
        return quantised.unflatten(1, self.grid)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """The codes of images, in raster order."""
        _, codes = self.quantize(
            self.encoder(check_image(image, self.decoder.layout)).flatten(1, 2)
        )
        return codes.long()

    def latents_of(self, codes: Int[Tensor, "B N"]) -> Float[Tensor, "B h w levels"]:
        """The grid of some codes, which is what the decoder is conditioned on.

        Raises:
            ValueError: if there are more or fewer than an image has, or one is out of range.
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens:
            raise ValueError(
                f"codes must have shape (B, {self.num_tokens}), got {tuple(codes.shape)}"
            )
        return self._numbers(codes).unflatten(1, self.grid)

    def pieces(self, codes: Iterator[Int[Tensor, " B"]]) -> Iterator[Float[Tensor, "B 1 levels"]]:
        """Codes that are still being written, as the decoder takes them."""
        return (self._numbers(code[:, None]) for code in codes)

    def loss(
        self, image: Tensor, cond: None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The decoder's loss; see `Decoder.loss`."""
        return self.decoder.loss(image, self.latents(image), generator=generator)

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the decoder's backbone, in place. See `Transformer.compile`."""
        self.decoder.compile(mode=mode)

    def _numbers(self, codes: Int[Tensor, "B k"]) -> Float[Tensor, "B k levels"]:
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ValueError(
                f"codes must be in 0 … {self.codes - 1}, got "
                f"{int(codes.min())} … {int(codes.max())}"
            )
        return self.quantize.indices_to_codes(codes)
