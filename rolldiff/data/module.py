"""`Images`: the Lightning data module that all image sources share.

Images are `[C, H, W]` in [-1, 1], each with an integer label. The held-out images and the order of
training depend on the seed alone; training resumed from a checkpoint continues with the batch that
would have come next.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rolldiff.data.datasets import (
    HFlip,
    InMemoryImages,
    LazyImages,
    Load,
    OnError,
    Record,
    ResumableSampler,
    load_image,
    load_images,
)
from rolldiff.errors import UsageError

__all__ = ["Images"]

MAX_BYTES_IN_MEMORY = 2**32  # of decoded images; larger datasets are decoded lazily


@dataclass(kw_only=True, eq=False)
class Images(L.LightningDataModule, ABC):
    """Images of one source at one size; subclasses implement `build_dataset`.

    Args:
        image_size: side in pixels; images of another size are cropped to a square and resized.
        channels: 1 for grey, 3 for RGB.
        batch_size: examples per batch and process.
        max_steps: batches per epoch.
        seed: of the split and of the order.
        flip: also train on the mirror image of every image, which doubles the dataset.
        held_out: fraction of the images that is never trained on, in [0, 1).
        reference_images: number of training images that samples are compared to, 2 or more, chosen
            at random; None takes all.
        on_error: whether an unreadable image is skipped with a warning or raises.
        workers: processes that decode images, if the dataset is too large to be held decoded.
    """

    image_size: int
    channels: int
    batch_size: int = 128
    max_steps: int = 1000
    seed: int = 0
    flip: bool = False
    held_out: float = 0.0
    reference_images: int | None = None
    on_error: OnError = "skip"
    workers: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        if min(self.batch_size, self.max_steps, self.image_size) < 1:
            raise UsageError(
                "batch_size, max_steps and image_size must be 1 or more, got "
                f"{self.batch_size}, {self.max_steps} and {self.image_size}"
            )
        if self.channels not in (1, 3):
            raise UsageError(f"channels must be 1 or 3, got {self.channels}")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.reference_images is not None and self.reference_images < 2:
            raise UsageError(f"reference_images must be 2 or more, got {self.reference_images}")
        if self.on_error not in ("skip", "raise"):
            raise UsageError(f"on_error must be skip or raise, got {self.on_error!r}")
        self._batches_seen = 0

    @abstractmethod
    def build_dataset(self) -> Dataset:
        """The whole source as a dataset that is indexed with `[B]` indices.

        Raises:
            UsageError: if an image is unreadable and `on_error` is `raise`, or if none is left.
        """

    def from_records(self, records: Sequence[Record]) -> Dataset:
        """A dataset of encoded images: decoded now if they fit into memory, else when indexed."""
        if len(records) * self.channels * self.image_size**2 <= MAX_BYTES_IN_MEMORY:
            return InMemoryImages(*load_images(records, self.load, on_error=self.on_error))
        if self.on_error == "raise":  # now, not in the middle of an epoch
            for record in records:
                self.load(record)
        return LazyImages(records, self.load)

    @property
    def load(self) -> Load:
        """Decodes one record to the size and the channels of this source."""
        return partial(load_image, image_size=self.image_size, channels=self.channels)

    @property
    def rank(self) -> int:
        """Index of this process in distributed training."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Number of processes in distributed training."""
        return self.trainer.world_size if self.trainer else 1

    def batches_seen(self) -> int:
        """Training batches so far, including those before a checkpoint."""
        if (trainer := self.trainer) is not None and trainer.training:
            ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            self._batches_seen = max(self._batches_seen, ready)
        return self._batches_seen

    @property
    def image(self) -> Float[Tensor, "B C H W"]:
        """The images that samples are compared to."""
        return self._reference[0]

    @property
    def label(self) -> Int[Tensor, " B"]:
        """Their labels."""
        return self._reference[1]

    def train_dataloader(self) -> Any:
        train = self._split[0]
        sampler = ResumableSampler(
            len(train) * (2 if self.flip else 1),
            batch_size=self.batch_size,
            batches_per_epoch=self.max_steps,
            seed=self.seed,
            batches_done=self.batches_seen,
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(
            HFlip(self._dataset, train),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches: no collating
            num_workers=self.workers if isinstance(self._dataset, LazyImages) else 0,
        )

    def val_dataloader(self) -> Any:
        train, held_out = self._split
        image, label = self._dataset[held_out if len(held_out) else train[:2000]]
        return DataLoader(TensorDataset(image, label), batch_size=500)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches_seen()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_seen = state_dict["batches"]

    @cached_property
    def _dataset(self) -> Dataset:
        return self.build_dataset()

    @cached_property
    def _split(self) -> tuple[Int[Tensor, " A"], Int[Tensor, " B"]]:
        """Indices of the images trained on, and of those held out."""
        size = len(self._dataset)  # type: ignore[arg-type]
        order = self._permutation(size) if self.held_out else torch.arange(size)
        num_held_out = int(self.held_out * size)
        train, held_out = order.split([size - num_held_out, num_held_out])
        return train.sort().values, held_out.sort().values

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        train = self._split[0]
        if self.reference_images is not None and self.reference_images < len(train):
            train = train[self._permutation(len(train))[: self.reference_images]]
        return self._dataset[train]

    def _permutation(self, size: int) -> Int[Tensor, " N"]:
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
