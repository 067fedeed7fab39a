"""Torch datasets of images, and the order in which training goes through them.

A dataset is indexed with a whole batch of indices `[B]` and returns images `[B, C, H, W]`, pictures
in [-1, 1] or latents, with integer labels `[B]`. What is stored is passed in as *records* and
decoded by a function `load` from a record to bytes or floats `[C, H, W]`, usually `load_image` with
its settings bound.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, count, islice, tee
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, SequentialSampler

from rolldiff.errors import UsageError, warn_user
from rolldiff.pixels import Load, Record, load_image

__all__ = [
    "Crops",
    "HFlip",
    "InMemoryImages",
    "LazyImages",
    "Load",
    "OnError",
    "Record",
    "ResumableSampler",
    "StreamingImages",
    "encoded",
    "load_image",
    "load_images",
    "permutation",
    "readable",
    "stacked",
]

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]
OnError = Literal["skip", "raise"]

NO_PICTURE = "data must hold a picture at least, got none"
LOOKAHEAD = 1000  # records after a batch without a readable image that are tried
EPOCHS = 1_000_003  # per seed, in the keys of torch's generator


def readable(
    records: Iterable[Record], load: Load, *, on_error: OnError
) -> Iterator[tuple[Num[Tensor, "C H W"], int]]:
    """The decoded images of the records and their labels, without those that cannot be read.

    Args:
        records: the encoded images.
        load: decodes one of them.
        on_error: whether an unreadable image is skipped with a warning or raises.

    Raises:
        UsageError: if an image is unreadable and `on_error` is `raise`.
    """
    for record in records:
        try:
            image = load(record)
        except UsageError as error:
            if on_error == "raise":
                raise
            warn_user(f"skipped: {error}")
            continue
        assert record.label is not None  # `load` has refused it
        yield image, record.label


def load_images(
    records: Iterable[Record], load: Load, *, on_error: OnError
) -> tuple[Num[Tensor, "N C H W"], Int[Tensor, " N"]]:
    """Decode all records, in order; see `readable`.

    Raises:
        UsageError: if an image is unreadable and `on_error` is `raise`, or if none is left.
    """
    return stacked(readable(records, load, on_error=on_error))


def stacked(
    pairs: Iterable[tuple[Tensor, int]],
) -> tuple[Num[Tensor, "N C H W"], Int[Tensor, " N"]]:
    """Images and their labels as two tensors.

    Raises:
        UsageError: if there is none.
    """
    pairs = list(pairs)
    if not pairs:
        raise UsageError(NO_PICTURE)
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels)


def encoded(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    *,
    parts: Iterable[Int[Tensor, " B"]],
    flip: bool,
) -> "InMemoryImages":
    """The latents of a dataset of images, computed once and held in memory.

    Args:
        dataset: the images.
        encode: images to latents.
        parts: the indices of all images, a part at a time.
        flip: also encode the mirror images, whose latents are not mirrored latents.
    """
    latents, labels, mirrored = [], [], []
    for part in parts:
        image, label = dataset[part]
        latents.append(encode(image))
        labels.append(label)
        if flip:
            mirrored.append(encode(image.flip(-1)))
    return InMemoryImages(
        torch.cat(latents), torch.cat(labels), mirrored=torch.cat(mirrored) if flip else None
    )


class InMemoryImages(Dataset):
    """Decoded images, held as bytes or as floats.

    Args:
        image: the images.
        label: their labels.
        mirrored: their mirror images, of latents; None takes the images from right to left.
    """

    def __init__(self, image: Tensor, label: Tensor, *, mirrored: Tensor | None = None) -> None:
        self.image, self.label, self.mirrored = image, label, mirrored

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
        image, label = stacked([self._first_readable(start) for start in index.tolist()])
        return _scale(image), label

    def _first_readable(self, start: int) -> tuple[Tensor, int]:
        records = (self.records[i % len(self)] for i in range(start, start + len(self)))
        for pair in readable(records, self.load, on_error="skip"):
            return pair
        raise UsageError(NO_PICTURE)


class Crops(Dataset):
    """Squares at random places of photographs, the same ones for the same `seed`.

    Args:
        photos: the photographs, `[C, H, W]` bytes each.
        size: side of the squares in pixels.
        photo: of each square, which photograph it is cut from.
        seed: of the places.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        size: int,
        *,
        photo: Int[Tensor, " N"],
        seed: int = 0,
    ) -> None:
        self.photos, self.size, self.photo = photos, size, photo
        generator = torch.Generator().manual_seed(seed)
        room = torch.tensor([[side - size + 1 for side in p.shape[1:]] for p in photos])
        self.corner = (torch.rand(len(photo), 2, generator=generator) * room[photo]).long()

    def __len__(self) -> int:
        return len(self.photo)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        places = zip(self.photo[index].tolist(), self.corner[index].tolist(), strict=True)
        cut = [self.photos[p][:, y : y + self.size, x : x + self.size] for p, (y, x) in places]
        return _scale(torch.stack(cut)), torch.zeros(len(cut), dtype=torch.long)


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
        chosen = self.subset[index % size]
        image, label = self.dataset[chosen]
        stored = getattr(self.dataset, "mirrored", None)
        mirrored = image.flip(-1) if stored is None else stored[chosen]
        return torch.where((index >= size)[:, None, None, None], mirrored, image), label

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch, for a `DataLoader` whose batches are lists of indices."""
        return self[torch.tensor(indices)]


class StreamingImages(IterableDataset):
    """Batches decoded from a stream of records, for sources too large to be fetched first.

    Global batch `b` always holds the records from `b * batch_size * world_size` on. An unreadable
    image is replaced by another one of its batch, or by the next readable one if there is none.
    Resuming skips the records of earlier batches without decoding them.

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
        records: Iterator[Record] = chain.from_iterable(map(self._epoch, count()))
        for _ in islice(records, done * global_batch):
            pass
        for _ in _rest_of_epoch(done, self.batches_per_epoch):
            start = self.rank * self.batch_size
            share = list(islice(records, global_batch))[start : start + self.batch_size]
            pairs = list(readable(share, self.load, on_error=self.on_error))
            if not pairs:
                records, copy = tee(records)
                ahead = readable(islice(copy, LOOKAHEAD), self.load, on_error=self.on_error)
                pairs = list(islice(ahead, 1))
            # Images that were skipped are made up for by repeating the first ones.
            yield InMemoryImages(*stacked(pairs))[torch.arange(self.batch_size) % len(pairs)]

    def _epoch(self, number: int) -> Iterator[Record]:
        found = False
        for record in self.records(number):
            found = True
            yield record
        if not found:  # otherwise the search for a record would never end
            raise UsageError(NO_PICTURE)


