"""`Generation`: a prior that generates codes, and a decoder that decodes them as they arrive."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rolldiff.decoder import DecodeConfig, DecodeRun, Frame
from rolldiff.diffusion.process import MAX_IMAGES, MAX_SEED
from rolldiff.errors import UsageError, boolean, finite_number, instance, whole_number
from rolldiff.tokenizer.prior import Prior
from rolldiff.tokenizer.tokenizer import Tokenizer

__all__ = ["Generation", "Timing", "measure_latency"]


@dataclass
class Generation:
    """One batch of images from a prior and a tokenizer.

    Args:
        prior: generates the codes.
        tokenizer: its decoder decodes them.
        cond: class labels for the prior, `[B]`, or one number for all; None for none.
        config: the settings of the decoding.
        num_images: number of images.
        seed: of the codes and of the noise.
        temperature: of the codes, see `Prior.generate`.
        guidance: of the codes, likewise.

    Attributes:
        num_generated: codes per image generated so far.

    Raises:
        UsageError: if an argument is something else or out of range, or the prior and the tokenizer
            have different codes.
    """

    prior: Prior
    tokenizer: Tokenizer
    cond: Any = field(default=None, kw_only=True)
    config: DecodeConfig = field(default=DecodeConfig(), kw_only=True)
    num_images: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    guidance: float = field(default=0.0, kw_only=True)
    num_generated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        instance(self.prior, Prior, "prior", "a Prior")
        instance(self.tokenizer, Tokenizer, "tokenizer", "a Tokenizer")
        instance(self.config, DecodeConfig, "config", "a DecodeConfig")
        self.num_images = whole_number(self.num_images, "num_images", maximum=MAX_IMAGES)
        self.seed = whole_number(self.seed, "seed", minimum=0, maximum=MAX_SEED)
        self.temperature = finite_number(self.temperature, "temperature", minimum=0)
        if self.temperature == 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")
        self.guidance = finite_number(self.guidance, "guidance")
        conditioning = self.prior.conditioning
        conditioning.validate(self.cond, self.num_images, self.prior.device)
        if self.guidance and not conditioning.split(self.cond):
            raise UsageError(
                f"guidance needs a condition, got guidance {self.guidance} without cond"
            )
        ours, theirs = (
            (part.num_tokens, part.codebook_size) for part in (self.prior, self.tokenizer)
        )
        if ours != theirs:
            raise UsageError(
                "prior and tokenizer must have the same codes, got "
                f"{ours[0]} codes of {ours[1]} and {theirs[0]} of {theirs[1]}"
            )

    def codes(self) -> Iterator[Int[Tensor, " B"]]:
        """The codes, counted as they are generated."""
        self.num_generated = 0
        codes = self.prior.generate(
            self.cond,
            num_images=self.num_images,
            seed=self.seed,
            temperature=self.temperature,
            guidance=self.guidance,
        )
        for code in codes:
            self.num_generated += 1
            yield code

    def stream(
        self, *, frames: int | None = None, preview: bool = True, wait: bool = False
    ) -> Iterator[Frame]:
        """Frames of a decoding that takes codes as they are generated.

        Args:
            frames: see `Decoder.stream`.
            preview: likewise.
            wait: generate all codes before the decoding starts.
        """
        wait = boolean(wait, "wait")
        codes = self.codes()
        return self.tokenizer.decoder.stream(
            self.tokenizer.stream_latents(iter(list(codes)) if wait else codes),
            self.config,
            num_images=self.num_images,
            seed=self.seed,
            frames=frames,
            preview=preview,
        )

    def prepare(self) -> DecodeRun:
        """The decoding of codes as they are generated; see `Decoder.prepare`."""
        return self.tokenizer.decoder.prepare(
            self.tokenizer.stream_latents(self.codes()),
            self.config,
            num_images=self.num_images,
            seed=self.seed,
        )

    def images(self) -> Tensor:
        """The finished images; all codes are generated first."""
        latents = self.tokenizer.dequantize(torch.stack(list(self.codes()), dim=1))
        return self.tokenizer.decoder.decode(latents, self.config, seed=self.seed).image


@dataclass(frozen=True)
class Timing:
    """Seconds since the generation of the first code began.

    Attributes:
        first_row: until the top row of pixels was final.
        whole: until the image was finished.
        codes_at_first_row: codes generated when the top row was final.
    """

    first_row: float
    whole: float
    codes_at_first_row: int


def measure_latency(generation: Generation, *, wait: bool) -> Timing:
    """How long the first row and the whole image take.

    Args:
        generation: what is generated.
        wait: see `Generation.stream`.
    """
    start = time.perf_counter()
    first_row, codes = 0.0, 0
    for frame in generation.stream(preview=False, wait=wait):
        if not first_row and bool(frame.finished[0].all()):
            first_row, codes = time.perf_counter() - start, generation.num_generated
    return Timing(first_row, time.perf_counter() - start, codes)
