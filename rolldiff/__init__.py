"""Grouped and rolling diffusion decoding with a tunable group count."""

from rolldiff.conditioning import ClassLabels, Conditioning, TokenGrid, TokenSequence
from rolldiff.decoder import Cost, DecodeConfig, DecodeOutput, Decoder, Frame
from rolldiff.diffusion import timesteps
from rolldiff.diffusion.bands import DCT, Haar
from rolldiff.diffusion.layout import Patches
from rolldiff.diffusion.process import Cosine, LinearBeta, Rectified
from rolldiff.diffusion.sampler import DDIM, AdamsBashforth2, Euler, Heun, Midpoint
from rolldiff.diffusion.schedule import GroupSchedule
from rolldiff.diffusion.timesteps import TrainingDistribution
from rolldiff.likelihood import Likelihood, LikelihoodConfig
from rolldiff.nn.denoiser import Guidance
from rolldiff.nn.dit import DiT
from rolldiff.nn.transformer import Transformer

__all__ = [
    "DCT",
    "DDIM",
    "AdamsBashforth2",
    "ClassLabels",
    "Conditioning",
    "Cosine",
    "Cost",
    "DecodeConfig",
    "DecodeOutput",
    "Decoder",
    "DiT",
    "Euler",
    "Frame",
    "GroupSchedule",
    "Guidance",
    "Haar",
    "Heun",
    "Likelihood",
    "LikelihoodConfig",
    "LinearBeta",
    "Midpoint",
    "Patches",
    "Rectified",
    "TokenGrid",
    "TokenSequence",
    "Training",
    "TrainingDistribution",
    "Transformer",
    "timesteps",
]

__version__ = "0.2.0"

Training = TrainingDistribution
