"""The Fréchet distance between two sets of features, each taken for a Gaussian.

    d = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

(Dowson and Landau 1982; Heusel et al. 2017 with Inception features, which alone is called FID.) All
sums are kept in float64, whatever precision the features come in.

The last trace needs no square root of a matrix where the features themselves are at hand: for
C_a = X_a' X_a and C_b = X_b' X_b it is the nuclear norm of X_a X_b', which is the sum of its
singular values.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "FrechetDistance",
    "check_features",
    "distance_between",
    "feature_distance",
    "frechet_distance",
]


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


def feature_distance(real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
    """The distance between two sets of features, in float64.

    It is the value of `frechet_distance` on their means and covariances (divided by the count less
    one). Nothing is squared on the way to the singular values, so it keeps its digits where the
    covariances are singular, above all where a set has fewer samples than features.

    Args:
        real: features of two samples or more.
        fake: the same features of two samples or more.

    Raises:
        ValueError: if the shapes are wrong, a side has fewer than two samples, or a feature is not
            finite.
    """
    for name, side in (("real", real), ("fake", fake)):
        check_features(side, real.shape[-1])
        if len(side) < 2:
            raise ValueError(f"two {name} samples are needed at least, got {len(side)}")
        if not side.isfinite().all():
            raise ValueError(f"features must be finite, got {name} ones that are not")
    with torch.autocast(real.device.type, enabled=False):
        a, b = real.detach().double(), fake.detach().double()
        between = (a.mean(0) - b.mean(0)).square().sum()
        root_a, root_b = _root(a), _root(b)
        cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
        return between + root_a.square().sum() + root_b.square().sum() - 2 * cross


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
    return float(feature_distance(real.flatten(1), fake.flatten(1)))


def _root(features: Float[Tensor, "B F"]) -> Float[Tensor, "R F"]:
    """A root `X` of the covariance `X' X`, with no more rows than features."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    # QR keeps X' X and leaves a triangle of F rows, however many samples there are.
    return torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred
