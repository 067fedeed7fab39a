"""Sets of images, indexed by whole batches."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from rolldiff.data.records import Record, pixels

__all__ = ["Drawn", "Kept", "Mirrored"]

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]


class Kept(Dataset):
    """Images in memory, as bytes or in [-1, 1] already."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        return _scaled(self.image[index]), self.label[index]


class Drawn(Dataset):
    """Pictures decoded when they are asked for."""

    def __init__(self, records: Sequence[Record], *, image_size: int, channels: int) -> None:
        self.records, self.image_size, self.channels = records, image_size, channels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        kept = {"image_size": self.image_size, "channels": self.channels}
        image, label = zip(*(self._readable(i, kept) for i in index.tolist()), strict=True)
        return _scaled(torch.stack(image)), torch.tensor(label)

    def _readable(self, index: int, kept: dict[str, int]) -> tuple[Tensor, int]:
        """The picture, or the next one that can be read: a batch keeps its size."""
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:
                return pixels(record, **kept), record.label
            except ValueError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
        raise ValueError("data must hold a picture at least, got none")


class Mirrored(Dataset):
    """Some images of a set; behind them, the same ones mirrored."""

    def __init__(self, data: Dataset, train: Tensor) -> None:
        self.data, self.train = data, train

    def __getitem__(self, index: Int[Tensor, " B"]) -> Batch:
        image, label = self.data[self.train[index % len(self.train)]]
        mirrored = (index >= len(self.train))[:, None, None, None]
        return torch.where(mirrored, image.flip(-1), image), label


def _scaled(image: Tensor) -> Tensor:
    """Bytes to [-1, 1]; what is in it already stays."""
    return image if image.is_floating_point() else image.float() / 127.5 - 1
