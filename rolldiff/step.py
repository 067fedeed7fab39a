"""Solver steps: from the times `t` to the times `s <= t`, token by token.

A step sees only the moving span and never the global time. It asks `denoise(x_t, t)` for an
`Estimate`, and returns the tokens at `s` with the estimate made at `t`. `order` is the order of its
global error in `1 / S` for smooth data (fitted by the tests), `calls` the network calls of a step.
All of them start from the probability-flow equation `dx_t/dt = alpha' x + sigma' eps`, whose exact
solution for a constant estimate is `x_s = alpha_s x + sigma_s eps` (DDIM; Song et al. 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate

__all__ = ["Ancestral", "Euler", "Heun", "Last", "Multistep", "Step"]

Denoise = Callable[[Tensor, Tensor], Estimate]
Draw = Callable[[], Tensor]


class Last(NamedTuple):
    """What the row before knew of the same tokens: its estimate and its times.

    A token that had not started then has the same time in both rows.
    """

    estimate: Estimate
    t: Tensor


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
        noise: NoiseSchedule,
        x_t: Float[Tensor, "B n D"],
        t: Float[Tensor, " n"],
        s: Float[Tensor, " n"],
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]: ...


def _velocity(noise: NoiseSchedule, estimate: Estimate, t: Tensor) -> Tensor:
    d_alpha, d_sigma = noise.rates(t[:, None])
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
        noise: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        return noise.perturb(estimate.x, estimate.eps, s), estimate


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
        noise: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        x_s = noise.perturb(estimate.x, estimate.eps, s)
        goes_on = s > 0
        if not goes_on.any():
            return x_s, estimate
        slope = _velocity(noise, estimate, t) + _velocity(noise, denoise(x_s, s), s)
        trapezoid = x_t + (s - t)[:, None] / 2 * slope
        return trapezoid.where(goes_on[:, None], x_s), estimate


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
        noise: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        x_s = noise.perturb(estimate.x, estimate.eps, s)
        if last is None:
            return x_s, estimate
        v, v_last = _velocity(noise, estimate, t), _velocity(noise, last.estimate, last.t)
        h, h_last = (s - t)[:, None], (t - last.t)[:, None]
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
        noise: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        last: Last | None = None,
        draw: Draw,
    ) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, t)
        alpha_t, sigma_t = noise.alpha(t), noise.sigma(t)
        alpha_s, sigma_s = noise.alpha(s), noise.sigma(s)
        forgotten = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        c = self.eta * sigma_s / sigma_t * forgotten.clamp(min=0).sqrt()
        kept = (sigma_s**2 - c**2).clamp(min=0).sqrt()
        x_s = alpha_s[:, None] * estimate.x + kept[:, None] * estimate.eps
        return x_s + c[:, None] * draw(), estimate
