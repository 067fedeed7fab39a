"""From a backbone to posterior means.

A *backbone* is the raw network. `prepare` turns what does not change while the times move (places,
groups, condition) into a context, once; a call then sees a span of tokens in decode order, each at
its own time. A *denoiser* joins a backbone with a noise schedule and a prediction, and answers for
a span of the state with an `Estimate` of data and noise.

Waiting tokens are pure noise and independent of the data, so a causal backbone is never shown them.
Finished tokens never change, so with a cache it is shown each of them once more, in the first call
in which they are clean, and never again: the caller computes `cached … hi`, and nothing else.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate, Prediction, solve

__all__ = ["Backbone", "Context", "Denoiser", "Guided"]


@runtime_checkable
class Context(Protocol):
    """What a backbone keeps for one decode, or for one training batch.

    `cached` counts the leading tokens that are not shown again; it is None without a cache. The
    denoiser moves it on, after a call in which more of them were clean.
    """

    cached: int | None


@runtime_checkable
class Backbone(Protocol):
    """The raw network.

    `causal` promises that the output for a group depends on no later group.
    """

    causal: bool

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        group: Int[Tensor, "*B N"],
        cond: Any = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Context:
        """Everything that stays the same while the times move.

        Args:
            order: the raster index of each token, in decode order.
            group: the group of each token, in decode order.
            cond: the condition; its batch may be a multiple of the batch of tokens (guidance), and
                the tokens are then shown to every part.
            batch: examples that a cache is made for. None makes none.
            dtype: the type of the cache.
        """
        ...

    def __call__(
        self, x_t: Float[Tensor, "B n D"], t: Float[Tensor, "*B n"], context: Any, start: int = 0
    ) -> Float[Tensor, "B2 n D"]:
        """The prediction for the tokens `start … start + n - 1`, given those before them."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """`E[x | x_t]` and `E[eps | x_t]` from a backbone's prediction."""

    backbone: Backbone
    noise: NoiseSchedule
    prediction: Prediction = "x"

    def predict(
        self,
        x_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " N"],
        context: Context,
        span: tuple[int, int],
    ) -> Tensor:
        """The backbone's output for the tokens `lo … hi - 1` of the state."""
        lo, hi = span
        start = context.cached or 0
        stop = hi if self.backbone.causal else x_t.shape[1]
        y = self.backbone(x_t[:, start:stop], t[start:stop], context, start)
        if context.cached is not None:
            context.cached = lo
        return y[:, lo - start : hi - start]

    def __call__(
        self,
        x_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " N"],
        context: Context,
        span: tuple[int, int],
    ) -> Estimate:
        """The estimate for the tokens `lo … hi - 1`; those before `lo` are clean."""
        y = self.predict(x_t, t, context, span).to(x_t.dtype)
        lo, hi = span
        return solve(y, x_t[:, lo:hi], t[lo:hi], prediction=self.prediction, noise=self.noise)


@dataclass(frozen=True)
class Guided(Denoiser):
    """Classifier-free guidance, both branches in one call: `y + guidance (y - y_null)`.

    The context holds the condition first and the null condition behind it. Guiding the prediction
    guides data and noise alike, for both are affine in it (Ho and Salimans 2022).
    """

    guidance: float = 1.0

    def predict(
        self,
        x_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " N"],
        context: Context,
        span: tuple[int, int],
    ) -> Tensor:
        y, y_null = super().predict(x_t, t, context, span).chunk(2)
        return y + self.guidance * (y - y_null)
