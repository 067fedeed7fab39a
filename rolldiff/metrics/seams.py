"""Seams between groups, and drift from the first rows to the last."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.metrics.frechet import distance_between

__all__ = ["boundaries", "by_band", "seams"]


def seams(
    fake: Float[Tensor, "A C H W"], real: Float[Tensor, "B C H W"], group: Int[Tensor, "H W"]
) -> Float[Tensor, ""]:
    """How much larger gradients are across group boundaries than the data would have them.

    The mean absolute difference of neighbouring pixels of two groups, over that of neighbours of
    one group, divided by the same ratio in the data: 1 means no seam.

    Args:
        fake: generated images.
        real: images of the data.
        group: the group of each pixel.

    Raises:
        ValueError: if there is no boundary, or nothing else.
    """
    across = boundaries(group)
    if across is None:
        raise ValueError("group must have neighbouring pixels of two groups and of one, got none")
    ratios = []
    for image in (fake, real):
        steps = [image.double().diff(dim=dim).abs().mean((0, 1)).flatten() for dim in (2, 3)]
        gradient = torch.cat(steps)
        ratios.append(gradient[across].mean() / gradient[~across].mean())
    return ratios[0] / ratios[1]


def boundaries(group: Int[Tensor, "H W"]) -> Bool[Tensor, " P"] | None:
    """Which pairs of neighbouring pixels, below then beside, are of two groups.

    None if there is no such pair, or no other.
    """
    across = torch.cat([(group.diff(dim=dim) != 0).flatten() for dim in (0, 1)])
    return None if across.all() or not across.any() else across


def by_band(
    fake: Float[Tensor, "A C H W"], real: Float[Tensor, "B C H W"], *, bands: int = 4
) -> list[float]:
    """The Fréchet distance in pixel space of each horizontal band, from the top down.

    Raises:
        ValueError: if there are not as many rows.
    """
    height = real.shape[2]
    if not 1 <= bands <= height:
        raise ValueError(f"bands must be in 1 … {height} (the rows), got {bands}")
    pairs = zip(real.tensor_split(bands, 2), fake.tensor_split(bands, 2), strict=True)
    return [distance_between(a, b) for a, b in pairs]
