"""Distances between sets of images, and the features they are taken of."""

from rolldiff.metrics.classifier import Classifier, train_classifier
from rolldiff.metrics.features import Extractor, Pixels, described
from rolldiff.metrics.frechet import (
    FrechetDistance,
    distance_between,
    feature_distance,
    frechet_distance,
)
from rolldiff.metrics.kernel import KernelDistance, kernel_distance
from rolldiff.metrics.neighbours import PrecisionRecall, precision_recall
from rolldiff.metrics.networks import Inception, ResNet56
from rolldiff.metrics.seams import by_band, seams

__all__ = [
    "Classifier",
    "Extractor",
    "FrechetDistance",
    "Inception",
    "KernelDistance",
    "Pixels",
    "PrecisionRecall",
    "ResNet56",
    "by_band",
    "described",
    "distance_between",
    "feature_distance",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "seams",
    "train_classifier",
]
