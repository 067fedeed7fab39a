"""Precision and recall of generated features, by nearest neighbours.

A set's manifold is the union of balls around its samples, each as large as the distance to its k-th
nearest neighbour in the set. Precision is the share of generated samples inside the real manifold,
recall the share of real samples inside the generated one (Kynkäänniemi et al. 2019, eq. 1 and 2).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.metrics.collected import Collected

__all__ = ["PrecisionRecall", "precision_recall"]

BLOCK = 2048


def precision_recall(
    real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"], *, neighbours: int = 3
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Precision and recall, each in [0, 1].

    Raises:
        ValueError: if a side has no more than `neighbours` samples.
    """
    for name, side in (("real", real), ("fake", fake)):
        if len(side) <= neighbours:
            raise ValueError(f"{name} must have more than {neighbours} samples, got {len(side)}")
    real, fake = real.double(), fake.double()
    return _inside(fake, real, neighbours), _inside(real, fake, neighbours)


class PrecisionRecall(Collected):
    """Precision and recall of generated features, over batches and processes.

    Args:
        features: the number `F` of features of a sample.
        neighbours: `k`, which neighbour a ball reaches to.
    """

    higher_is_better = True

    def __init__(self, features: int, *, neighbours: int = 3, **kwargs: Any) -> None:
        super().__init__(features, **kwargs)
        self.neighbours = neighbours

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`."""
        precision, recall = precision_recall(*self.sides(), neighbours=self.neighbours)
        return {"precision": precision, "recall": recall}


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> Tensor:
    """The share of points in a ball of some centre."""
    # The nearest of all is the sample itself.
    radius = torch.cat(
        [_distance(x, centres).kthvalue(neighbours + 1).values for x in centres.split(BLOCK)]
    )
    inside = [(_distance(x, centres) <= radius).any(1) for x in points.split(BLOCK)]
    return torch.cat(inside).double().mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # By differences: matrix products lose the digits of near neighbours.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
