"""Evaluation of generated images: feature extractors, metrics and image grids."""
