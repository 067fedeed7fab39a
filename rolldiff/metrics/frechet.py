"""The Fréchet distance between two sets of features, each taken for a Gaussian.

    d = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

(Dowson and Landau 1982; Heusel et al. 2017 with Inception features, which alone is called FID.) All
sums are kept in float64, whatever precision the features come in.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

__all__ = ["FrechetDistance", "check_features", "distance_between", "frechet_distance"]


def frechet_distance(
    mean_a: Float[Tensor, " F"],
    cov_a: Float[Tensor, "F F"],
    mean_b: Float[Tensor, " F"],
    cov_b: Float[Tensor, "F F"],
) -> Float[Tensor, ""]:
    """The distance between two Gaussians, by two symmetric eigenvalue problems."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def check_features(features: Tensor, size: int) -> None:
    """Refuse features that are not `[B, size]`.

    Raises:
        ValueError: if they are not.
    """
    if features.ndim != 2 or features.shape[1] != size:
        raise ValueError(f"features must have shape (B, {size}), got {tuple(features.shape)}")


class FrechetDistance(Metric):
    """The Fréchet distance of generated features to real ones, summed over batches and processes.

    Args:
        features: the number `F` of features of a sample.

    Raises:
        ValueError: from `compute`, if a side has fewer than two samples; from `update`, if the
            features have the wrong shape.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features
        self.set_dtype(torch.float64)
        for side in ("real", "fake"):
            zeros = torch.zeros(features, features, dtype=torch.float64)
            self.add_state(f"{side}_count", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", zeros[0].clone(), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", zeros, dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "B F"], *, real: bool) -> None:
        """Add the features of a batch to one of the two sides."""
        check_features(features, self.features)
        side = "real" if real else "fake"
        with torch.autocast(features.device.type, enabled=False):
            f = features.detach().double()
            getattr(self, f"{side}_count").add_(len(f))
            getattr(self, f"{side}_sum").add_(f.sum(0))
            getattr(self, f"{side}_outer").add_(f.T @ f)

    def compute(self) -> Float[Tensor, ""]:
        """The distance, in float64."""
        moments = []
        for side in ("real", "fake"):
            count = getattr(self, f"{side}_count")
            if count < 2:
                raise ValueError(f"two {side} samples are needed at least, got {int(count)}")
            mean = getattr(self, f"{side}_sum") / count
            cov = (getattr(self, f"{side}_outer") - count * mean.outer(mean)) / (count - 1)
            moments += [mean, cov]
        return frechet_distance(*moments)


def distance_between(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance in pixel space between two sets of images `[B, C, H, W]`."""
    metric = FrechetDistance(real[0].numel())
    metric.update(real.flatten(1), real=True)
    metric.update(fake.flatten(1), real=False)
    return float(metric.compute())
