"""Codes written one after another, and the decoder that draws the picture behind them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rolldiff.decoder import Frame
from rolldiff.prior import Prior
from rolldiff.tokenizer import Tokenizer

__all__ = ["Generation", "Timing", "timed"]


@dataclass(frozen=True)
class Timing:
    """Seconds since the first code was asked for.

    Attributes:
        first_row: until the top row of pixels would not change any more.
        whole: until the picture was done.
        codes_at_first_row: codes written by then, of all.
    """

    first_row: float
    whole: float
    codes_at_first_row: int


class Generation:
    """One batch of images from a prior and a tokenizer.

    Args:
        prior: writes the codes.
        tokenizer: whose decoder draws them.
        cond: class labels for the prior, `[B]`, or one number for all; None for none.
        num_images: how many.
        seed: of the codes and of the noise.
        temperature: see `Prior.write`.
        prior_guidance: its guidance.
        settings: of the decode, see `Decoder.stream`.

    Raises:
        ValueError: if prior and tokenizer do not belong together.
    """

    def __init__(
        self,
        prior: Prior,
        tokenizer: Tokenizer,
        *,
        cond: Any = None,
        num_images: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        prior_guidance: float = 0.0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        ours = (prior.num_tokens, prior.codes)
        if ours != (tokenizer.num_tokens, tokenizer.codes):
            raise ValueError(
                f"prior and decoder must have the same codes, got {ours[0]} codes of {ours[1]} and "
                f"{tokenizer.num_tokens} of {tokenizer.codes}"
            )
        self.prior, self.tokenizer = prior, tokenizer
        self.num_images, self.seed = num_images, seed
        self.settings = settings or {}
        self.ask = {
            "cond": cond,
            "num_images": num_images,
            "seed": seed,
            "temperature": temperature,
            "guidance": prior_guidance,
        }
        self.written = 0

    def codes(self) -> Iterator[Int[Tensor, " B"]]:
        """The codes, counted as they are written."""
        self.written = 0
        for code in self.prior.write(**self.ask):
            self.written += 1
            yield code

    def stream(
        self, *, frames: int | None = None, preview: bool = True, wait: bool = False
    ) -> Iterator[Frame]:
        """Frames of a decode that takes codes while they are written.

        Args:
            frames: see `Decoder.stream`.
            preview: likewise.
            wait: True writes all codes first, and then decodes.
        """
        codes = self.codes()
        return self.tokenizer.decoder.stream(
            self.tokenizer.pieces(iter(list(codes)) if wait else codes),
            num_images=self.num_images,
            seed=self.seed,
            frames=frames,
            preview=preview,
            **self.settings,
        )

    def images(self) -> Tensor:
        """The finished images, all codes being written first."""
        codes = torch.stack(list(self.codes()), dim=1)
        told = self.tokenizer.latents_of(codes)
        return self.tokenizer.decoder.decode(told, seed=self.seed, **self.settings).image


def timed(generation: Generation, *, wait: bool) -> Timing:
    """How long the first row and the whole picture take.

    Args:
        generation: what is generated.
        wait: see `Generation.stream`.
    """
    start = time.perf_counter()
    first, written = 0.0, 0
    for frame in generation.stream(preview=False, wait=wait):
        if not first and bool(frame.finished[0].all()):
            first, written = time.perf_counter() - start, generation.written
    return Timing(first, time.perf_counter() - start, written)
