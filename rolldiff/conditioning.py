"""What a decoder is conditioned on: class labels.

A condition checks what a user gives, knows its null value, and can be dropped in training, so that
the same weights serve guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["ClassLabels"]


@dataclass(frozen=True)
class ClassLabels:
    """Labels in 0 … `num_classes - 1`; the index `num_classes` is the null label.

    With `num_classes = 0` there is no condition and every label is null.
    """

    num_classes: int

    def check(
        self, label: Tensor | Sequence[int] | int | None, batch: int, device: torch.device
    ) -> Int[Tensor, " B"]:
        """Labels as a tensor of `batch` indices.

        Raises:
            ValueError: if the model has no labels, or the shape, type or range is wrong.
        """
        if label is None:
            return self.null(batch, device)
        if self.num_classes == 0:
            raise ValueError("cond must be None: this decoder was built without class labels")
        label = torch.as_tensor(label, device=device)
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(f"cond must hold whole numbers, got {label.dtype}")
        if label.ndim == 0:
            label = label.expand(batch)
        if label.shape != (batch,):
            raise ValueError(f"cond must have shape ({batch},), got {tuple(label.shape)}")
        if batch and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise ValueError(
                f"cond must be in 0 … {self.num_classes - 1}, got "
                f"{int(label.min())} … {int(label.max())}"
            )
        return label.long()

    def null(self, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        """The condition that says nothing."""
        return torch.full((batch,), self.num_classes, device=device)

    def drop(
        self, label: Int[Tensor, " B"], rate: float, generator: torch.Generator | None = None
    ) -> Int[Tensor, " B"]:
        """Replace each label by the null label with probability `rate`."""
        dropped = torch.rand(len(label), generator=generator).to(label.device) < rate
        return label.where(~dropped, self.num_classes)
