"""`Images`: what all sources of images have in common, as a Lightning data module.

Images are `[C, H, W]` in [-1, 1], with an integer label. Which ones are held out and in which order
the others are shown depends on the seed alone; a training resumed from a checkpoint goes on with
the batch that would have come next.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rolldiff.data.draws import Draws
from rolldiff.data.records import Corrupt, Record, decoded, pixels
from rolldiff.data.sets import Drawn, Kept, Mirrored

__all__ = ["Images"]

IN_MEMORY = 2**32  # bytes of pixels; sets above it are decoded as they are drawn


@dataclass(kw_only=True, eq=False)
class Images(L.LightningDataModule, ABC):
    """Images of one source, under one treatment.

    Args:
        image_size: side in pixels; pictures of another size are cut to a square and resized.
        channels: 1 for grey, 3 for colour.
        batch_size: examples in a batch, on each process.
        max_steps: batches in an epoch.
        seed: of the split and of the order.
        flip: whether half of the examples are mirrored; the set is then twice as large.
        held_out: share of the images that is never trained on, in [0, 1).
        reference: images that samples are compared to, the first of a permutation of those trained
            on; None takes all.
        corrupt: whether a picture that cannot be read is skipped with a warning or refused.
        workers: processes that decode pictures, where a set is too large to be kept decoded.
    """

    image_size: int
    channels: int
    batch_size: int = 128
    max_steps: int = 1000
    seed: int = 0
    flip: bool = False
    held_out: float = 0.0
    reference: int | None = None
    corrupt: Corrupt = "skip"
    workers: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        if min(self.batch_size, self.max_steps, self.image_size) < 1:
            raise ValueError(
                "batch_size, max_steps and image_size must be 1 or more, got "
                f"{self.batch_size}, {self.max_steps} and {self.image_size}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.reference is not None and self.reference < 2:
            raise ValueError(f"reference must be 2 or more images, got {self.reference}")
        if self.corrupt not in ("skip", "refuse"):
            raise ValueError(f"corrupt must be skip or refuse, got {self.corrupt!r}")
        self._seen = 0

    @abstractmethod
    def records(self) -> Sequence[Record]:
        """The pictures of the source."""

    @property
    def treatment(self) -> dict[str, int]:
        """What every picture is brought to, as `pixels` and `decoded` take it."""
        return {"image_size": self.image_size, "channels": self.channels}

    def decoded(self) -> Dataset:
        """The source's images: a batch of indices to images and labels.

        Raises:
            ValueError: if a picture is refused, or none is left.
        """
        records = self.records()
        if len(records) * self.channels * self.image_size**2 <= IN_MEMORY:
            return Kept(*decoded(records, corrupt=self.corrupt, **self.treatment))
        if self.corrupt == "refuse":  # now, not in the middle of an epoch
            for record in records:
                pixels(record, **self.treatment)
        return Drawn(records, **self.treatment)

    @property
    def rank(self) -> int:
        """Which process of a training this is."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world(self) -> int:
        """Processes of the training."""
        return self.trainer.world_size if self.trainer else 1

    def batches_seen(self) -> int:
        """Training batches drawn so far, those before a checkpoint among them."""
        if (trainer := self.trainer) is not None and trainer.training:
            self._seen = max(self._seen, trainer.fit_loop.epoch_loop.batch_progress.total.ready)
        return self._seen

    @cached_property
    def _set(self) -> Dataset:
        return self.decoded()

    @cached_property
    def _split(self) -> tuple[Int[Tensor, " A"], Int[Tensor, " B"]]:
        """Indices trained on, and held out."""
        count = len(self._set)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=generator) if self.held_out else torch.arange(count)
        train, held_out = order.split([count - (out := int(self.held_out * count)), out])
        return train.sort().values, held_out.sort().values

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        train = self._split[0]
        if self.reference is not None and self.reference < len(train):
            generator = torch.Generator().manual_seed(self.seed)
            train = train[torch.randperm(len(train), generator=generator)[: self.reference]]
        return self._set[train]

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
        draws = Draws(
            len(train) * (2 if self.flip else 1),
            batch_size=self.batch_size,
            batches=self.max_steps,
            seed=self.seed,
            done=self.batches_seen,
            rank=self.rank,
            world=self.world,
        )
        return self._loader(Mirrored(self._set, train), draws)

    def val_dataloader(self) -> Any:
        train, held_out = self._split
        image, label = self._set[held_out if len(held_out) else train[:2000]]
        return DataLoader(TensorDataset(image, label), batch_size=500)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches_seen()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._seen = state_dict["batches"]

    def _loader(self, data: Dataset, draws: Any) -> DataLoader:
        # Whole batches are indexed at once: a tensor of images needs no collating.
        workers = self.workers if isinstance(self._set, Drawn) else 0
        return DataLoader(data, sampler=draws, batch_size=None, num_workers=workers)
