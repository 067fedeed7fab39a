"""Distances between sets of images."""

from rolldiff.metrics.frechet import FrechetDistance, frechet_distance

__all__ = ["FrechetDistance", "frechet_distance"]
