"""Local times for training: one per group, drawn by one of several samplers or a mixture of them.

A sampler draws `[B, G]` times for examples with `num_groups` groups each. The state of the context
matters more than the number of groups (xAR, table 6), and independent times almost never show a
nearly clean or nearly noisy whole image, so the default is a mixture. All draws are stratified over
the batch: each of the B strata of (0, 1) holds one number. Times of exactly 0 (clean context) and 1
(waiting) carry no loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.diffusion.schedule import GroupSchedule, Order, check_order, decode_order
from rolldiff.errors import (
    UsageError,
    finite_number,
    instance,
    sequence,
    whole_number,
    whole_numbers,
)

__all__ = [
    "CleanContext",
    "GroupTimes",
    "Independent",
    "LogitNormal",
    "Mixture",
    "OnSchedule",
    "Shared",
    "TimestepSampler",
    "TrainingDistribution",
    "Uniform",
    "local_times",
]


@dataclass(frozen=True)
class Uniform:
    """`t` uniform on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """`log(t / (1 - t))` Gaussian with `mean` and `std` (Esser et al. 2024, §3.1).

    A negative mean draws times nearer to the data, a positive mean nearer to the noise.

    Raises:
        UsageError: if a number is not finite, or `std` is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", finite_number(self.mean, "mean"))
        object.__setattr__(self, "std", finite_number(self.std, "std", minimum=0))
        if self.std == 0:
            raise UsageError(f"std must be above 0, got {self.std}")

    def quantile(self, u: Tensor) -> Tensor:
        z = self.mean + self.std * torch.special.ndtri(u)
        return torch.sigmoid(z).clamp(1e-6, 1 - 1e-6)


Density = Uniform | LogitNormal

MAX_SETTINGS, MAX_ENTRIES = 4096, 2**24  # orders or group counts, and numbers in their tables


def _check_density(density: object) -> None:
    instance(density, Density, "density", "Uniform() or LogitNormal()")


class TimestepSampler(ABC):
    """A distribution of group times.

    Attributes:
        overlaps: the range of overlaps at which decoding meets the states seen in training.
    """

    overlaps: tuple[float, float]

    @abstractmethod
    def sample(
        self,
        num_groups: Int[Tensor, " B"],
        width: int,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B G"]:
        """Draw times for `width` groups; an example uses its first `num_groups`."""


@dataclass(frozen=True)
class Independent(TimestepSampler):
    """Every group has its own time (Diffusion Forcing, xAR)."""

    density: Density = Uniform()
    overlaps = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_density(self.density)

    def sample(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.density.quantile(_strata(len(num_groups), width, generator))


@dataclass(frozen=True)
class Shared(TimestepSampler):
    """All groups share one time, as in ordinary diffusion and at overlap 1."""

    density: Density = Uniform()
    overlaps = (1.0, 1.0)

    def __post_init__(self) -> None:
        _check_density(self.density)

    def sample(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        t = self.density.quantile(_strata(len(num_groups), 1, generator))
        return t.expand(-1, width)


@dataclass(frozen=True)
class CleanContext(TimestepSampler):
    """The groups before a random one are clean; it and those after it have independent times.

    The random group is in exactly the state that decoding at overlap 0 meets. The groups after it
    carry a loss too.
    """

    density: Density = Uniform()
    overlaps = (0.0, 0.0)

    def __post_init__(self) -> None:
        _check_density(self.density)

    def sample(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        u = _strata(len(num_groups), width + 1, generator)
        first = (u[:, 0] * num_groups).floor()
        t = self.density.quantile(u[:, 1:])
        return t.where(torch.arange(width) >= first[:, None], 0.0)


@dataclass(frozen=True)
class OnSchedule(TimestepSampler):
    """The times of decoding: a uniform fraction of the schedule, at a uniform overlap.

    Args:
        min_overlap: the smallest overlap drawn.
        max_overlap: the largest.

    Raises:
        UsageError: unless `0 <= min_overlap <= max_overlap <= 1`.
    """

    min_overlap: float = 0.0
    max_overlap: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_overlap", "max_overlap"):
            overlap = finite_number(getattr(self, name), name, minimum=0, maximum=1)
            object.__setattr__(self, name, overlap)
        if self.min_overlap > self.max_overlap:
            raise UsageError(
                "min_overlap and max_overlap must keep 0 <= min_overlap <= max_overlap <= 1, got "
                f"{self.min_overlap}, {self.max_overlap}"
            )
        object.__setattr__(self, "overlaps", (self.min_overlap, self.max_overlap))

    def sample(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        u, v = _strata(len(num_groups), 2, generator).unbind(-1)
        overlap = self.min_overlap + (self.max_overlap - self.min_overlap) * v
        return local_times(u, num_groups, overlap, width=width)


@dataclass(frozen=True)
class Mixture(TimestepSampler):
    """Each example draws its sampler: component `i` with probability `weights[i] / sum(weights)`.

    Raises:
        UsageError: if the numbers of samplers and weights differ, or a weight is not positive.
    """

    samplers: Sequence[TimestepSampler]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        samplers = sequence(self.samplers, "samplers", "samplers such as Shared()")
        weights = sequence(self.weights, "weights", "numbers above 0")
        for sampler in samplers:
            instance(sampler, TimestepSampler, "each of samplers", "a sampler such as Shared()")
        numbers = tuple(finite_number(w, "each of weights", minimum=0) for w in weights)
        if not samplers or len(samplers) != len(numbers):
            raise UsageError(
                f"weights must hold one number per sampler, got {len(numbers)} for "
                f"{len(samplers)} samplers"
            )
        if min(numbers) == 0:
            raise UsageError(f"weights must be above 0, got {numbers}")
        object.__setattr__(self, "samplers", tuple(samplers))
        object.__setattr__(self, "weights", numbers)
        low, high = zip(*(sampler.overlaps for sampler in self.samplers), strict=True)
        object.__setattr__(self, "overlaps", (min(low), max(high)))

    def sample(
        self, num_groups: Tensor, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        edges = torch.tensor(self.weights).cumsum(0)
        u = _strata(len(num_groups), 1, generator)[:, 0]
        choice = torch.searchsorted(edges / edges[-1], u).clamp(max=len(self.samplers) - 1)
        t = torch.stack([s.sample(num_groups, width, generator) for s in self.samplers])
        return t[choice, torch.arange(len(num_groups))]


MIXTURE = Mixture((Independent(), CleanContext(), Shared(), OnSchedule()), (0.3, 0.4, 0.2, 0.1))


class GroupTimes(NamedTuple):
    """What training draws for a batch; tokens are in decode order."""

    order: Int[Tensor, "B N"]
    group: Int[Tensor, "B N"]
    t: Float[Tensor, "B N"]


@dataclass(frozen=True)
class TrainingDistribution:
    """The settings that one set of weights is trained for; each example draws its own.

    Args:
        num_groups: the group counts, drawn uniformly.
        orders: the decode orders, drawn uniformly.
        times: the distribution of the local times.
        drop_cond: the probability of dropping the condition, for guidance; in [0, 1].

    Raises:
        UsageError: if a set is empty or a number is out of range.
    """

    num_groups: Sequence[int] = (1,)
    orders: Sequence[Order] = ("top_to_bottom",)
    times: TimestepSampler = MIXTURE
    drop_cond: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_groups", whole_numbers(self.num_groups, "num_groups"))
        if not self.num_groups:
            raise UsageError("num_groups must hold at least one number, got none")
        orders = sequence(self.orders, "orders", "decode orders")
        if not orders:
            raise UsageError("orders must hold at least one order, got none")
        if max(len(orders), len(self.num_groups)) > MAX_SETTINGS:
            raise UsageError(
                f"num_groups and orders must hold at most {MAX_SETTINGS} each, got "
                f"{len(self.num_groups)} and {len(orders)}"
            )
        plain = tuple(check_order(order, "each of orders") for order in orders)
        object.__setattr__(self, "orders", plain)
        instance(self.times, TimestepSampler, "times", "a sampler such as Independent()")
        drop_cond = finite_number(self.drop_cond, "drop_cond", minimum=0, maximum=1)
        object.__setattr__(self, "drop_cond", drop_cond)

    def tables(
        self, coords: Float[Tensor, "N 3"]
    ) -> tuple[Int[Tensor, "orders N"], Int[Tensor, "counts N"]]:
        """Every decode order, and for every group count the group of each token in decode order.

        Raises:
            UsageError: if an order or a group count does not fit the tokens, or there are so many
                that their tables would have more than 2^24 entries.
        """
        if len(coords) * (len(self.orders) + len(self.num_groups)) > MAX_ENTRIES:
            raise UsageError(
                f"num_groups and orders must hold at most {MAX_ENTRIES // len(coords)} settings "
                f"for {len(coords)} tokens, got {len(self.num_groups)} and {len(self.orders)}"
            )
        orders = [decode_order(order, coords) for order in self.orders]
        groups = [
            GroupSchedule(num_tokens=len(coords), num_groups=g).group for g in self.num_groups
        ]
        return torch.stack(orders), torch.stack(groups)

    def sample(
        self,
        batch: int,
        tables: tuple[Int[Tensor, "orders N"], Int[Tensor, "counts N"]],
        generator: torch.Generator | None = None,
    ) -> GroupTimes:
        """Draw an order, a group count and local times for each example, on the CPU.

        Args:
            batch: number of examples.
            tables: what `tables` returned, on any device.
            generator: a CPU generator; None uses torch's own.
        """
        batch = whole_number(batch, "batch")
        orders, groups = tables
        count = torch.randint(len(self.num_groups), (batch,), generator=generator)
        order = torch.randint(len(self.orders), (batch,), generator=generator)
        num_groups = torch.tensor(self.num_groups)[count]
        t = self.times.sample(num_groups, max(self.num_groups), generator)
        group = groups[count.to(groups.device)]
        return GroupTimes(
            orders[order.to(orders.device)], group, t.to(groups.device).gather(1, group)
        )


def _strata(batch: int, width: int, generator: torch.Generator | None) -> Float[Tensor, "B G"]:
    """Uniform numbers in (0, 1), each column stratified over the batch."""
    ranks = torch.rand(batch, width, generator=generator).argsort(dim=0)
    u = (ranks + torch.rand(batch, width, generator=generator)) / batch
    # Rounding may reach 1, which would turn a moving token into a waiting one.
    return u.clamp(1e-6, 1 - 1e-6)


def local_times(
    u: Float[Tensor, " B"], num_groups: Tensor, overlap: Tensor, *, width: int
) -> Float[Tensor, "B G"]:
    """The local times of `width` groups at the fraction `u` of a decoding, in continuous time.

        t_g(u) = clip(1 - (P u - g (1 - o)), 0, 1),      P = 1 + (G - 1)(1 - o)

    for the group `g` of `G = num_groups` and the overlap `o`: the limit of the scheduling matrix
    for many steps. Groups beyond an example's own `num_groups` wait at time 1.
    """
    g = torch.arange(width, device=u.device)
    lag = (1 - overlap)[:, None]
    elapsed = u[:, None] * (1 + (num_groups[:, None] - 1) * lag)
    t = (1 - (elapsed - g * lag)).clamp(0, 1)
    return t.where(g < num_groups[:, None], 1.0)
