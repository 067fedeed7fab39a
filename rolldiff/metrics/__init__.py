"""Distances between sets of images."""

from rolldiff.metrics.frechet import FrechetDistance, distance_between, frechet_distance
from rolldiff.metrics.kernel import KernelDistance, kernel_distance
from rolldiff.metrics.neighbours import PrecisionRecall, precision_recall
from rolldiff.metrics.seams import by_band, seams

__all__ = [
    "FrechetDistance",
    "KernelDistance",
    "PrecisionRecall",
    "by_band",
    "distance_between",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "seams",
]
