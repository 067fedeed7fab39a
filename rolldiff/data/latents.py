"""`Latents`: images that an autoencoder has encoded before, in files of arrays."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from rolldiff.data.folders import FileKind, existing_folder, labelled_files, named_folder
from rolldiff.data.module import Source
from rolldiff.errors import FLOATS, WHOLE, UsageError, finite_number, reason
from rolldiff.pixels import Load, Record

__all__ = ["Latents"]

ARRAY, TENSORS = ".npy", ".safetensors"
LATENTS, LABELS = "latents", "labels"  # the tensors of a file
MAX_CLASSES = 2**24


def _may_hold_latents(entry: os.DirEntry[str]) -> bool:
    """Whether the extension is known; broken links too, so that they are told."""
    known = _holds_latents(entry.name)
    return known and (os.path.isfile(entry.path) or not os.path.exists(entry.path))


def _holds_latents(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in (ARRAY, TENSORS)


FILES = FileKind(name="latents", may_be=_may_hold_latents, is_one=_holds_latents)


@dataclass(frozen=True, slots=True)
class StoredLatents(Record):
    """The latents of an image, in a file.

    Attributes:
        row: which of the file's; None if the file holds those of one image.
    """

    row: int | None = None


class _Found(NamedTuple):
    """What a folder holds: records, the names of classes, and whether files name the labels."""

    records: list[StoredLatents]
    names: tuple[str, ...]
    labelled: bool


@dataclass(kw_only=True, eq=False)
class Latents(Source):
    """Latents in the files of a folder and its subfolders.

    A `.npy` file holds the latents of one image, `[C, h, w]` or `[1, C, h, w]`. A `.safetensors`
    file holds those of many, `latents` `[n, C, h, w]`, and may hold their `labels` `[n]`. Numbers
    are floating point and finite, and all latents have one shape, that of the first file that can
    be read. Latents of a mirror image are not mirrored latents, so training flips none: store both.

    Args:
        path: the folder; `~` is the home folder. Its subfolders are classes as in `Folder`.
        labels: a folder with the label of each `.npy` file, one whole number in a file of the same
            name; None for none.
        scaling_factor: what the stored numbers are multiplied by: 1 if that was done before they
            were stored, else that of the autoencoder.
    """

    path: str | Path
    labels: str | Path | None = None
    scaling_factor: float = 1.0

    stores_latents = True
    bytes_per_value = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._root = named_folder(self.path, FILES.name)
        self._labels = None
        if self.labels is not None:
            self._labels = named_folder(self.labels, LABELS, name="data.labels")
        self.scaling_factor = finite_number(self.scaling_factor, "scaling_factor")
        if self.scaling_factor == 0:
            raise UsageError("scaling_factor must be another number than 0, got 0")

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._found.names or None

    @property
    def num_classes(self) -> int:
        records, names, labelled = self._found
        if not labelled:
            return len(names)
        return max((r.label for r in records if r.label is not None), default=-1) + 1

    @cached_property
    def stored_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first latents that can be read.

        Raises:
            UsageError: if there are none.
        """
        why = ""
        for record in self._found.records:
            try:
                channels, height, width = _read(record).shape
            except UsageError as error:
                why = why or f"; {error}"
                continue
            return channels, height, width
        raise UsageError(f"data must hold latents, got none in {self._root}{why}")

    @property
    def load(self) -> Load:
        """Reads the latents of one image and scales them."""
        return partial(load_latents, shape=self.stored_shape, scaling_factor=self.scaling_factor)

    def build_dataset(self) -> Dataset:
        return self.from_records(self._found.records)

    @cached_property
    def _found(self) -> _Found:
        root = existing_folder(self._root, FILES.name)
        if self._labels is not None:
            existing_folder(self._labels, LABELS, name="data.labels")
        files, names = labelled_files(root, FILES, self.left_out)
        pairs = [(record, label) for file, label in files for record in self._records(file)]
        if self._labels is None and all(record.label is None for record, _ in pairs):
            records = [replace(record, label=label) for record, label in pairs]
            return _Found(records, names, labelled=False)
        if names:
            raise UsageError(
                "labels must be given by folders of classes, by the files or by data.labels, got "
                f"two of them in {root}"
            )
        return _Found([record for record, _ in pairs], (), labelled=True)

    def _records(self, file: str) -> Iterator[StoredLatents]:
        """What a file holds, with the labels that are given with it."""
        if _is_array(file):
            label = None if self._labels is None else self._label(file, self._labels)
            yield StoredLatents(file, file, label)
            return
        try:
            shape, labels = _table(file)
        except UsageError as error:
            self.left_out(str(error))
            return
        for row, label in enumerate([None] * shape[0] if labels is None else labels):
            yield StoredLatents(f"{file}, row {row}", file, label, row)

    def _label(self, file: str, folder: Path) -> int | None:
        """The label of an array; None if it is missing or cannot be read."""
        found = folder / Path(file).relative_to(self._root)
        if not found.is_file():
            return None
        label = _array(str(found), LABELS).reshape(-1)
        if label.dtype.kind not in "iu" or len(label) != 1 or not 0 <= label[0] < MAX_CLASSES:
            raise UsageError(
                f"data.labels must hold one whole number of 0 or more per file, got {found}: "
                f"{label.dtype} {label[:3].tolist()}"
            )
        return int(label[0])


