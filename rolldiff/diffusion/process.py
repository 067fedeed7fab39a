"""The Gaussian process: how noise is added to a token, and what a prediction says about it.

Conventions of the whole library:

- Local time `t` runs from 0 (data) to 1 (noise). A solver goes from `t` to `s <= t`. Every token
  has its own time: shape `[N]` or `[B, N]`, never a scalar, so that no batch is mistaken for
  channels.
- `x_t = alpha(t) x + sigma(t) eps`, with data `x` in [-1, 1] and unit Gaussian noise `eps`.
- The ends are exact: `alpha(0) = sigma(1) = 1` and `sigma(0) = alpha(1) = 0`. `LinearBeta` alone
  leaves 0.6 % of the signal at t = 1, as the networks that it is for were trained.
- `log_snr = 2 log(alpha / sigma)`; the velocity is `dx_t/dt = alpha' x + sigma' eps`.

A network predicts a fixed combination of data and noise, `y = a x + b eps`:

    x: (1, 0)     eps: (0, 1)     v: (-sigma, alpha)     velocity: (alpha', sigma')

Together with `x_t` this is a 2 x 2 linear system with determinant `det = alpha b - sigma a`:

    x = (b x_t - sigma y) / det,        eps = (alpha y - a x_t) / det.

An error `dy` of the prediction keeps `alpha dx + sigma deps = 0`. In the space of another
prediction `z` it is therefore `(det_z / det_y) dy`: the space of the loss is only a weight.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rolldiff.errors import UsageError, finite_number, shown, whole_number

__all__ = [
    "Cosine",
    "Estimate",
    "Inverse",
    "LinearBeta",
    "LossSpace",
    "NoiseSchedule",
    "PerSampleNoise",
    "Prediction",
    "Rectified",
    "Shard",
    "coefficients",
    "denoising_loss",
    "inverse",
    "loss_weight",
    "seed_sequence",
    "to_x_eps",
]

# The loss weight is held constant closer than this to t = 0 and t = 1, because the ratio of two
# determinants may have a pole at an end (Li and He 2025 clip at the same value).
T_CLIP = 0.05
T_FIRST = 1e-8  # where rates that are infinite at t = 0 are taken

MAX_SEED = 2**128 - 1
MAX_IMAGES = 2**20  # of one decoding: each has a generator, of 5 kB

Prediction = Literal["x", "eps", "v", "velocity"]
LossSpace = Literal["x", "eps", "v", "velocity", "bound"]


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """Signal and noise levels, and their derivatives, as functions of the local time in [0, 1].

    Args:
        shift: `alpha / sigma` is divided by this factor, in [0.001, 1000], at every time. A factor
            above 1 spends more of the time at high noise (Esser et al. 2024, eq. 23; Hoogeboom et
            al. 2023, eq. 4).

    Raises:
        UsageError: if `shift` is out of range.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        shift = finite_number(self.shift, "shift", minimum=1e-3, maximum=1e3)
        object.__setattr__(self, "shift", shift)

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """Signal level, decreasing from 1 to 0."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """Noise level, increasing from 0 to 1."""

    @abstractmethod
    def rates(self, t: Float[Tensor, "*T"]) -> tuple[Float[Tensor, "*T"], Float[Tensor, "*T"]]:
        """The time derivatives `(alpha', sigma')`."""

    def log_snr(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """`2 log(alpha / sigma)`: plus infinity at t = 0, minus infinity at t = 1."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_slope(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """`-d log_snr / dt`, which is positive: the log-SNR falls."""
        d_alpha, d_sigma = self.rates(t)
        return 2 * (d_sigma / self.sigma(t) - d_alpha / self.alpha(t))

    def time(self, log_snr: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
        """The inverse of `log_snr`, by bisection."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(64):
            middle = (low + high) / 2
            later = self.log_snr(middle) > log_snr
            low, high = middle.where(later, low), high.where(later, middle)
        return (low + high) / 2

    def add_noise(
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
        # The sine of the complement is exactly 0 at t = 1; the cosine is not.
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


@dataclass(frozen=True)
class LinearBeta(NoiseSchedule):
    """The schedule of DDPM and DiT: every step adds noise of a variance that rises linearly.

    After `n = T t` steps `alpha^2 = (1 - beta_0) ... (1 - beta_{n-1})` and `sigma^2 = 1 - alpha^2`
    at shift 1, with `beta_i` from `beta_start` to `beta_end` (Ho et al. 2020, §2 and §4). Between
    whole numbers of steps the logarithm is continued by the Euler–Maclaurin formula, which agrees
    with the sum to rounding. A network that numbers its timesteps from 0 is at timestep `T t - 1`.

    `alpha(1)` is not 0 but 0.0064, as these networks were trained. A decoding begins with pure
    noise all the same, as DDPM's does.

    Args:
        shift: see `NoiseSchedule`.
        beta_start: variance of the first step, in (0, beta_end).
        beta_end: variance of the last step, at most 0.1.
        num_timesteps: `T`, in 100 … 100,000.

    Raises:
        UsageError: if a number is out of range.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = whole_number(self.num_timesteps, "num_timesteps", minimum=100, maximum=100_000)
        end = finite_number(self.beta_end, "beta_end", minimum=1e-9, maximum=0.1)
        start = finite_number(self.beta_start, "beta_start", minimum=1e-10, maximum=end)
        if start == end:
            raise UsageError(f"beta_start must be below beta_end, got {start} and {end}")
        for name, value in (("num_timesteps", steps), ("beta_end", end), ("beta_start", start)):
            object.__setattr__(self, name, value)

    def _log_product(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`log(alpha^2)` at shift 1 and its derivative by `t`, in float64.

        With `u_i = 1 - beta_i`, falling by `d` a step, the sum of `log u_i` over `i < n` is
        `int_0^n log u + (log u_0 - log u_n) / 2 + (d / u_0 - d / u_n) / 12` up to terms in `d^3`.
        """
        d = (self.beta_end - self.beta_start) / (self.num_timesteps - 1)
        beta = self.beta_start + d * self.num_timesteps * t.double()
        first = torch.full_like(beta, self.beta_start)

        def integral(beta: Tensor) -> Tensor:  # of log u; 0 at beta = 0, for the sake of precision
            return -((1 - beta) * torch.log1p(-beta) + beta) / d

        u, u_0, log_u, log_u_0 = 1 - beta, 1 - first, torch.log1p(-beta), torch.log1p(-first)
        log = integral(beta) - integral(first) + (log_u_0 - log_u) / 2 + (d / u_0 - d / u) / 12
        rate = log_u + d / u / 2 - (d / u) ** 2 / 12
        return log, self.num_timesteps * rate

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signal and noise at shift 1, and the factor that keeps `alpha^2 + sigma^2 = 1`."""
        log, _ = self._log_product(t)
        signal, noise = (log / 2).exp(), torch.expm1(log).abs().sqrt()
        return signal, noise, (signal**2 + (self.shift * noise) ** 2).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        signal, _, norm = self._levels(t)
        return (signal / norm).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        _, noise, norm = self._levels(t)
        return (self.shift * noise / norm).to(t.dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # signal' = slope signal / 2 and noise' = -slope signal^2 / (2 noise), which is infinite at
        # t = 0. A finite number there spoils no gradient of a loss that masks such tokens.
        t = t.clamp(min=T_FIRST)
        _, slope = self._log_product(t)
        signal, noise, norm = self._levels(t)
        d_alpha = slope / 2 * self.shift**2 * signal / norm**3
        d_sigma = -slope / 2 * self.shift * signal**2 / noise / norm**3
        return d_alpha.to(t.dtype), d_sigma.to(t.dtype)


class Estimate(NamedTuple):
    """The posterior means `E[x | x_t]` and `E[eps | x_t]` of some tokens."""

    x: Tensor
    eps: Tensor


class Inverse(NamedTuple):
    """`(x, eps) = from_x_t x_t + from_y y`; data and noise are stacked along the first axis."""

    from_x_t: Float[Tensor, "2 *T"]
    from_y: Float[Tensor, "2 *T"]


def coefficients(
    prediction: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"]
) -> tuple[Float[Tensor, "*T"], Float[Tensor, "*T"]]:
    """`(a, b)` of the prediction `y = a x + b eps` at the times `t`.

    Raises:
        UsageError: if there is no such prediction.
    """
    match prediction:
        case "x":
            return t.new_ones(t.shape), t.new_zeros(t.shape)
        case "eps":
            return t.new_zeros(t.shape), t.new_ones(t.shape)
        case "v":
            return -noise.sigma(t), noise.alpha(t)
        case "velocity":
            return noise.rates(t)
    raise UsageError(
        f"prediction must be one of {', '.join(get_args(Prediction))}, got {shown(prediction)}"
    )


def _determinant(prediction: Prediction, noise: NoiseSchedule, t: Tensor) -> Tensor:
    a, b = coefficients(prediction, noise, t)
    return noise.alpha(t) * b - noise.sigma(t) * a


def inverse(prediction: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"]) -> Inverse:
    """The inverse of the 2 x 2 system at the times `t`.

    At t = 0 the system does not determine the noise: the result is not finite, and the caller masks
    it. At t = 1 a prediction of the noise does not determine the data: the estimate is 0, the
    middle of the data's range.
    """
    a, b = coefficients(prediction, noise, t)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    det = alpha * b - sigma * a
    from_x_t, from_y = torch.stack([b, -a]) / det, torch.stack([-sigma, alpha]) / det
    if prediction == "x":  # exact, also where the determinant is 0
        from_x_t[0], from_y[0] = 0, 1
    if prediction == "eps":
        from_x_t[0], from_y[0] = (c[0].where(alpha > 0, 0.0) for c in (from_x_t, from_y))
        from_x_t[1], from_y[1] = 0, 1
    return Inverse(from_x_t, from_y)


def to_x_eps(y: Float[Tensor, "B N D"], x_t: Float[Tensor, "B N D"], by: Inverse) -> Estimate:
    """Data and noise from a network's prediction `y`.

    Args:
        y: the prediction.
        x_t: what the network was shown.
        by: the inverse at the tokens' times `[1, N, 1]`: data and noise are stacked in front.
    """
    return Estimate(*torch.addcmul(by.from_x_t * x_t, by.from_y, y).unbind(0))


def loss_weight(
    prediction: Prediction, noise: NoiseSchedule, t: Float[Tensor, "*T"], *, space: LossSpace
) -> Float[Tensor, "*T"]:
    """`(det_space / det_prediction)^2`: a squared error of `prediction` in the space of another.

    In the space `bound` it is the integrand of the variational bound, `|lambda'| / 2` times the
    error of the noise (Kingma et al. 2021, VDM, eq. 15).
    """
    if space == "bound":
        return noise.log_snr_slope(t) / 2 * loss_weight(prediction, noise, t, space="eps")
    return (_determinant(space, noise, t) / _determinant(prediction, noise, t)) ** 2


def denoising_loss(
    y: Float[Tensor, "B N D"],
    x: Float[Tensor, "B N D"],
    eps: Float[Tensor, "B N D"],
    *,
    t: Float[Tensor, "B N"],
    moving: Bool[Tensor, "B N"],
    noise: NoiseSchedule,
    prediction: Prediction,
    space: LossSpace,
    count: float | None = None,
) -> Float[Tensor, ""]:
    """The mean squared error of a prediction over the moving tokens, in a given space.

    All other tokens are context and carry no loss. `count` is what the sum is divided by, instead
    of the number of moving tokens here.
    """
    a, b = (c[..., None] for c in coefficients(prediction, noise, t))
    error = (y - (a * x + b * eps)).square().mean(-1)
    weight = loss_weight(prediction, noise, t.clamp(T_CLIP, 1 - T_CLIP), space=space)
    divisor = moving.sum().clamp(min=1) if count is None else max(count, 1)
    return (weight * error).where(moving, 0.0).sum() / divisor


@dataclass(frozen=True)
class Shard:
    """Which rows of a global batch a process holds: part `index` of `count` equal ones.

    Args:
        index: 0 … count - 1.
        count: the number of processes.

    Raises:
        UsageError: if a number is out of range.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        count = whole_number(self.count, "count")
        whole_number(self.index, "index", minimum=0, maximum=count - 1)

    def rows(self, x: Tensor) -> Tensor:
        """The rows `[B, ...]` of this process, of those of all processes, `[count B, ...]`."""
        return x.chunk(self.count)[self.index]


class PerSampleNoise:
    """Independent unit noise for the samples `start_index … start_index + batch - 1` of a seed.

    Sample `i` of a seed is the same alone, in any batch and on any number of processes: its
    generator is seeded by the pair (seed, i), and draws on the CPU (as in EDM2). No two pairs share
    their noise.

    Args:
        seed: a whole number of 0 or more, below 2^128; a generator, which then draws the seed; or
            None for a seed from torch's global generator.
        batch: number of samples, at most 2^20.
        start_index: index of the first sample, below 2^64.

    Attributes:
        seed: the seed, given or drawn.

    Raises:
        UsageError: if a number is out of range or not a whole number.
    """

    def __init__(
        self, seed: int | torch.Generator | None, batch: int, *, start_index: int = 0
    ) -> None:
        if seed is None or isinstance(seed, torch.Generator):
            device = seed.device if seed is not None else None
            seed = int(torch.randint(2**62, (1,), generator=seed, device=device))
        self.seed = seed = whole_number(seed, "seed", minimum=0, maximum=MAX_SEED)
        start = whole_number(start_index, "start_index", minimum=0, maximum=2**64 - 1)
        batch = whole_number(batch, "num_images", maximum=MAX_IMAGES)
        # SeedSequence mixes the pair well; neighbouring seeds of a Mersenne twister are correlated.
        states = (
            seed_sequence(seed, start + i).generate_state(1, np.uint64)[0] for i in range(batch)
        )
        self._generators = [torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in states]

    @classmethod
    def joined(cls, parts: Iterable["PerSampleNoise"]) -> "PerSampleNoise":
        """The samples of several seeds in one batch; `seed` is that of the first."""
        joined = copy.copy((parts := list(parts))[0])
        joined._generators = [generator for part in parts for generator in part._generators]
        return joined

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, *shape: int) -> Tensor:
        """Unit noise `[batch, *shape]` in float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in (0, 1), `[batch, *shape]`, in float64 on the CPU."""
        u = [torch.rand(shape, generator=g, dtype=torch.float64) for g in self._generators]
        return torch.stack(u).clamp(min=2.0**-53)


def seed_sequence(seed: int, *key: int) -> np.random.SeedSequence:
    """A sequence of its own for every seed and key.

    A sequence is a function of its 32-bit words, without a mark between two numbers. Seed and key
    are therefore unambiguous only for seeds of one word; for all others, numpy fills the seed up to
    four words before it appends the key.

    Args:
        seed: 0 or more.
        *key: numbers of 0 or more, such as the index of a sample.
    """
    if seed < 2**32:
        return np.random.SeedSequence((seed, *key))
    return np.random.SeedSequence(seed, spawn_key=key)
