"""Image sets in the Hugging Face hub's schema, by name or from a local copy, through `datasets`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from rolldiff.data.images import Images
from rolldiff.data.records import Record, decoded
from rolldiff.data.sets import Kept
from rolldiff.data.streamed import Streamed
from rolldiff.errors import reason

__all__ = ["Hub"]


@dataclass(kw_only=True, eq=False)
class Hub(Images):
    """An image set with a column of pictures and one of labels.

    Args:
        name: its name on the hub.
        path: a local folder in the same schema (parquet shards), read instead.
        split: which part of it.
        image_column: the column of pictures.
        label_column: the column of labels; None for none.
        streaming: reads the set as it trains instead of fetching it first. Then images come in the
            order of the shards, mixed in a window; none can be held out, `flip` is refused, and
            `reference` must say how many are kept to compare with.
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
            raise ValueError("data.name or data.path must say which image set, got neither")
        if self.streaming and (self.held_out or self.flip or self.reference is None):
            raise ValueError(
                "streaming must come with a number for reference, held_out 0 and flip false, got "
                f"{self.reference}, {self.held_out} and {self.flip}"
            )

    def records(self) -> Sequence[Record]:
        return _Rows(self._rows(), self)

    def decoded(self) -> Any:
        if not self.streaming:
            return super().decoded()
        assert self.reference is not None
        first = (self.record(row, i) for i, row in enumerate(self._rows().take(self.reference)))
        return Kept(*decoded(first, corrupt=self.corrupt, **self.treatment))

    def train_dataloader(self) -> Any:
        if not self.streaming:
            return super().train_dataloader()
        stream = Streamed(
            self.shuffled,
            **self.treatment,
            corrupt=self.corrupt,
            batch_size=self.batch_size,
            batches=self.max_steps,
            done=self.batches_seen,
            rank=self.rank,
            world=self.world,
        )
        return DataLoader(stream, batch_size=None)

    def shuffled(self, epoch: int) -> Iterator[Record]:
        """All records in the order of one epoch, for streaming."""
        rows = self._rows().shuffle(seed=self.seed + epoch, buffer_size=10_000)
        return (self.record(row, i) for i, row in enumerate(rows))

    def record(self, row: dict[str, Any], index: int) -> Record:
        """A row of the set."""
        picture = row[self.image_column]
        name = f"{self.path or self.name}, row {index} of {self.split}"
        label = 0 if self.label_column is None else int(row[self.label_column])
        return Record(name, picture["bytes"] or b"", label)

    def _rows(self) -> Any:
        # Imported here: digits need neither it nor what it brings.
        from datasets import Image, load_dataset

        where = self.path or self.name
        try:
            rows = load_dataset(where, split=self.split, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(
                "data must be a folder in the hub's schema (data.path=FOLDER) or a name that can "
                f"be fetched from the hub, got {where}: {reason(error)}"
            ) from error
        wanted = [c for c in (self.image_column, self.label_column) if c is not None]
        missing = [column for column in wanted if column not in (rows.column_names or ())]
        if missing:
            raise ValueError(
                f"image_column and label_column must be among {rows.column_names}, got {wanted}"
            )
        # Bytes, not pictures: one damaged row is then named, and does not stop the others.
        return rows.select_columns(wanted).cast_column(self.image_column, Image(decode=False))


class _Rows(Sequence[Record]):
    """A table of rows as records."""

    def __init__(self, rows: Any, source: Hub) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source.record(self.rows[int(index)], int(index))

    def __iter__(self) -> Iterator[Record]:  # in order, a table is read much faster
        return (self.source.record(row, i) for i, row in enumerate(self.rows))