def load_latents(
    record: Record, *, shape: tuple[int, int, int], scaling_factor: float
) -> Float[Tensor, "C H W"]:
    """The latents of one image.

    Args:
        record: a `StoredLatents`.
        shape: that they must have.
        scaling_factor: what they are multiplied by.

    Raises:
        UsageError: if they cannot be read, have no label or another shape, or are not finite.
    """
    assert isinstance(record, StoredLatents)
    if record.label is None:
        raise UsageError(f"data must be latents with labels, got {record.name}: no label")
    latents = _read(record)
    if latents.shape != shape:
        raise UsageError(
            f"data must be latents of one shape, {shape} as the first, got {record.name}: "
            f"{tuple(latents.shape)}"
        )
    latents = latents * scaling_factor
    if not latents.isfinite().all():
        raise UsageError(f"data must be finite latents, got {record.name}: NaN or infinity")
    return latents


def _is_array(file: str) -> bool:
    return os.path.splitext(file)[1].lower() == ARRAY


def _array(file: str, kind: str) -> np.ndarray:
    """The array in a file, mapped: nothing is unpickled, and only what is used is read.

    A file that announces more numbers than it holds is refused before there is memory for them.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # whatever the damage provokes
        raise UsageError(f"data must be arrays of {kind}, got {file}: {reason(error)}") from error


def _table(file: str) -> tuple[list[int], list[int] | None]:
    """The shape of the latents in a file of tensors, and their labels if there are any."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shape = list(tensors.get_slice(LATENTS).get_shape())
            labels = tensors.get_tensor(LABELS) if LABELS in tensors.keys() else None  # noqa: SIM118
    except Exception as error:
        raise UsageError(f"data must be latents, got {file}: {reason(error)}") from error
    if len(shape) != 4:
        raise UsageError(f"data must be latents [n, C, h, w], got {file}: {shape}")
    if labels is None:
        return shape, None
    whole = labels.dtype in WHOLE and labels.shape == (shape[0],)
    if not whole or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < MAX_CLASSES):
        raise UsageError(
            f"labels must be whole numbers of 0 or more for {shape[0]} latents, got {file}: "
            f"{labels.dtype} {list(labels.shape)}"
        )
    return shape, labels.tolist()


def _read(record: StoredLatents) -> Float[Tensor, "C H W"]:
    """The numbers of a record, as they are stored, in float32."""
    file, name = str(record.data), record.name
    if record.row is None:
        found = _array(file, LATENTS)
        if found.dtype.kind != "f":
            raise UsageError(f"data must be latents in floating point, got {name}: {found.dtype}")
        if found.ndim == 4 and len(found) == 1:
            found = found[0]
        if found.ndim != 3 or not found.size:
            raise UsageError(f"data must be latents [C, h, w], got {name}: {found.shape}")
        with np.errstate(over="ignore"):  # infinity is refused with a better message
            return torch.from_numpy(found.astype(np.float32))
    try:
        with safe_open(file, framework="pt") as tensors:
            latents = tensors.get_slice(LATENTS)[record.row]
    except Exception as error:
        raise UsageError(f"data must be latents, got {name}: {reason(error)}") from error
    if latents.dtype not in FLOATS or not latents.numel():
        raise UsageError(
            "data must be latents in floating point, got "
            f"{name}: {latents.dtype} {tuple(latents.shape)}"
        )
    return latents.float()
