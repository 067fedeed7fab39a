"""What a decode costs: network calls in series, token evaluations, seconds.

Calls and tokens are counted by a hook on the backbone, never derived from the settings.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rolldiff.denoiser import Backbone

__all__ = ["Cost", "Meter", "metered"]


@dataclass(frozen=True)
class Cost:
    """The measured cost of one decode.

    Attributes:
        nfe: network calls, one after another.
        tokens: token evaluations for one image; with guidance both branches count.
        seconds: wall-clock time.
        cached: whether finished tokens were kept instead of computed again.
    """

    nfe: int
    tokens: int
    seconds: float
    cached: bool


class Meter:
    """Counts calls and tokens as they happen."""

    def __init__(self) -> None:
        self.nfe = 0
        self.tokens = 0
        self._start = time.perf_counter()

    def count(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook: the output's batch over the input's is the number of branches."""
        self.nfe += 1
        self.tokens += output.shape[1] * output.shape[0] // inputs[0].shape[0]

    def cost(self, *, cached: bool) -> Cost:
        """The cost so far."""
        return Cost(self.nfe, self.tokens, time.perf_counter() - self._start, cached)


@contextmanager
def metered(backbone: Backbone) -> Iterator[Meter]:
    """Count the backbone's calls inside the block."""
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"backbone must be an nn.Module, got {type(backbone).__name__}")
    meter = Meter()
    handle = backbone.register_forward_hook(meter.count)
    try:
        yield meter
    finally:
        handle.remove()
