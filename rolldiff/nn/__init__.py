"""Backbones."""

from rolldiff.nn.transformer import Transformer

__all__ = ["Transformer"]
