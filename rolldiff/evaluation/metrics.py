"""Metrics between two sets of images, or of their features.

Features are `[B, F]`, images `[B, C, H, W]` in about [-1, 1]. Distances are computed in float64,
whatever the precision of the inputs, and no metric is random.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from rolldiff.errors import UsageError, whole_number
from rolldiff.evaluation.images import all_finite

__all__ = [
    "band_distances",
    "boundaries",
    "frechet_distance",
    "kernel_distance",
    "pixel_distance",
    "precision_recall",
    "psnr",
    "seam_ratio",
]

BLOCK = 2048  # images, or rows of a matrix of pairs, that are in memory in float64 at once


def frechet_distance(real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
    """The Fréchet distance between two sets of features, each modelled as a Gaussian.

        d = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

    (Dowson and Landau 1982; Heusel et al. 2017 with Inception features, which alone is called FID.)
    Covariances are divided by the number of samples minus one.

    For C_a = X_a' X_a and C_b = X_b' X_b the trace of the square root is the nuclear norm of
    X_a X_b', the sum of its singular values. Nothing is squared before these are taken, so the
    result keeps its precision where covariances are singular, as with fewer samples than features.

    The estimate is biased upwards, the more so the fewer samples there are: compare distances at
    equal numbers of samples only.

    Args:
        real: features of two samples or more.
        fake: the same features of two samples or more.

    Raises:
        UsageError: if the shapes are wrong, a side has fewer than two samples, or a feature is not
            finite or so large that its square is not.
    """
    _check_features(real, fake, minimum=2)
    with torch.autocast(real.device.type, enabled=False):
        (mean_a, root_a), (mean_b, root_b) = (_moments(side.detach()) for side in (real, fake))
        between = (mean_a - mean_b).square().sum()
        sums = between + root_a.square().sum() + root_b.square().sum()
        if not sums.isfinite():
            largest = max(abs(float(end)) for side in (real, fake) for end in side.aminmax())
            raise UsageError(f"features must have finite squares, got features up to {largest:.4g}")
        distance = sums - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return distance.clamp(min=0)  # below it is rounding


def _check_features(real: Tensor, fake: Tensor, *, minimum: int) -> None:
    size = real.shape[-1]
    for name, side in (("real", real), ("fake", fake)):
        if side.ndim != 2 or side.shape[1] != size:
            raise UsageError(f"features must have shape (B, {size}), got {tuple(side.shape)}")
        if len(side) < minimum:
            raise UsageError(f"{name} must have {minimum} samples or more, got {len(side)}")
        if not all_finite(side):
            raise UsageError(f"features must be finite, got {name} ones that are not")


def _moments(features: Float[Tensor, "B F"]) -> tuple[Tensor, Tensor]:
    """The mean, and a root `X` of the covariance `X' X` with no more rows than features."""
    count, size = features.shape
    # In parts, because they are converted to float64.
    parts = features.split(max(BLOCK, 2 * size))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    root = mean.new_empty(0, size)
    for part in parts:
        root = torch.cat([root, (part.double() - mean) / (count - 1) ** 0.5])
        if len(root) > size:
            # QR keeps X' X and leaves a triangle of F rows, however many samples there are.
            root = torch.linalg.qr(root, mode="r").R
    return mean, root


def pixel_distance(real: Float[Tensor, "A C H W"], fake: Float[Tensor, "B C H W"]) -> float:
    """The Fréchet distance between two sets of images, with their pixels as features."""
    return float(frechet_distance(real.flatten(1), fake.flatten(1)))


def band_distances(
    real: Float[Tensor, "A C H W"], fake: Float[Tensor, "B C H W"], *, bands: int = 4
) -> list[float]:
    """`pixel_distance` of each of several horizontal bands, from top to bottom.

    It shows drift from the first rows to the last.

    Raises:
        UsageError: if there are more bands than rows.
    """
    height = real.shape[2]
    if not 1 <= bands <= height:
        raise UsageError(f"bands must be in 1 … {height} (the rows), got {bands}")
    pairs = zip(real.tensor_split(bands, 2), fake.tensor_split(bands, 2), strict=True)
    return [pixel_distance(a, b) for a, b in pairs]


def kernel_distance(real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
    """The kernel distance between two sets of features, an unbiased squared MMD; may be negative.

        d = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean_{ij} k(a_i, b_j),
        k(a, b) = (a · b / F + 1)^3

    (Bińkowski et al. 2018; with Inception features it is called KID.) The means are over all pairs,
    not over random subsets.

    Args:
        real: features of two samples or more.
        fake: the same features of two samples or more.

    Raises:
        UsageError: if the shapes are wrong, a side has fewer than two samples, or a feature is not
            finite.
    """
    _check_features(real, fake, minimum=2)
    a, b = real.double(), fake.double()
    return _mean_within(a) + _mean_within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def _mean_within(x: Tensor) -> Tensor:
    diagonal = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    blocks = [_kernel(x @ y.T, a.shape[1]).sum() for x in a.split(BLOCK) for y in b.split(BLOCK)]
    return torch.stack(blocks).sum()


def _kernel(product: Tensor, num_features: int) -> Tensor:
    root = product / num_features + 1
    return root * root * root  # `root**3` is several times slower


def precision_recall(
    real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"], *, k: int = 3
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Precision and recall by nearest neighbours, each in [0, 1].

    The manifold of a set is the union of balls around its samples; the radius of a ball is the
    distance to the sample's k-th nearest neighbour in the set. Precision is the fraction of
    generated samples inside the real manifold, recall the fraction of real samples inside the
    generated one (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Args:
        real: features of more than `k` samples.
        fake: the same features of more than `k` samples.
        k: the neighbour that defines the radius.

    Raises:
        UsageError: if the shapes are wrong, a side has `k` samples or fewer, or a feature is not
            finite.
    """
    _check_features(real, fake, minimum=whole_number(k, "k") + 1)
    real, fake = real.double(), fake.double()
    return _fraction_inside(fake, real, k), _fraction_inside(real, fake, k)


