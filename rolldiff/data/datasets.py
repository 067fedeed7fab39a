"""Torch datasets of images, and the order in which training goes through them.

A dataset is indexed with a whole batch of indices `[B]` and returns images `[B, C, H, W]` in
[-1, 1] with integer labels `[B]`. Encoded images are passed in as *records* and decoded by a
function `load` from a record to bytes `[C, H, W]`, usually `load_image` with its settings bound.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from rolldiff.errors import UsageError, reason

__all__ = [
    "HFlip",
    "InMemoryImages",
    "LazyImages",
    "Load",
    "OnError",
    "Record",
    "ResumableSampler",
    "StreamingImages",
    "load_image",
    "load_images",
]

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]
OnError = Literal["skip", "raise"]


@dataclass(frozen=True)
class Record:
    """An image that is not decoded yet.

    Attributes:
        name: identifies the image in error messages.
        data: its encoded bytes, or the file that holds them.
        label: its class; 0 without classes.
    """

    name: str
    data: bytes | Path
    label: int


Load = Callable[[Record], Tensor]


def load_image(record: Record, *, image_size: int, channels: int) -> UInt8[Tensor, "C H W"]:
    """Decode an image, crop it to its central square and resize it.

    An image that already has the requested size keeps its exact pixel values.

    Args:
        record: the encoded image.
        image_size: side of the square in pixels.
        channels: 1 for grey, 3 for RGB.

    Raises:
        UsageError: if the data is not an image, or is damaged.
    """
    data = record.data
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    # Decoders raise almost any exception on a damaged file.
    except Exception as error:
        raise UsageError(f"data must be pictures, got {record.name}: {reason(error)}") from error
    size = (image_size, image_size)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image).reshape(*size, channels)).permute(2, 0, 1)


def load_images(
    records: Iterable[Record], load: Load, *, on_error: OnError
) -> tuple[UInt8[Tensor, "N C H W"], Int[Tensor, " N"]]:
    """Decode all records, in order.

    Args:
        records: the encoded images.
        load: decodes one of them.
        on_error: whether an unreadable image is skipped with a warning or raises.

    Raises:
        UsageError: if an image is unreadable and `on_error` is `raise`, or if none is left.
    """
    images, labels = [], []
    for record in records:
        try:
            images.append(load(record))
        except ValueError as error:
            if on_error == "raise":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            continue
        labels.append(record.label)
    if not images:
        raise UsageError("data must hold a picture at least, got none")
    return torch.stack(images), torch.tensor(labels)


class InMemoryImages(Dataset):
    """Decoded images, held either as bytes or as floats in [-1, 1]."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        return _scale(self.image[index]), self.label[index]


class LazyImages(Dataset):
    """Images that are decoded each time they are indexed.

    An unreadable image is replaced by the next readable one, so that batches keep their size.
    """

    def __init__(self, records: Sequence[Record], load: Load) -> None:
        self.records, self.load = records, load

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        images, labels = zip(*map(self._first_readable, index.tolist()), strict=True)
        return _scale(torch.stack(images)), torch.tensor(labels)

    def _first_readable(self, start: int) -> tuple[Tensor, int]:
        for i in range(start, start + len(self)):
            record = self.records[i % len(self)]
            try:
                return self.load(record), record.label
            except ValueError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
        raise UsageError("data must hold a picture at least, got none")


class HFlip(Dataset):
    """A subset of a dataset, followed by its mirror images.

    Indices `0 … N - 1` are the images at `subset` as they are, `N … 2N - 1` the same images flipped
    horizontally.
    """

    def __init__(self, dataset: Dataset, subset: Int[Tensor, " N"]) -> None:
        self.dataset, self.subset = dataset, subset

    def __len__(self) -> int:
        return 2 * len(self.subset)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        size = len(self.subset)
        image, label = self.dataset[self.subset[index % size]]
        return torch.where((index >= size)[:, None, None, None], image.flip(-1), image), label


class StreamingImages(IterableDataset):
    """Batches decoded from a stream of records, for sources too large to be fetched first.

    Global batch `b` always holds the records from `b * batch_size * world_size` on. An unreadable
    image is replaced by another one of its batch. Resuming skips the records of earlier batches
    without decoding them.

    Args:
        records: returns the records of an epoch, given its number.
        load: decodes one record.
        on_error: whether an unreadable image is skipped with a warning or raises.
        batch_size: images per batch and process.
        batches_per_epoch: batches until the loader ends an epoch.
        batches_done: returns the number of batches before this epoch, or before resuming.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        records: Callable[[int], Iterator[Record]],
        load: Load,
        *,
        on_error: OnError,
        batch_size: int,
        batches_per_epoch: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.records, self.load, self.on_error = records, load, on_error
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.batches_done, self.rank, self.world_size = batches_done, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        done = self.batches_done()
        global_batch = self.batch_size * self.world_size
        records = chain.from_iterable(self.records(epoch) for epoch in count())
        for _ in islice(records, done * global_batch):
            pass
        for _ in _rest_of_epoch(done, self.batches_per_epoch):
            share = list(islice(records, global_batch))[self.rank :: self.world_size]
            image, label = load_images(share, self.load, on_error=self.on_error)
            # Images that were skipped are made up for by repeating the first ones.
            yield InMemoryImages(image, label)[torch.arange(self.batch_size) % len(image)]


class ResumableSampler(Sampler):
    """Batches of indices, in an order that depends on the seed alone.

    The dataset is traversed in one permutation after another. Batch `b` is the same whether
    training ran without interruption or was resumed at `b`, and for any number of processes (each
    takes its share of every global batch).

    Args:
        num_samples: images in the dataset.
        batch_size: indices per batch and process.
        batches_per_epoch: batches until the loader ends an epoch.
        seed: of the permutations.
        batches_done: returns the number of batches before this epoch, or before resuming.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        batches_per_epoch: int,
        seed: int = 0,
        batches_done: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples, self.seed = num_samples, seed
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.batches_done, self.rank, self.world_size = batches_done, rank, world_size

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Int[Tensor, " B"]]:
        for batch in _rest_of_epoch(self.batches_done(), self.batches_per_epoch):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield self._indices(torch.arange(start, start + self.batch_size))

    def _indices(self, position: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The indices at positions of the endless sequence of permutations."""
        epoch, offset = position // self.num_samples, position % self.num_samples
        index = torch.empty_like(position)
        for number in epoch.unique().tolist():
            order = _permutation(self.num_samples, self.seed, number)
            index[epoch == number] = order[offset[epoch == number]]
        return index


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    # A plain sum would give seed 0, epoch 1 and seed 1, epoch 0 the same order.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)


def _rest_of_epoch(done: int, batches_per_epoch: int) -> range:
    # An epoch that was interrupted is continued, not started again.
    return range(done, (done // batches_per_epoch + 1) * batches_per_epoch)


def _scale(image: Tensor) -> Tensor:
    """Bytes to [-1, 1]; floats are in that range already."""
    return image if image.is_floating_point() else image.float() / 127.5 - 1
