"""From a backbone to posterior means.

A *backbone* is the raw network. `prepare` turns what does not change while the times move (places,
groups, condition) into a context, once, and `embed_time` a local time into what the network is told
of it; a call then sees a span of tokens in decode order, each at its own time. A *denoiser* joins a
backbone with a noise schedule and a prediction, and answers for a span of the state with an
`Estimate` of data and noise.

Waiting tokens are pure noise and independent of the data, so a causal backbone is never shown them.
Finished tokens never change, so with a cache it is shown each of them once more, in the first call
in which they are clean, and never again: the caller computes `cached … hi`, and nothing else.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.conditioning import Conditions
from rolldiff.conditions import Given
from rolldiff.cost import Meter
from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate, Prediction, solve
from rolldiff.schedule import RollingSchedule
from rolldiff.timetable import Timetable

__all__ = ["Backbone", "Context", "Denoiser", "Guidance", "Guided"]


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

    `causal` promises that the output for a group depends on no later group. `condition` says what
    it is conditioned on.
    """

    causal: bool
    condition: Conditions

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        group: Int[Tensor, "*B N"],
        cond: dict[str, Given] | None = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Context:
        """Everything that stays the same while the times move.

        Args:
            order: the raster index of each token, in decode order.
            group: the group of each token, in decode order.
            cond: the checked conditions; their batch may be a multiple of the batch of tokens
                (guidance), and the tokens are then shown to every part.
            batch: examples that a cache is made for. None makes none.
            dtype: the type of the cache.
        """
        ...

    def arrive(self, context: Any, cond: dict[str, Given]) -> None:
        """Put more of the conditions into a context, where they were null so far."""
        ...

    def needs(self) -> dict[str, Int[Tensor, " N"]]:
        """How many tokens of each grid or sequence a token of the image looks at."""
        ...

    def compile(self, *, mode: str | None = None) -> None:
        """Compile in place; hooks on the backbone must go on being called."""
        ...

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """What the network is told of a local time; a decode asks once for each of its times."""
        ...

    def __call__(
        self,
        x_t: Float[Tensor, "B n D"],
        time: Float[Tensor, "*B #n E"],
        context: Any,
        start: int = 0,
    ) -> Float[Tensor, "B2 n D"]:
        """The prediction for the tokens `start … start + n - 1`, given those before them.

        `time` holds the embedded time of each token, or one row if all of them have the same.
        """
        ...


@dataclass(frozen=True)
class Denoiser:
    """`E[x | x_t]` and `E[eps | x_t]` from a backbone's prediction."""

    backbone: Backbone
    noise: NoiseSchedule
    prediction: Prediction
    meter: Meter

    def timetable(
        self,
        schedule: RollingSchedule,
        steps: int,
        num_tokens: int,
        *,
        known: int = 0,
        like: Tensor,
    ) -> Timetable:
        """The local times of a decode; `like` is a tensor of the state's type on its device."""
        return Timetable(
            schedule,
            steps,
            num_tokens,
            known=known,
            noise=self.noise,
            prediction=self.prediction,
            embed=self.backbone.embed_time,
            like=like,
        )

    def __call__(
        self,
        x_t: Float[Tensor, "B N D"],
        timetable: Timetable,
        context: Context,
        span: tuple[int, int],
    ) -> Estimate:
        """The estimate for the tokens `lo … hi - 1`: whole groups, all those before them clean."""
        lo, hi = span
        start = context.cached or 0
        stop = hi if self.backbone.causal else x_t.shape[1]
        shown = x_t[:, start:stop]
        level = timetable.level(start, stop)
        y = self.backbone(shown, timetable.embedded(level), context, start)
        self.meter.count(shown, y)
        if context.cached is not None:
            context.cached = lo
        if (start, stop) != span:
            y, shown = y[:, lo - start : hi - start], shown[:, lo - start : hi - start]
            level = timetable.level(lo, hi)
        y = self.guide(y, timetable, span)  # in the network's type; `solve` promotes it
        return solve(y, shown, level.inverse)

    def guide(self, y: Tensor, timetable: Timetable, span: tuple[int, int]) -> Tensor:
        """The prediction to solve for, from the backbone's output for the span."""
        return y


@dataclass(frozen=True)
class Guidance:
    """How strongly the condition is stressed, by group and time: the weight `w` of `Guided`.

    Args:
        scale: `w` of the last group.
        first: `w` of the first group over that of the last; it changes evenly between them. 0
            rises from no guidance, as in xAR (Ren et al. 2025).
        interval: the local times at which there is guidance at all, from and to (Kynkäänniemi et
            al. 2024); 0 is data.

    Raises:
        ValueError: if a number is not finite, or the interval is none in [0, 1].
    """

    scale: float
    first: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        least, most = self.interval
        if not (math.isfinite(self.scale) and math.isfinite(self.first)):
            raise ValueError(
                f"guidance must be a finite number, got {self.scale} and first {self.first}"
            )
        if not 0 <= least <= most <= 1:
            raise ValueError(f"interval must be in [0, 1] and in order, got {self.interval}")

    @property
    def constant(self) -> bool:
        """Whether it is the same for all groups and times."""
        return self.first == 1 and self.interval == (0, 1)

    def weight(self, place: float, t: float) -> float:
        """`w` of a group at a place in the order, 0 … 1, and a local time."""
        least, most = self.interval
        return self.scale * (self.first + (1 - self.first) * place) if least <= t <= most else 0.0


@dataclass(frozen=True)
class Guided(Denoiser):
    """Classifier-free guidance, both branches in one call: `y + w (y - y_null)`.

    The context holds the condition first and the null condition behind it. Guiding the prediction
    guides data and noise alike, for both are affine in it (Ho and Salimans 2022).
    """

    guidance: Guidance = Guidance(1.0)

    def guide(self, y: Tensor, timetable: Timetable, span: tuple[int, int]) -> Tensor:
        y, y_null = y.chunk(2)
        if self.guidance.constant:
            return y + self.guidance.scale * (y - y_null)
        w = y.new_tensor(timetable.each(*span, self.guidance.weight))
        return y + w[:, None] * (y - y_null)
