"""Image sources: scikit-learn's digits, a folder of image files, a Hugging Face dataset."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader, Dataset

from rolldiff.data.datasets import InMemoryImages, Record, StreamingImages, readable, stacked
from rolldiff.data.folders import FileKind, existing_folder, labelled_files, named_folder
from rolldiff.data.module import Images
from rolldiff.errors import UsageError, reason

__all__ = ["Digits", "Folder", "Hub"]

# Types of columns in `datasets`.
TEXT = ("string", "large_string", "string_view")
ENCODED = ("binary", "large_binary", *TEXT)  # the bytes of a picture, or its path


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

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def build_dataset(self) -> Dataset:
        # Imported here: other sources do not need scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        return InMemoryImages(image, torch.tensor(digits.target, dtype=torch.long))


@dataclass(kw_only=True, eq=False)
class Folder(Images):
    """All pictures in a folder and its subfolders, except hidden ones.

    Files count as pictures by their extension. Links to folders are followed; a folder that is
    reached twice within one class is read once, so that loops end.

    Args:
        path: the folder; `~` is the home folder. Its immediate subfolders with a picture somewhere
            below are the classes, numbered in the order of their names. Pictures beside them and
            unreadable folders are left out with a warning, or refused with `on_error="raise"`.
            Without such subfolders there are no classes, and every label is 0.
    """

    path: str | Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self._root = named_folder(self.path, PICTURES.name)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._found[1] or None

    def records(self) -> list[Record]:
        """The pictures and their labels, in the order of their paths.

        Raises:
            UsageError: if `path` is not a folder, or with `on_error="raise"` if something is left
                out.
        """
        return list(self._found[0])

    def build_dataset(self) -> Dataset:
        return self.from_records(self._found[0])

    @cached_property
    def _found(self) -> tuple[list[Record], tuple[str, ...]]:
        """All records, and the names of the classes."""
        files, names = labelled_files(
            existing_folder(self._root, PICTURES.name), PICTURES, self.left_out
        )
        return [Record(file, file, label) for file, label in files], names


def _may_be_picture(entry: os.DirEntry[str]) -> bool:
    """Whether Pillow knows the extension; broken links too, so that they are told."""
    known = os.path.splitext(entry.name)[1].lower() in Pillow.registered_extensions()
    return known and (os.path.isfile(entry.path) or not os.path.exists(entry.path))


def _is_picture(file: str) -> bool:
    """Whether Pillow can read files of this extension, and not just write them."""
    kind = Pillow.registered_extensions()[os.path.splitext(file)[1].lower()]
    return kind in Pillow.OPEN or kind == "MPO"  # which is read as a JPEG


PICTURES = FileKind(name="pictures", may_be=_may_be_picture, is_one=_is_picture)


@dataclass(kw_only=True, eq=False)
class Hub(Images):
    """A Hugging Face dataset with a column of images and one of labels, read through `datasets`.

    Labels are whole numbers, classes, or texts, whose sorted values are then the classes.

    Args:
        name: the dataset's name on the hub.
        path: a local folder with the same schema (parquet shards, or files in folders), used
            instead of `name`; `~` is the home folder.
        split: the split to read, also a part of one as in `train[:10%]`.
        image_column: the column of images.
        label_column: the column of labels; None for no labels.
        streaming: read the dataset while training instead of downloading it first. Images then come
            in the order of the shards, which is shuffled, and shuffled within a buffer; no image
            can be held out or flipped, and `reference_images` is required. The classes must be
            known from the dataset's features.
    """

    name: str | None = None
    path: str | Path | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name and self.path is None:
            raise UsageError("data.name or data.path must say which image set, got neither")
        self._root = None if self.path is None else named_folder(self.path, PICTURES.name)
        if set("*?[]") & set(str(self._root or "")):  # `datasets` would expand them
            raise UsageError(f"data.path must be free of * ? [ ] for a hub set, got {self.path}")
        if not isinstance(self.split, str) or not self.split:
            raise UsageError(f"split must be the name of a split, got {self.split!r}")
        for start, stop in re.findall(r"\[(-?\d+)%?:(-?\d+)%?\]", self.split):
            # datasets reads other rows instead.
            if start.startswith("-") == stop.startswith("-") and int(start) >= int(stop):
                raise UsageError(f"split must be a part that is not empty, got {self.split}")
        if not isinstance(self.image_column, str):
            raise UsageError(f"image_column must name a column, got {self.image_column!r}")
        if not isinstance(self.label_column, str | None):
            raise UsageError(
                f"label_column must name a column, or be null for none, got {self.label_column!r}"
            )
        if not isinstance(self.streaming, bool):
            raise UsageError(f"streaming must be true or false, got {self.streaming!r}")
        if self.streaming and self.autoencoder is not None:
            raise UsageError(
                "streaming must be false with an autoencoder, which encodes all images first, got "
                "true"
            )
        if self.streaming and (self.held_out or self.flip or self.reference_images is None):
            raise UsageError(
                "streaming must come with reference_images, held_out 0 and flip false, got "
                f"{self.reference_images}, {self.held_out} and {self.flip}"
            )

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._names

    @property
    def num_classes(self) -> int:
        if self.label_column is None:
            return 0
        if self._names is not None:
            return len(self._names)
        if self.streaming:
            raise UsageError(
                "label_column must be of class labels, or num_classes given, for a stream of "
                f"{self._table.features[self.label_column]}"
            )
        return max((label + 1 for label in self._labels if label is not None), default=0)

    def build_dataset(self) -> Dataset:
        """The dataset; only the reference images when streaming."""
        if not self.streaming:
            return self.from_records(_TableRecords(self))
        pairs = readable(self._shuffled(0, seed=0), self.load, on_error=self.on_error)
        return InMemoryImages(*stacked(islice(pairs, self.reference_images)))

    def train_dataloader(self) -> Any:
        if not self.streaming:
            return super().train_dataloader()
        batches = self._batches_used
        stream = StreamingImages(
            self._shuffled,
            self.load,
            on_error=self.on_error,
            batch_size=self.batch_per_process,
            batches_per_epoch=batches,
            batches_done=lambda: self.batches_seen() % (batches if self._overfit else 2**63),
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(stream, batch_size=None)

    def _shuffled(self, epoch: int, *, seed: int | None = None) -> Iterator[Record]:
        """The records of an epoch of a stream; without a seed, in the order of the training."""
        seed = self.seed if seed is None else seed
        # A sum would give seed 0, epoch 1 and seed 1, epoch 0 the same order.
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,) if epoch else ())
        generator = np.random.default_rng(sequence)
        rows = self._read(self._table.shuffle(generator=generator, buffer_size=10_000))
        for i, row in enumerate(rows):
            name = f"{self._source}, row {i} of the shuffled {self.split}, epoch {epoch}"
            label = self._label(row[self.label_column] if self.label_column else None, name)
            yield Record(name, _encoded(row[self.image_column]), label)

    def _label(self, value: Any, name: str) -> int | None:
        """The label of a row; None if it is missing."""
        if self.label_column is None:
            return 0
        if value is None:
            return None
        if isinstance(value, str):
            return self._index[value]
        label = int(value) if float(value).is_integer() else -1
        classes = sys.maxsize if self._names is None else len(self._names)
        if not 0 <= label < classes:
            allowed = "of 0 or more" if self._names is None else f"in 0 … {classes - 1}"
            raise UsageError(
                f"label_column must hold whole numbers {allowed}, got {value} in {name}; "
                "say label_column=null for none"
            )
        return label

    @cached_property
    def _labels(self) -> list[int | None]:
        """The labels of all rows, unless streaming."""
        return [self._label(value, self._row(i)) for i, value in enumerate(self._label_values)]

    @property
    def _label_values(self) -> list[Any]:
        if self.label_column is None:
            return [None] * len(self._table)
        return self._table.select_columns([self.label_column])[:][self.label_column]

    @cached_property
    def _names(self) -> tuple[str, ...] | None:
        """The names of the classes, if they have any."""
        from datasets import ClassLabel

        feature = None if self.label_column is None else self._table.features[self.label_column]
        if isinstance(feature, ClassLabel):
            return tuple(feature.names)
        if getattr(feature, "dtype", None) not in TEXT:
            return None
        return tuple(sorted({text for text in self._label_values if text is not None}))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._names or ())}

    @property
    def _source(self) -> str:
        return str(self.path or self.name)

    def _row(self, index: int) -> str:
        return f"{self._source}, row {index} of {self.split}"

    @cached_property
    def _table(self) -> Any:
        """The two columns, with pictures as they are stored."""
        # Imported here: other sources do not need `datasets`.
        from datasets import ClassLabel, Image, Value

        table = self._loaded()
        columns = [c for c in (self.image_column, self.label_column) if c is not None]
        if not set(columns) <= set(table.column_names or ()):
            raise UsageError(
                f"image_column and label_column must be among {table.column_names}, got {columns}"
            )
        picture = table.features[self.image_column]
        stored = (
            isinstance(picture, dict)
            and picture.keys() <= {"bytes", "path"}
            and all(getattr(part, "dtype", "") in ENCODED for part in picture.values())
        )
        if not (stored or isinstance(picture, Image) or getattr(picture, "dtype", "") in ENCODED):
            raise UsageError(
                f"image_column must be a column of pictures, got {self.image_column} of {picture}"
            )
        label = table.features.get(self.label_column)
        plain = isinstance(label, Value) and label.dtype.startswith(
            ("int", "uint", "float", "bool")
        )
        text = isinstance(label, Value) and label.dtype in TEXT
        if label is not None and not (plain or text or isinstance(label, ClassLabel)):
            raise UsageError(
                "label_column must be a column of whole numbers, class labels or texts, got "
                f"{self.label_column} of {label}"
            )
        if text and self.streaming:
            raise UsageError(
                "label_column must be a column of class labels or whole numbers for a stream, got "
                f"{self.label_column} of texts; say streaming=false or label_column=null"
            )
        # Undecoded, so that a damaged image is reported by its row and does not stop the others.
        return table.select_columns(columns).cast_column(self.image_column, Image(decode=False))

    def _loaded(self) -> Any:
        from datasets import load_dataset

        path = self.name if self._root is None else existing_folder(self._root, PICTURES.name)
        try:
            return load_dataset(path, split=self.split, streaming=self.streaming)
        # It raises errors of many libraries.
        except Exception as error:
            if any(word in str(error) for word in ("split", "nstruction", "ercent")):
                raise UsageError(
                    f"split must be one of {path}, got {self.split}: {reason(error)}"
                ) from error
            self._refuse_damaged(error)
            raise UsageError(
                "data must be a folder in the hub's schema (data.path=FOLDER) or a name that can "
                f"be fetched from the hub, got {path}: {reason(error.__cause__ or error)}"
            ) from error

    def _read(self, table: Any) -> Iterator[dict[str, Any]]:
        """The rows of a table, whose files are read only now if it is a stream."""
        rows = iter(table)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                self._refuse_damaged(error)
                raise UsageError(
                    f"data must be sound files, got {self._source}: {reason(error)}"
                ) from error
            yield row

    def _refuse_damaged(self, error: Exception) -> None:
        """Name the local file that an error of `datasets` is about, which it does not."""
        import pyarrow.parquet  # type: ignore[import-untyped]

        for file in sorted(self._root.rglob("*.parquet")) if self._root else ():
            try:
                for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
                    pass
            except Exception as cause:
                raise UsageError(
                    f"data must be sound parquet files, got {file}: {reason(cause)}"
                ) from error


def _encoded(picture: dict[str, Any] | None) -> bytes | str | None:
    """The bytes of a stored picture, else the path of its file."""
    if picture is None:
        return None
    stored = picture.get("bytes")
    return picture.get("path") if stored is None else stored


class _TableRecords(Sequence[Record]):
    """The rows of a `datasets.Dataset` as records."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.table, self.labels = hub, hub._table, hub._labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self._record(int(index), self.table[int(index)])

    def __iter__(self) -> Iterator[Record]:  # much faster than indexing row by row
        return (self._record(i, row) for i, row in enumerate(self.hub._read(self.table)))

    def _record(self, index: int, row: dict[str, Any]) -> Record:
        return Record(
            self.hub._row(index), _encoded(row[self.hub.image_column]), self.labels[index]
        )
