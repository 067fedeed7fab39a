"""Solver steps: from the times `t` to the times `s <= t`, token by token.

A step sees only the moving span and never the global time. It gets the `Level` of the tokens at `t`
and at `s`, asks `denoise` for an `Estimate` at one of the two, and returns the tokens at `s` with
the estimate made at `t`. `order` is the order of its
global error in `1 / S` for smooth data (fitted by the tests), `calls` the network calls of a step.
All of them start from the probability-flow equation `dx_t/dt = alpha' x + sigma' eps`, whose exact
solution for a constant estimate is `x_s = alpha_s x + sigma_s eps` (DDIM; Song et al. 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.prediction import Estimate
from rolldiff.timetable import Level

__all__ = ["Ancestral", "Euler", "Heun", "Last", "Multistep", "Step"]

Denoise = Callable[[Tensor, Level], Estimate]
Draw = Callable[[], Tensor]


class Last(NamedTuple):
    """What the row before knew of the same tokens: its estimate and its times.

    A token that had not started then has the same time in both rows.
    """

    estimate: Estimate
    t: Level


@runtime_checkable
class Step(Protocol):
    """A solver step; `draw()` is unit noise like `x_t`, from the stream of each sample."""

    @property
    def order(self) -> int: ...

    @property
    def calls(self) -> int: ...

    @property
    def multistep(self) -> bool:
        """Whether it reads `last`."""
        ...

    def __call__(
        self,
        denoise: Denoise,
        x_t: Float[Tensor, "B n D"],
        t: Level,
        s: Level,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]: ...


def _at(s: Level, estimate: Estimate) -> Tensor:
    return torch.addcmul(s.alpha * estimate.x, s.sigma, estimate.eps)


def _velocity(t: Level, estimate: Estimate) -> Tensor:
    d_alpha, d_sigma = t.rates
    return d_alpha * estimate.x + d_sigma * estimate.eps


@dataclass(frozen=True)
class Euler:
    """`x_s = alpha_s x + sigma_s eps`: DDIM with eta 0, Euler's rule on straight paths."""

    order = 1
    calls = 1
    multistep = False

    def __call__(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        return _at(s, estimate), estimate


@dataclass(frozen=True)
class Heun:
    """The trapezoidal rule on the velocity (Karras et al. 2022, algorithm 1).

    The velocity at s = 0 is not defined for every prediction, so a token's last step is Euler's.
    """

    order = 2
    calls = 2
    multistep = False

    def __call__(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        x_s = _at(s, estimate)
        goes_on = s.t > 0
        if not goes_on.any():
            return x_s, estimate
        slope = _velocity(t, estimate) + _velocity(s, denoise(x_s, s))
        trapezoid = x_t + (s.t - t.t) / 2 * slope
        return trapezoid.where(goes_on, x_s), estimate


@dataclass(frozen=True)
class Multistep:
    """Adams and Bashforth's two-step rule on the velocity, with a history for each token.

    `x_s = x_t + (s - t) [v + (s - t) / (2 (t - t')) (v - v')]`, where a prime marks the row before.
    A token's first step has no history and is Euler's.
    """

    order = 2
    calls = 1
    multistep = True

    def __call__(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        x_s = _at(s, estimate)
        if last is None:
            return x_s, estimate
        v, v_last = _velocity(t, estimate), _velocity(last.t, last.estimate)
        h, h_last = s.t - t.t, t.t - last.t.t
        two_step = x_t + h * (v + h / (2 * h_last) * (v - v_last))
        return two_step.where(h_last < 0, x_s), estimate


@dataclass(frozen=True)
class Ancestral:
    """DDIM with fresh noise: `x_s = alpha_s x + sqrt(sigma_s^2 - c^2) eps + c z`.

    `c = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)`, the standard
    deviation of the posterior `q(x_s | x_t, x)` times eta (Song et al. 2020, eq. 16).

    Args:
        eta: 0 is `Euler`, 1 the ancestral sampler of DDPM; in [0, 1].

    Raises:
        ValueError: if `eta` is out of range.
    """

    eta: float = 1.0
    order = 1
    calls = 1
    multistep = False

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def __call__(
        self,
        denoise: Denoise,
        x_t: Tensor,
        t: Level,
        s: Level,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        forgotten = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
        c = self.eta * s.sigma / t.sigma * forgotten.clamp(min=0).sqrt()
        kept = (s.sigma**2 - c**2).clamp(min=0).sqrt()
        x_s = s.alpha * estimate.x + kept * estimate.eps
        return x_s + c * draw(), estimate
