"""`Served`: a decoder, or a prior and a tokenizer, with what a request may ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from torch import Tensor

from rolldiff.conditioning import ClassLabels, Conditioning
from rolldiff.decoder import DecodeConfig, Decoder, DecodeRun
from rolldiff.diffusion.layout import image_sides, resized
from rolldiff.diffusion.process import PerSampleNoise
from rolldiff.errors import UsageError, finite_number, instance, shown, whole_number
from rolldiff.nn.denoiser import Guidance
from rolldiff.tokenizer import Generation, Prior, Tokenizer

__all__ = ["Limits", "Served"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts.

    Args:
        images: of a request.
        steps: rows of the scheduling matrix of a decoding, over all groups.
        partial_images: of a request.
        pixels: of an image.
        body: bytes of a request.
        requests: that wait or run at a time; further ones are told 429.
        batch: images that are decoded together.
        connections: open at a time; further ones are told 503.
        seconds: in which the body of a request must arrive.

    Raises:
        UsageError: if one is not a whole number of 1 or more; `partial_images` may be 0, and
            `seconds` any number above 0.
    """

    images: int = 10
    steps: int = 4096
    partial_images: int = 64
    pixels: int = 2**20
    body: int = 2**24
    requests: int = 64
    batch: int = 16
    connections: int = 256
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            name, value = limit.name, getattr(self, limit.name)
            if name == "seconds":
                object.__setattr__(self, name, finite_number(value, name, minimum=1e-3))
                continue
            minimum = 0 if name == "partial_images" else 1
            object.__setattr__(self, name, whole_number(value, name, minimum=minimum))


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server decodes.

    Args:
        decoder: makes the images.
        name: of the model, in requests and answers.
        prior: generates the codes that the decoder of a tokenizer is given; None for a decoder of
            class labels or of no condition.
        tokenizer: the decoder's, with a prior.
        prompts: labels or names of classes for texts, beside the names of the classes.
        config: the settings of a request that names none.

    Raises:
        UsageError: if the decoder needs a condition that a prompt cannot give.
    """

    decoder: Decoder
    name: str = "rolldiff"
    prior: Prior | None = None
    tokenizer: Tokenizer | None = None
    prompts: Mapping[str, int | str] = field(default_factory=dict)
    config: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        instance(self.decoder, Decoder, "decoder", "a Decoder")
        if self.decoder.latents:
            raise UsageError("ckpt must be a decoder of pictures, got one of latents")
        if not self.name or not isinstance(self.name, str):
            raise UsageError(f"name must be a text, got {shown(self.name)}")
        if (self.prior is None) != (self.tokenizer is None):
            raise UsageError("prior and tokenizer must be given together, got one of them")
        others = [
            name
            for name, part in zip(self.conditioning.names, self.conditioning.parts, strict=True)
            if not isinstance(part, ClassLabels)
        ]
        if others or len(self.conditioning.parts) > 1:
            of = ", ".join(self.conditioning.names)
            raise UsageError(
                "ckpt must be a decoder of class labels or of no condition, or a tokenizer beside "
                f"prior=RUN, got a decoder of {of}"
            )
        for text, label in self.prompts.items():
            self._number(label, f"prompts[{text!r}]")

    @property
    def conditioning(self) -> Conditioning:
        """What the labels condition."""
        return self.decoder.conditioning if self.prior is None else self.prior.conditioning

    @property
    def labels(self) -> ClassLabels | None:
        """The classes; None if there are none."""
        (part,) = self.conditioning.parts or (None,)
        return part if isinstance(part, ClassLabels) and part.num_classes else None

    @cached_property
    def classes(self) -> Sequence[str]:
        """The classes by name, or by number if they have no names."""
        labels = self.labels
        if labels is None:
            return ()
        return labels.names or tuple(map(str, range(labels.num_classes)))

    @property
    def takes_no_class(self) -> bool:
        """Whether images of no class were among those of the training."""
        if self.prior is not None:
            return self.prior.drop_cond > 0
        return self.decoder.training_distribution.drop_cond > 0

    def label(self, prompt: str) -> int | None:
        """The class of a prompt: a text of the table, a class by name or number; "" for none.

        Raises:
            UsageError: if there is no such class.
        """
        text = prompt.strip()
        if self.labels is None or (not text and self.takes_no_class):
            return None
        table = {name.casefold(): label for name, label in self.prompts.items()}
        if text.casefold() in table:
            return self._number(table[text.casefold()], "prompt")
        return self._number(text, "prompt")

    def _number(self, label: int | str, name: str) -> int:
        labels, classes = self.labels, [text.casefold() for text in self.classes]
        if labels is None:
            raise UsageError(f"{name} must be of a model with class labels, got {shown(label)}")
        if isinstance(label, str) and label.strip().casefold() in classes:
            return classes.index(label.strip().casefold())
        text = str(label).strip()
        if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(classes):
            return int(text)
        known = [*self.prompts, *self.classes]
        choices = ", ".join(known[:40]) + (", …" if len(known) > 40 else "")
        if labels.names:
            choices += f", or a number below {len(classes)}"
        raise UsageError(f"{name} must be one of {choices}, got {shown(label)}")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images of the training."""
        return self.decoder.layout.image_shape[1], self.decoder.layout.image_shape[2]

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes can be asked for."""
        return getattr(self.decoder.backbone, "local", False) and self.prior is None

    def size(self, size: Sequence[int], *, pixels: int) -> tuple[int, int]:
        """A height and width that can be decoded.

        Raises:
            UsageError: if they cannot.
        """
        height, width = sides = image_sides(size)
        if sides == self.image_size:
            return sides
        if not self.any_size:
            own = "{1}x{0}".format(*self.image_size)
            raise UsageError(f"size must be auto or {own} with this model, got {width}x{height}")
        if height * width > pixels:
            raise UsageError(f"size must be at most {pixels} pixels, got {width}x{height}")
        resized(self.decoder.layout, sides)
        return sides

    def prepare(
        self,
        labels: Sequence[int | None],
        config: DecodeConfig,
        *,
        seeds: Sequence[tuple[int, int]],
        size: tuple[int, int],
        image: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> DecodeRun:
        """A decoding of several requests.

        Args:
            labels: of each request; all are None or none is.
            config: the settings that they share; with a prior, the guidance is that of the codes.
            seeds: of each request, its seed and its number of images.
            size: height and width.
            image: see `Decoder.decode`.
            mask: likewise.
        """
        counts = [count for _, count in seeds]
        cond = None
        if None not in labels:
            cond = [label for label, n in zip(labels, counts, strict=True) for _ in range(n)]
        if self.prior is not None and self.tokenizer is not None:
            # Codes are drawn from one seed for all images, so there is one request.
            ((seed, count),) = seeds
            assert isinstance(config.guidance, Guidance)  # DecodeConfig has turned numbers into one
            return Generation(
                self.prior,
                self.tokenizer,
                cond=cond,
                config=replace(config, guidance=0.0),
                num_images=count,
                seed=seed,
                guidance=config.guidance.scale,
            ).prepare()
        return self.decoder.prepare(
            cond,
            config,
            seed=PerSampleNoise.joined(PerSampleNoise(seed, n) for seed, n in seeds),
            image_size=size,
            image=image,
            mask=mask,
        )
