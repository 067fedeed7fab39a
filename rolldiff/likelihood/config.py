"""How a likelihood is computed, and what comes out."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.diffusion.process import NoiseSchedule
from rolldiff.errors import UsageError, finite_number, shown, whole_number

__all__ = ["Likelihood", "LikelihoodConfig", "check_levels"]

Method = Literal["ode", "bound"]
Dequantization = Literal["uniform", "truncated_normal", "discretised"]
Divergence = Literal["auto", "exact", "hutchinson"]

LEVEL_WIDTHS = 3.0  # standard deviations of the noise at the first time, to half a level
EXACT_PRODUCTS = 64  # up to so many products, divergence="auto" is exact
MAX_SAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How a likelihood is computed.

    Args:
        method: `ode` for the value of the probability-flow equation, `bound` for the variational
            bound, which takes far fewer calls.
        dequantization: from the density of continuous data to the probability of `levels`:
            `uniform`, `truncated_normal` (of the ODE), `discretised` (of the bound), or None for
            the density itself. The last two are tight for a network that tells the levels apart.
            For one whose density is smooth over a level they lose `log 6 - log(2 pi e) / 2` nats,
            0.54 bits, per dimension.
        levels: `L`, the values of a pixel, `-1 + 2 k / (L - 1)`.
        samples: importance samples of the ODE, at most 10,000: `log (1/K) sum_k p_k / q_k`. Of the
            bound, calls: noise levels times the offsets of the windows, rounded up.
        divergence: `exact`, `hutchinson` (with random signs), or `auto`: exact up to 64 products.
        probes: Hutchinson's, per sample.
        tolerance: of the ODE's solver, in bits per dimension: its number of steps is doubled until
            the change by the last doubling is below. None takes `steps` of the `DecodeConfig` as
            they are.
        t_min: the local time `s` next to the data. None has half a level at three standard
            deviations of the noise, or is 0.001 for continuous data.

    Raises:
        UsageError: if a setting is out of range.
    """

    method: Method = "ode"
    dequantization: Dequantization | None = "uniform"
    levels: int = 256
    samples: int = 1
    divergence: Divergence = "auto"
    probes: int = 1
    tolerance: float | None = 1e-2
    t_min: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("divergence", Divergence)):
            _one_of(getattr(self, name), name, get_args(kind))
        if self.dequantization is not None:
            narrow = "truncated_normal" if self.method == "ode" else "discretised"
            allowed = ("uniform", narrow, None)
            _one_of(self.dequantization, f"dequantization with {self.method}", allowed)
        levels = whole_number(self.levels, "levels", minimum=2, maximum=2**16)
        object.__setattr__(self, "levels", levels)
        for name in ("samples", "probes"):
            number = whole_number(getattr(self, name), name, maximum=MAX_SAMPLES)
            object.__setattr__(self, name, number)
        if self.tolerance is not None:
            tolerance = finite_number(self.tolerance, "tolerance", minimum=1e-9)
            object.__setattr__(self, "tolerance", tolerance)
        if self.t_min is not None:
            t_min = finite_number(self.t_min, "t_min", minimum=1e-6, maximum=0.5)
            object.__setattr__(self, "t_min", t_min)

    @property
    def metric(self) -> str:
        """The name of the bits per dimension in a benchmark."""
        return f"bits_per_dim_{self.method}"

    @property
    def spacing(self) -> float:
        """`2 / (L - 1)`, the distance between two levels."""
        return 2 / (self.levels - 1)

    def first_time(self, noise: NoiseSchedule) -> float:
        """`s`, the local time next to the data."""
        if self.t_min is not None:
            return self.t_min
        if self.dequantization is None:
            return 1e-3
        half = self.spacing / 2
        log_snr = torch.tensor(2 * math.log(LEVEL_WIDTHS / half), dtype=torch.float64)
        return float(noise.time(log_snr))


def _one_of(value: object, name: str, allowed: tuple[Any, ...]) -> None:
    """Refuse what is not among the values that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(
            f"{name} must be one of {', '.join(map(str, allowed))}, got {shown(value)}"
        )


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of images.

    Attributes:
        bits_per_dim: `[B]`, `-log2 p / D`; of the density of values in [-1, 1] without
            dequantisation.
        nats: `[B]`, `log p`.
        standard_error: `[B]`, of the bits per dimension over the samples and the probes; NaN for a
            single one, 0 if nothing was drawn.
        solver_error: `[B]`, of the bits per dimension: the difference to half the steps, which is
            more than the error of a method that converges at first order or faster; NaN if there is
            no estimate.
        nfe: network calls in series.
        products: vector-Jacobian products in series.
        seconds: wall-clock time.
        divergence: `exact` or `hutchinson`; None for the bound.
        config: the settings.
    """

    bits_per_dim: Float[Tensor, " B"]
    nats: Float[Tensor, " B"]
    standard_error: Float[Tensor, " B"]
    solver_error: Float[Tensor, " B"]
    nfe: int
    products: int
    seconds: float
    divergence: str | None
    config: LikelihoodConfig


def check_levels(image: Tensor, levels: int) -> None:
    """Refuse values between the levels.

    Raises:
        UsageError: if there are some.
    """
    k = (image.double() + 1) * (levels - 1) / 2
    distance = (k - k.round()).abs().max()
    if distance > 0.01:
        raise UsageError(
            f"image must hold {levels} levels -1 + 2 k / {levels - 1}, got values up to "
            f"{float(distance):.2g} of a level away from one; set levels to their number, or "
            "dequantization=None for the density of continuous data"
        )
