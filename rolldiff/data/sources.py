"""Image sources: scikit-learn's digits, a folder of image files, a Hugging Face dataset."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from rolldiff.data.datasets import InMemoryImages, Record, StreamingImages, load_images
from rolldiff.data.module import Images
from rolldiff.errors import UsageError, reason

__all__ = ["Digits", "Folder", "Hub"]


@dataclass(kw_only=True, eq=False)
class Digits(Images):
    """The handwritten digits of scikit-learn: 1,797 scans of 8 x 8 pixels in 17 greys.

    No scan is held out by default, because there are so few: distances are then to scans that were
    trained on.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository (1998), the test set.
    """

    image_size: int = 8
    channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.image_size, self.channels) != (8, 1):
            raise UsageError(
                "digits must be 8 x 8 pixels of 1 channel, got image_size "
                f"{self.image_size} and channels {self.channels}"
            )

    def build_dataset(self) -> Dataset:
        # Imported here: other sources do not need scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        return InMemoryImages(image, torch.tensor(digits.target, dtype=torch.long))


@dataclass(kw_only=True, eq=False)
class Folder(Images):
    """All files in a folder and its subfolders, except hidden ones.

    Args:
        path: the folder. Its immediate subfolders are the classes, numbered in the order of their
            names; without subfolders, every label is 0.
    """

    path: str

    def build_dataset(self) -> Dataset:
        root = Path(self.path)
        if not root.is_dir():
            raise UsageError(f"data.path must be a folder of pictures, got {self.path}")
        found = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
        files = sorted(file for file in found if not any(p.startswith(".") for p in file.parts))
        classes = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        labels = (classes.index(f.parts[0]) if len(f.parts) > 1 else 0 for f in files)
        return self.from_records(
            [Record(str(root / f), root / f, label) for f, label in zip(files, labels, strict=True)]
        )


@dataclass(kw_only=True, eq=False)
class Hub(Images):
    """A Hugging Face dataset with a column of images and one of labels, read through `datasets`.

    Args:
        name: the dataset's name on the hub.
        path: a local folder with the same schema (parquet shards), used instead of `name`.
        split: the split to read.
        image_column: the column of images.
        label_column: the column of labels; None for no labels.
        streaming: read the dataset while training instead of downloading it first. Images then come
            in the order of the shards, shuffled within a buffer; no image can be held out or
            flipped, and `reference_images` is required.
    """

    name: str | None = None
    path: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None and self.path is None:
            raise UsageError("data.name or data.path must say which image set, got neither")
        if self.streaming and (self.held_out or self.flip or self.reference_images is None):
            raise UsageError(
                "streaming must come with reference_images, held_out 0 and flip false, got "
                f"{self.reference_images}, {self.held_out} and {self.flip}"
            )

    def build_dataset(self) -> Dataset:
        """The dataset; only the reference images when streaming."""
        table = self._table()
        if not self.streaming:
            return self.from_records(_TableRecords(table, self))
        rows = enumerate(table.take(self.reference_images))
        records = (self.record(row, i) for i, row in rows)
        return InMemoryImages(*load_images(records, self.load, on_error=self.on_error))

    def train_dataloader(self) -> Any:
        if not self.streaming:
            return super().train_dataloader()
        stream = StreamingImages(
            self._shuffled,
            self.load,
            on_error=self.on_error,
            batch_size=self.batch_size,
            batches_per_epoch=self.max_steps,
            batches_done=self.batches_seen,
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(stream, batch_size=None)

    def record(self, row: dict[str, Any], index: int) -> Record:
        """The record of a row of the dataset."""
        name = f"{self.path or self.name}, row {index} of {self.split}"
        label = 0 if self.label_column is None else int(row[self.label_column])
        return Record(name, row[self.image_column]["bytes"] or b"", label)

    def _shuffled(self, epoch: int) -> Iterator[Record]:
        table = self._table().shuffle(seed=self.seed + epoch, buffer_size=10_000)
        return (self.record(row, i) for i, row in enumerate(table))

    def _table(self) -> Any:
        # Imported here: other sources do not need `datasets`.
        from datasets import Image, load_dataset

        path = self.path or self.name
        try:
            table = load_dataset(path, split=self.split, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise UsageError(
                "data must be a folder in the hub's schema (data.path=FOLDER) or a name that can "
                f"be fetched from the hub, got {path}: {reason(error)}"
            ) from error
        columns = [c for c in (self.image_column, self.label_column) if c is not None]
        if not set(columns) <= set(table.column_names or ()):
            raise UsageError(
                f"image_column and label_column must be among {table.column_names}, got {columns}"
            )
        # Undecoded, so that a damaged image is reported by its row and does not stop the others.
        return table.select_columns(columns).cast_column(self.image_column, Image(decode=False))


class _TableRecords(Sequence[Record]):
    """The rows of a `datasets.Dataset` as records."""

    def __init__(self, table: Any, hub: Hub) -> None:
        self.table, self.hub = table, hub

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.hub.record(self.table[int(index)], int(index))

    def __iter__(self) -> Iterator[Record]:  # much faster than indexing row by row
        return (self.hub.record(row, i) for i, row in enumerate(self.table))
