"""`Source`: the Lightning data module that all sources share; `Images`: one of pictures.

An example is an image `[C, H, W]`, a picture in [-1, 1] or the latents of one, with an integer
label. The held-out examples and the order of training depend on the seed alone; training resumed
from a checkpoint continues with the batch that would have come next.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from rolldiff.data.datasets import (
    HFlip,
    InMemoryImages,
    LazyImages,
    Load,
    OnError,
    Record,
    ResumableSampler,
    encoded,
    load_image,
    load_images,
    permutation,
)
from rolldiff.errors import UsageError, finite_number, instance, warn_user, whole_number
from rolldiff.integrations.autoencoder import WANTED, Autoencoder
from rolldiff.pixels import Color
from rolldiff.progress import progress

__all__ = ["Images", "Source"]

MAX_BYTES_IN_MEMORY = 2**32  # of decoded images; larger datasets are decoded lazily
ENCODED = 100  # images given to the autoencoder between two looks at the clock
VALIDATED = 500  # images per batch of a validation
FEW = 2000  # images that stand for a large dataset in comparisons and validations


@dataclass(kw_only=True, eq=False)
class Source(L.LightningDataModule, ABC):
    """Examples of one shape; subclasses implement `stored_shape`, `load` and `build_dataset`.

    Args:
        autoencoder: encodes pictures once, when they are loaded, so that the examples are their
            latents; None for none. Beside stored latents it only makes pictures of them.
        batch_size: examples per batch, of all processes together; a multiple of their number.
        max_steps: optimizer steps per epoch.
        seed: of the split and of the order; any whole number of 0 or more.
        held_out: fraction of the images that is never trained on, in [0, 1).
        reference_images: number of training images that samples are compared to, 2 or more, chosen
            at random and alike for every seed; None takes all, or 2,000 if all of them as floats
            exceed 4 GiB.
        on_error: whether an unreadable image is skipped with a warning or raises.
        workers: processes that decode images, if the dataset is too large to be held decoded.
    """

    autoencoder: Autoencoder | None = None
    batch_size: int = 128
    max_steps: int = 1000
    seed: int = 0
    held_out: float = 0.0
    reference_images: int | None = None
    on_error: OnError = "skip"
    workers: int = 0

    # What stands in the records, and whether training also sees the mirror image of each.
    stores_latents = False
    bytes_per_value = 1
    flip = False

    def __post_init__(self) -> None:
        super().__init__()
        for name, most in (("batch_size", 2**20), ("max_steps", 10**12)):
            setattr(self, name, whole_number(getattr(self, name), name, maximum=most))
        self.seed = whole_number(self.seed, "seed", minimum=0)
        self.workers = whole_number(self.workers, "workers", minimum=0, maximum=10**4)
        self.held_out = finite_number(self.held_out, "held_out", minimum=0, maximum=1)
        if self.held_out == 1:
            raise UsageError("held_out must be in [0, 1), got 1")
        if self.reference_images is not None:
            number = whole_number(self.reference_images, "reference_images", minimum=2)
            self.reference_images = number
        if self.on_error not in ("skip", "raise"):
            raise UsageError(f"on_error must be skip or raise, got {self.on_error!r}")
        if self.autoencoder is not None:
            instance(self.autoencoder, Autoencoder, "autoencoder", WANTED)
        self._batches_before = 0

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded record."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an example.

        Raises:
            UsageError: if the autoencoder does not fit what is stored.
        """
        if self.autoencoder is None:
            return self.stored_shape
        if self.stores_latents:
            self.autoencoder.check_latents(self.stored_shape)
            return self.stored_shape
        return self.autoencoder.latent_shape(self.stored_shape)

    @property
    def latents(self) -> bool:
        """Whether the examples are latents."""
        return self.stores_latents or self.autoencoder is not None

    @property
    @abstractmethod
    def load(self) -> Load:
        """Decodes one record, to bytes or to floats."""

    @abstractmethod
    def build_dataset(self) -> Dataset:
        """The whole source as a dataset that is indexed with `[B]` indices.

        Raises:
            UsageError: if an image is unreadable and `on_error` is `raise`, or if none is left.
        """

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their labels; None if they have no names."""
        return None

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return len(self.class_names or ())

    def from_records(self, records: Sequence[Record]) -> Dataset:
        """A dataset of encoded images: decoded now if they fit into memory, else when indexed."""
        size = len(records) * self.bytes_per_value * math.prod(self.stored_shape)
        if size <= MAX_BYTES_IN_MEMORY:
            return InMemoryImages(*load_images(records, self.load, on_error=self.on_error))
        if self.on_error == "raise":  # now, not in the middle of an epoch
            for record in records:
                self.load(record)
        return LazyImages(records, self.load)

    def left_out(self, rule: str) -> None:
        """Warn that something is left out, or refuse it with `on_error="raise"`.

        Raises:
            UsageError: with `on_error="raise"`.
        """
        if self.on_error == "raise":
            raise UsageError(rule)
        warn_user(f"left out: {rule}")

    @property
    def rank(self) -> int:
        """Index of this process in distributed training."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Number of processes in distributed training."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def batch_per_process(self) -> int:
        """Examples per batch in this process.

        Raises:
            UsageError: if the processes cannot have equal parts of a batch.
        """
        if self.batch_size % self.world_size:
            raise UsageError(
                f"batch_size must be a multiple of the {self.world_size} processes that share a "
                f"batch, got {self.batch_size}"
            )
        return self.batch_size // self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Training batches per epoch: `max_steps`, times those of which gradients accumulate."""
        return self.max_steps * (self.trainer.accumulate_grad_batches if self.trainer else 1)

    def batches_seen(self) -> int:
        """Training batches so far, including those before a checkpoint."""
        if (trainer := self.trainer) is None:
            return self._batches_before
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready

    @property
    def image(self) -> Float[Tensor, "B C H W"]:
        """The images that samples are compared to."""
        return self._reference[0]

    @property
    def label(self) -> Int[Tensor, " B"]:
        """Their labels."""
        return self._reference[1]

    @property
    def held_out_images(self) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]:
        """The images that are never trained on, 2,000 at random if there are more; their labels."""
        return self._dataset[self._some(self._split[1], FEW)]

    def train_dataloader(self) -> Any:
        train = self._split[0]
        sampler = ResumableSampler(
            len(train) * (2 if self.flip else 1),
            batch_size=self.batch_per_process,
            batches_per_epoch=self.batches_per_epoch,
            seed=self.seed,
            batches_done=self.batches_seen,
            limit=self._batches_used,
            overfit=self._overfit,
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(
            HFlip(self._dataset, train),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches: no collating
            num_workers=self._num_workers,
        )

    @property
    def _batches_used(self) -> int:
        """Batches of an epoch within the trainer's `limit_train_batches`."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        batches = self.batches_per_epoch
        return min(limit, batches) if isinstance(limit, int) else max(int(limit * batches), 1)

    @property
    def _overfit(self) -> bool:
        """Whether the trainer's `overfit_batches` repeats the same batches in every epoch."""
        return bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]

    def val_dataloader(self) -> Any:
        train, held_out = self._split
        chosen = held_out if len(held_out) else self._some(train, FEW)
        size = max(VALIDATED // self.world_size, 1)
        if self.world_size > 1:
            chosen = share(chosen, size, rank=self.rank, world_size=self.world_size)
        return DataLoader(
            HFlip(self._dataset, chosen),
            sampler=SequentialSampler(range(len(chosen))),  # without the mirror images
            batch_size=size,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
        )

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches_seen()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_before = state_dict["batches"]

    @property
    def _num_workers(self) -> int:
        return self.workers if isinstance(self._dataset, LazyImages) else 0

    @cached_property
    def _stored(self) -> Dataset:
        return self.build_dataset()

    @cached_property
    def _dataset(self) -> Dataset:
        if self.autoencoder is None or self.stores_latents:
            return self._stored
        size = len(self._stored)  # type: ignore[arg-type]
        parts: Iterable[Int[Tensor, " B"]] = torch.arange(size).split(ENCODED)
        if self.rank == 0:
            parts = progress(parts, f"encoding {size} images, {ENCODED} at a time")
        return encoded(self._stored, self.autoencoder.encode, parts=parts, flip=self.flip)

    @cached_property
    def _split(self) -> tuple[Int[Tensor, " A"], Int[Tensor, " B"]]:
        """Indices of the images trained on, and of those held out."""
        size = len(self._dataset)  # type: ignore[arg-type]
        num_held_out = int(self.held_out * size)
        if self.held_out and not 0 < num_held_out < size:
            raise UsageError(
                f"held_out must leave an image to hold out and one to train on, got {self.held_out}"
                f" of {size} images"
            )
        order = permutation(size, self.seed) if self.held_out else torch.arange(size)
        train, held_out = order.split([size - num_held_out, num_held_out])
        return train.sort().values, held_out.sort().values

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        train = self._split[0]
        number = self.reference_images
        if number is None:
            floats = len(train) * math.prod(self.shape)
            number = FEW if 4 * floats > MAX_BYTES_IN_MEMORY else len(train)
        return self._dataset[self._some(train, number)]

    def _some(self, index: Int[Tensor, " N"], number: int) -> Int[Tensor, " M"]:
        """At most `number` of the indices: random, and the same ones for every seed.

        Trainings with other seeds could not be compared if each were measured on images of its own.
        """
        if number >= len(index):
            return index
        return index[permutation(len(index), 0)[:number]]


@dataclass(kw_only=True, eq=False)
class Images(Source):
    """Pictures of one source at one size; subclasses implement `build_dataset`.

    Args:
        image_size: side in pixels; images of another size are cropped to a square and resized.
        channels: 1 for grey, 3 for RGB.
        flip: also train on the mirror image of every image, which doubles the dataset.
        background: the colour behind transparent pixels, a grey or three numbers in 0 … 255.
    """

    image_size: int
    channels: int
    flip: bool = False
    background: int | Sequence[int] = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = whole_number(self.image_size, "image_size", maximum=2**16)
        if whole_number(self.channels, "channels") not in (1, 3):
            raise UsageError(f"channels must be 1 or 3, got {self.channels}")
        self.channels = int(self.channels)
        if not isinstance(self.flip, bool):
            raise UsageError(f"flip must be true or false, got {self.flip!r}")
        self._color = _color(self.background)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    @property
    def load(self) -> Load:
        """Decodes one record to the size and the channels of this source."""
        return partial(
            load_image,
            image_size=self.image_size,
            channels=self.channels,
            background=self._color,
        )


def share(index: Int[Tensor, " N"], size: int, *, rank: int, world_size: int) -> Int[Tensor, " M"]:
    """The images that a process validates, so that each has an equal part of every batch.

    The last batch is filled up with the first images if its parts would not be equal.

    Args:
        index: the images of all processes.
        size: images per batch and process.
        rank: of the process.
        world_size: the number of processes.
    """
    index = torch.cat([index, index.repeat(world_size)[: -len(index) % world_size]])
    batches = index.split(size * world_size)
    return torch.cat([batch.chunk(world_size)[rank] for batch in batches])


def _as_it_is(batch: Any) -> Any:
    return batch


def _color(value: Any) -> Color:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(numbers) not in (1, 3):
        raise UsageError(f"background must be a grey or three numbers, got {value!r}")
    red, green, blue = (
        whole_number(n, "background", minimum=0, maximum=255) for n in (numbers * 3)[:3]
    )
    return red, green, blue