# Lightning's `overfit_batches` replaces any sampler that is not of this class.
class ResumableSampler(SequentialSampler):
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
        limit: how many batches of an epoch are used; None for all.
        overfit: use the same batches in every epoch.
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
        limit: int | None = None,
        overfit: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(range(num_samples))
        self.num_samples, self.seed = num_samples, seed
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.batches_done, self.rank, self.world_size = batches_done, rank, world_size
        self.limit, self.overfit = limit, overfit

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Int[Tensor, " B"]]:  # type: ignore[override]
        epoch = min(self.batches_per_epoch, self.limit or self.batches_per_epoch)
        for number in _rest_of_epoch(self.batches_done(), epoch):
            batch = number % epoch if self.overfit else number
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield self._indices(torch.arange(start, start + self.batch_size))

    def _indices(self, position: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The indices at positions of the endless sequence of permutations."""
        epoch, offset = position // self.num_samples, position % self.num_samples
        index = torch.empty_like(position)
        for number in epoch.unique().tolist():
            order = permutation(self.num_samples, self.seed, epoch=number)
            index[epoch == number] = order[offset[epoch == number]]
        return index


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, *, epoch: int | None = None) -> Int[Tensor, " N"]:
    """A random order of `size` indices, which differs between any two pairs of seed and epoch.

    Args:
        size: number of indices.
        seed: any whole number of 0 or more.
        epoch: number of the epoch; None outside of a training.
    """
    # A plain sum would give seed 0, epoch 1 and seed 1, epoch 0 the same order.
    key = seed if epoch is None else seed * EPOCHS + epoch
    if key < 2**32 and (epoch is None or epoch < EPOCHS):
        return torch.randperm(size, generator=torch.Generator().manual_seed(key))
    # Torch's generator takes keys modulo 2**32, so that larger ones would collide.
    sequence = np.random.SeedSequence(seed, spawn_key=() if epoch is None else (epoch,))
    return torch.from_numpy(np.random.default_rng(sequence).permutation(size))


def _rest_of_epoch(done: int, batches_per_epoch: int) -> range:
    # An epoch that was interrupted is continued, not started again.
    return range(done, (done // batches_per_epoch + 1) * batches_per_epoch)


def _scale(image: Tensor) -> Tensor:
    """Bytes to [-1, 1]; floats are images already."""
    return image if image.is_floating_point() else image.float() / 127.5 - 1