def _fraction_inside(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """The fraction of points in at least one of the balls around the centres."""
    # The nearest of the k + 1 is the centre itself.
    radius = torch.cat([_cdist(x, centres).kthvalue(k + 1).values for x in centres.split(BLOCK)])
    inside = [(_cdist(x, centres) <= radius).any(1) for x in points.split(BLOCK)]
    return torch.cat(inside).double().mean()


def _cdist(a: Tensor, b: Tensor) -> Tensor:
    # Matrix products would lose the precision of small distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def seam_ratio(
    real: Float[Tensor, "A C H W"], fake: Float[Tensor, "B C H W"], group: Int[Tensor, "H W"]
) -> Float[Tensor, ""]:
    """How much larger gradients are across group boundaries than in the data; 1 means no seam.

    The mean absolute difference between neighbouring pixels of different groups, over that between
    neighbouring pixels of the same group, divided by the same ratio for `real`. NaN if images do
    not differ between the pixels that it divides by.

    Args:
        real: images of the data.
        fake: generated images.
        group: the group of each pixel.

    Raises:
        UsageError: if all neighbouring pixels are of different groups, or all of the same group, or
            a pixel is not finite.
    """
    across = boundaries(group)
    if across is None:
        raise UsageError("group must have neighbouring pixels of two groups and of one, got none")
    ratios = []
    for image in (fake, real):
        gradient = _mean_gradient(image)
        ratios.append(gradient[across].mean() / gradient[~across].mean())
    ratio = ratios[0] / ratios[1]
    return ratio if ratio.isfinite() else torch.full_like(ratio, torch.nan)


def _mean_gradient(image: Float[Tensor, "B C H W"]) -> Float[Tensor, " P"]:
    """The mean difference of neighbouring pixels, vertical then horizontal."""
    if not all_finite(image):
        raise UsageError("image must be finite, got pixels that are not")
    total: Tensor | int = 0
    for part in image.split(BLOCK):  # in parts, because they are converted to float64
        diffs = [part.double().diff(dim=dim).abs().sum((0, 1)).flatten() for dim in (2, 3)]
        total = total + torch.cat(diffs)
    return torch.as_tensor(total) / (image.shape[0] * image.shape[1])


def boundaries(group: Int[Tensor, "H W"]) -> Bool[Tensor, " P"] | None:
    """Which pairs of neighbouring pixels, vertical then horizontal, are of different groups.

    None if all pairs are, or no pair is.
    """
    across = torch.cat([(group.diff(dim=dim) != 0).flatten() for dim in (0, 1)])
    return None if across.all() or not across.any() else across


def psnr(image: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, `10 log10(4 / mean squared error)` for [-1, 1].

    Values are clipped to that range first. The mean is over all images.

    Raises:
        UsageError: if a pixel is not finite.
    """
    for name, side in (("image", image), ("other", other)):
        if not all_finite(side):
            raise UsageError(f"{name} must be finite, got pixels that are not")
    return float(peak_signal_noise_ratio(other, image, data_range=(-1.0, 1.0)))
