"""The noise schedule: how much data and how much noise a token holds at a local time.

Conventions of the whole library, stated here once:

- Local time `t` runs from 0 (data) to 1 (noise). A step goes from `t` to `s <= t`. Times belong to
  tokens: shape `[N]` or `[B, N]`, never a scalar, so that a batch can never be taken for channels.
- `x_t = alpha(t) x + sigma(t) eps`, with data `x` in [-1, 1] and unit Gaussian noise `eps`.
- The ends are exact: `alpha(0) = sigma(1) = 1` and `sigma(0) = alpha(1) = 0`.
- `log_snr = 2 log(alpha / sigma)`; the velocity is `dx_t/dt = alpha' x + sigma' eps`.
- `shift` divides `alpha / sigma` at every time, so `shift > 1` spends more of the clock at high
noise
  (Esser et al. 2024, eq. 23; Hoogeboom et al. 2023, eq. 4).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Cosine", "NoiseSchedule", "Rectified"]


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """Signal and noise levels, and their rates, as functions of the local time in [0, 1].

    Args:
        shift: the factor by which `alpha / sigma` is divided, above 0. 1 leaves it as it is.

    Raises:
        ValueError: if `shift` is not a positive finite number.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a positive finite number, got {self.shift}")

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """Signal level, decreasing from 1 to 0."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """Noise level, increasing from 0 to 1."""

    @abstractmethod
    def rates(self, t: Float[Tensor, "*T"]) -> tuple[Float[Tensor, "*T"], Float[Tensor, "*T"]]:
        """The derivatives `(alpha', sigma')` with respect to the time."""

    def log_snr(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """`2 log(alpha / sigma)`: plus infinity at t = 0, minus infinity at t = 1."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def perturb(
        self, x: Float[Tensor, "*B N D"], eps: Float[Tensor, "*B N D"], t: Float[Tensor, "*T N"]
    ) -> Float[Tensor, "*B N D"]:
        """`x_t = alpha(t) x + sigma(t) eps`, each token at its own time."""
        return self.alpha(t)[..., None] * x + self.sigma(t)[..., None] * eps


@dataclass(frozen=True)
class Rectified(NoiseSchedule):
    """Straight lines from data to noise: `alpha = 1 - t`, `sigma = t` at shift 1.

    Liu et al. 2022 (rectified flow), Lipman et al. 2022 (flow matching).
    """

    def _scale(self, t: Tensor) -> Tensor:
        return (1 - t) + self.shift * t

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / self._scale(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / self._scale(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.shift / self._scale(t) ** 2
        return -rate, rate


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """A quarter circle: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)` at shift 1.

    `alpha^2 + sigma^2 = 1` at any shift (Nichol and Dhariwal 2021; Salimans and Ho 2022).
    """

    def _circle(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The sine of the complement, not the cosine: it is exactly 0 at t = 1.
        c, q = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
        return c, q, (c**2 + (self.shift * q) ** 2).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        c, _, norm = self._circle(t)
        return c / norm

    def sigma(self, t: Tensor) -> Tensor:
        _, q, norm = self._circle(t)
        return self.shift * q / norm

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        c, q, norm = self._circle(t)
        rate = math.pi / 2 * self.shift / norm**3
        return -rate * self.shift * q, rate * c
