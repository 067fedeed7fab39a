"""The handwritten digits that ship with scikit-learn: 1,797 scans of 8 x 8 pixels in 17 greys.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository (1998), the test part.
"""

from functools import cached_property
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

__all__ = ["Digits"]


class Digits(L.LightningDataModule):
    """All the digits, in [-1, 1], drawn with replacement.

    There is no held-out part: 1,797 scans are few, and the distances reported are to these scans.

    Args:
        batch_size: examples in a batch.
        max_steps: batches in an epoch; one epoch is the whole training.
        seed: of the order in which examples are drawn.
    """

    def __init__(self, *, batch_size: int = 128, max_steps: int = 1000, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or max_steps < 1:
            raise ValueError(
                f"batch_size and max_steps must be 1 or more, got {batch_size} and {max_steps}"
            )
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.seed = seed

    @cached_property
    def _arrays(self) -> tuple[Tensor, Tensor]:
        # Imported here: only those who train on digits need scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        return image, torch.tensor(digits.target, dtype=torch.long)

    @property
    def image(self) -> Float[Tensor, "1797 1 8 8"]:
        """All images."""
        return self._arrays[0]

    @property
    def label(self) -> Int[Tensor, " 1797"]:
        """Their labels, 0 … 9."""
        return self._arrays[1]

    def train_dataloader(self) -> Any:
        data = TensorDataset(self.image, self.label)
        draws = RandomSampler(
            data,
            replacement=True,
            num_samples=self.batch_size * self.max_steps,
            generator=torch.Generator().manual_seed(self.seed),
        )
        # Whole batches are indexed at once: a tensor of images needs no collating.
        batches = BatchSampler(draws, self.batch_size, drop_last=True)
        return DataLoader(data, sampler=batches, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.image, self.label), batch_size=600)
