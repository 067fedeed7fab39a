"""Training with Lightning: modules, callbacks, and a run from a configuration to a folder."""

from rolldiff.training.callbacks import ProgressLines, SampleGrid, TimeLimit
from rolldiff.training.module import (
    LitDecoder,
    LitModel,
    LitPrior,
    LitTokenizer,
    images_per_batch,
)
from rolldiff.training.run import Summary, train

__all__ = [
    "LitDecoder",
    "LitModel",
    "LitPrior",
    "LitTokenizer",
    "ProgressLines",
    "SampleGrid",
    "Summary",
    "TimeLimit",
    "images_per_batch",
    "train",
]
