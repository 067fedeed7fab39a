"""Grouped and rolling diffusion decoding with a tunable group count."""

from rolldiff.conditions import ClassLabels, LowResolution, TokenGrid, TokenSequence
from rolldiff.cost import Cost
from rolldiff.decoder import Decoded, Decoder, Frame
from rolldiff.denoiser import Guidance
from rolldiff.grouping import Grouping
from rolldiff.layout import Patches
from rolldiff.nn import Transformer
from rolldiff.noise import Cosine, Rectified
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Ancestral, Euler, Heun, Multistep
from rolldiff.training import Training

__all__ = [
    "Ancestral",
    "ClassLabels",
    "Cosine",
    "Cost",
    "Decoded",
    "Decoder",
    "Euler",
    "Frame",
    "Grouping",
    "Guidance",
    "Heun",
    "LowResolution",
    "Multistep",
    "Patches",
    "Rectified",
    "RollingSchedule",
    "TokenGrid",
    "TokenSequence",
    "Training",
    "Transformer",
]

__version__ = "0.1.0"
