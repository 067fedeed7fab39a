"""Images to codes and back: an encoder, a quantiser, a prior over codes, and the decoder."""

from rolldiff.tokenizer.pipeline import Generation
from rolldiff.tokenizer.prior import Prior
from rolldiff.tokenizer.reconstruct import Reconstruction, reconstruct
from rolldiff.tokenizer.tokenizer import Encoder, Tokenizer

__all__ = ["Encoder", "Generation", "Prior", "Reconstruction", "Tokenizer", "reconstruct"]
