"""Training with Lightning: modules, callbacks, and a run from a configuration to a folder."""

from rolldiff.training.callbacks import AveragedWeights, Clock, ProgressLines, SampleGrid
from rolldiff.training.initial import decoder_of
from rolldiff.training.log import CSVLog
from rolldiff.training.module import (
    LitDecoder,
    LitModel,
    LitPrior,
    LitTokenizer,
)
from rolldiff.training.run import Summary, train
from rolldiff.training.sharding import FullySharded

__all__ = [
    "AveragedWeights",
    "CSVLog",
    "Clock",
    "FullySharded",
    "LitDecoder",
    "LitModel",
    "LitPrior",
    "LitTokenizer",
    "ProgressLines",
    "SampleGrid",
    "Summary",
    "decoder_of",
    "train",
]
