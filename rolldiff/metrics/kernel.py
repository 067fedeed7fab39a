"""The kernel distance between two sets of features: an unbiased squared maximum mean discrepancy.

    d = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean_{ij} k(a_i, b_j),
    k(a, b) = (a · b / F + 1)^3

(Bińkowski et al. 2018; with Inception features it is called KID.) It is the mean over all pairs,
not over random subsets, so it has no randomness of its own; kernels are summed block by block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.metrics.collected import Collected

__all__ = ["KernelDistance", "kernel_distance"]

BLOCK = 2048


def kernel_distance(real: Float[Tensor, "A F"], fake: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
    """The distance between two sets of two samples or more, in float64. It may be below 0."""
    a, b = real.double(), fake.double()
    return _within(a) + _within(b) - 2 * _total(a, b) / (len(a) * len(b))


class KernelDistance(Collected):
    """The kernel distance of generated features to real ones, over batches and processes."""

    higher_is_better = False

    def compute(self) -> Float[Tensor, ""]:
        """The distance, in float64."""
        return kernel_distance(*self.sides())


def _within(x: Tensor) -> Tensor:
    itself = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_total(x, x) - itself) / (len(x) * (len(x) - 1))


def _total(a: Tensor, b: Tensor) -> Tensor:
    blocks = [_kernel(x @ y.T, a.shape[1]).sum() for x in a.split(BLOCK) for y in b.split(BLOCK)]
    return torch.stack(blocks).sum()


def _kernel(product: Tensor, features: int) -> Tensor:
    root = product / features + 1
    return root * root * root  # a power is several times slower
