"""Which local times training shows: one time per group, several laws, and a mixture of them.

A law draws `[B, G]` times for examples with `num_groups` groups each. What the context looks like
matters more than the number of groups (xAR, table 6), and independent times alone almost never
show a nearly clean or nearly noisy whole image, so the default is a mixture. Every draw is
stratified over the batch: the i-th of B shuffled strata holds one number. Times of exactly 0
(clean context) and 1 (waiting) carry no loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.schedule import clock

__all__ = [
    "CleanContext",
    "Independent",
    "LogitNormal",
    "Mixture",
    "OnSchedule",
    "Shared",
    "Times",
    "Uniform",
]


def _strata(batch: int, width: int, generator: torch.Generator | None) -> Float[Tensor, "B G"]:
    """Uniform numbers in (0, 1), each column stratified over the batch."""
    ranks = torch.rand(batch, width, generator=generator).argsort(dim=0)
    u = (ranks + torch.rand(batch, width, generator=generator)) / batch
    # Rounding may reach 1, which would turn a moving token into a waiting one.
    return u.clamp(1e-6, 1 - 1e-6)


@runtime_checkable
class Density(Protocol):
    """The law of one time, by its quantile function on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """`t` uniform on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """`log(t / (1 - t))` Gaussian with `mean` and `std` (Esser et al. 2024, §3.1).

    A negative mean shows more data, a positive one more noise.
    """

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        z = self.mean + self.std * torch.special.ndtri(u)
        return torch.sigmoid(z).clamp(1e-6, 1 - 1e-6)


@runtime_checkable
class Times(Protocol):
    """A law of group times."""

    @property
    def overlaps(self) -> tuple[float, float]:
        """The overlaps, from … to, at which decoding finds the states that training showed."""
        ...

    def __call__(
        self, num_groups: Int[Tensor, " B"], width: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B G"]:
        """Draw times for `width` groups; an example uses its first `num_groups`."""
        ...


@dataclass(frozen=True)
class Independent:
    """Every group has a time of its own (Diffusion Forcing, xAR)."""

    density: Density = Uniform()
    overlaps = (0.0, 1.0)

    def __call__(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.density.quantile(_strata(len(num_groups), width, generator))


@dataclass(frozen=True)
class Shared:
    """All groups have the same time: ordinary diffusion, and overlap 1."""

    density: Density = Uniform()
    overlaps = (1.0, 1.0)

    def __call__(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        t = self.density.quantile(_strata(len(num_groups), 1, generator))
        return t.expand(-1, width)


@dataclass(frozen=True)
class CleanContext:
    """Groups before a random one are clean, the others have independent times.

    The random group sees exactly what decoding at overlap 0 shows it; those after it still learn.
    """

    density: Density = Uniform()
    overlaps = (0.0, 0.0)

    def __call__(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        u = _strata(len(num_groups), width + 1, generator)
        first = (u[:, 0] * num_groups).floor()
        t = self.density.quantile(u[:, 1:])
        return t.where(torch.arange(width) >= first[:, None], 0.0)


@dataclass(frozen=True)
class OnSchedule:
    """Times met while decoding: the continuous clock at a uniform progress, at a random overlap."""

    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most <= 1:
            raise ValueError(
                f"least and most must keep 0 <= least <= most <= 1, got {self.least}, {self.most}"
            )

    @property
    def overlaps(self) -> tuple[float, float]:
        return self.least, self.most

    def __call__(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        u, v = _strata(len(num_groups), 2, generator).unbind(-1)
        overlap = self.least + (self.most - self.least) * v
        return clock(u, num_groups, overlap, width=width)


@dataclass(frozen=True)
class Mixture:
    """Each example draws its law: component `i` with probability `weights[i] / sum(weights)`.

    Raises:
        ValueError: if there are not as many weights as laws, or the weights are not positive.
    """

    laws: Sequence[Times]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "laws", tuple(self.laws))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.laws or len(self.laws) != len(self.weights):
            raise ValueError(
                f"weights must name one number per law, got {len(self.weights)} for "
                f"{len(self.laws)} laws"
            )
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError(f"weights must be positive, got {self.weights}")

    @property
    def overlaps(self) -> tuple[float, float]:
        spans = [law.overlaps for law in self.laws]
        return min(a for a, _ in spans), max(b for _, b in spans)

    def __call__(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        edges = torch.tensor(self.weights).cumsum(0)
        u = _strata(len(num_groups), 1, generator)[:, 0]
        choice = torch.searchsorted(edges / edges[-1], u).clamp(max=len(self.laws) - 1)
        drawn = torch.stack([law(num_groups, width, generator) for law in self.laws])
        return drawn[choice, torch.arange(len(num_groups))]
