"""Features of two sets, kept until the end: for metrics that look at pairs of samples."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rolldiff.metrics.frechet import check_features

__all__ = ["Collected"]


class Collected(Metric):
    """Keeps the features of real and generated samples, from all batches and processes.

    Args:
        features: the number `F` of features of a sample.

    Raises:
        ValueError: from `update`, if the features have the wrong shape; from `compute`, if a side
            has fewer than two samples.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features
        for side in ("real", "fake"):
            self.add_state(side, [], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "B F"], *, real: bool) -> None:
        """Add the features of a batch to one of the two sides."""
        check_features(features, self.features)
        getattr(self, "real" if real else "fake").append(features.detach().float())

    def sides(self) -> tuple[Float[Tensor, "A F"], Float[Tensor, "B F"]]:
        """All that was collected, real and generated."""
        found = []
        for side in ("real", "fake"):
            kept = getattr(self, side)
            every = dim_zero_cat(kept) if len(kept) else torch.empty(0, self.features)
            if len(every) < 2:
                raise ValueError(f"two {side} samples are needed at least, got {len(every)}")
            found.append(every)
        return found[0], found[1]
