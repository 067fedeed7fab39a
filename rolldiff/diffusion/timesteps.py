"""What training shows: group counts, orders, windows of groups and local times.

Training shows the states that decoding meets. With a lag of `l = 1 - overlap` between two groups,
the groups that move at once have the times

    t_i = (i + phi) l < 1,      i = 0, 1, …,      0 <= phi < 1,

so there are `floor(1 / l)` or one more of them, by the phase. An image is cut into consecutive
*windows* of so many groups. Inside a window all tokens see each other; they also see the windows
before, which are clean, as in a decoding, or at their own noise level (xAR; Ren et al. 2025). The
first window is cut short by a random offset, and the last by the end of the image, so that the
beginning and the end of a decoding are shown too. Overlap 0 is a window per group (block
autoregression), overlap 1 or a single group one window (ordinary diffusion).

Inside a window the times are those of the schedule, or independent ones (Diffusion Forcing; Chen et
al. 2024), which show what every schedule meets. All of this is drawn for a few slices of a batch,
so that the examples of a slice share one attention mask; orders and times are drawn for every
example and stratified over the batch: each of the B strata of (0, 1) holds one number.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.diffusion.process import Shard
from rolldiff.diffusion.schedule import (
    Grouping,
    GroupSchedule,
    Order,
    attention_mask,
    check_grouping,
    check_order,
    decode_order,
    groupings_of,
    level_groups,
)
from rolldiff.errors import (
    UsageError,
    finite_number,
    instance,
    sequence,
    shown,
    whole_number,
    whole_numbers,
)

__all__ = ["Draw", "LogitNormal", "TrainingDistribution", "Uniform"]


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


class Windows(NamedTuple):
    """How the groups of an image are cut into windows.

    Attributes:
        window: the window of each group, from 0 on.
        position: `i`, of each group in its window.
        low: of each window, the lowest phase with which it holds so many groups.
        high: the highest.
    """

    window: Int[Tensor, " G"]
    position: Int[Tensor, " G"]
    low: Float[Tensor, " W"]
    high: Float[Tensor, " W"]

    def times(self, u: Float[Tensor, "B W"], lag: float) -> Float[Tensor, "B G"]:
        """The times of the groups, `(i + phi) l`, or `phi` for a single group.

        Args:
            u: a number in (0, 1) for each window.
            lag: `l`.
        """
        phase = (self.low + (self.high - self.low) * u[:, : len(self.low)])[:, self.window]
        return phase if len(self.window) == 1 or lag < 1e-6 else (self.position + phase) * lag


class Draw(NamedTuple):
    """What training draws for a batch of B examples in M slices; tokens are in decode order.

    Attributes:
        order: the number of the decode order of each example.
        t: the local times; those of clean context are 0, or its noise.
        group: the group of each token.
        window: the window of each token.
        clean: whether a token is clean context, which carries no loss.
        together: whether all tokens see all others.
        shared: whether all tokens of an example have one time.
        num_moving: tokens that carry a loss; of a global batch, its share for each process.
    """

    order: Int[Tensor, " B"]
    t: Float[Tensor, "B N"]
    group: Int[Tensor, "M N"]
    window: Int[Tensor, "M N"]
    clean: Bool[Tensor, "M N"]
    together: bool
    shared: bool
    num_moving: float

    def mask(self, device: torch.device) -> Float[Tensor, "M N N"] | None:
        """Who may see whom, see `GroupSchedule.blocks`; None if all tokens see all.

        Clean groups see clean groups up to their own, and a window sees itself and all before it.
        """
        if self.together:
            return None
        block = self.group.where(self.clean, self.group.shape[1] + self.window)
        block = block.to(device, non_blocking=True)
        return attention_mask(block, block)

    def moving(self, device: torch.device) -> Bool[Tensor, "B N"]:
        """The tokens that carry a loss."""
        moving = (~self.clean).to(device, non_blocking=True)
        return moving.repeat_interleave(len(self.t) // len(moving), 0)


@dataclass(frozen=True)
class TrainingDistribution:
    """The settings that one set of weights is trained for.

    Args:
        num_groups: the group counts, drawn uniformly. One that is listed twice is drawn twice as
            often.
        orders: the decode orders, drawn uniformly.
        grouping: how tokens are grouped, drawn uniformly with the group counts: groups of equal
            sizes, or of whole levels of the layout. Counts above the number of levels are drawn
            with equal sizes alone.
        overlap: the overlaps, drawn uniformly from the entries of the list: numbers in [0, 1], and
            ranges of them such as `0..1`.
        clean_context: the probability that the windows before a random one are clean context.
        independent: the probability of independent times in the windows, instead of the schedule's.
        context_noise: the largest time at which clean context is shown; 0 for none. A decoding
            shows it so with `context_time`.
        density: of the times; `LogitNormal` draws some of them more often.
        drop_cond: the probability of dropping the condition, for guidance; in [0, 1].
        slices: parts of a batch that draw their group count and windows apart; at most so many as
            divide the batch. With several processes the batch is that of all of them.

    Raises:
        UsageError: if a set is empty or a number is out of range.
    """

    num_groups: Sequence[int] = (1,)
    orders: Sequence[Order] = ("top_to_bottom",)
    grouping: Sequence[Grouping] | Grouping = ("equal",)
    overlap: Sequence[float | str] = (0.0, "0..1")
    clean_context: float = 0.5
    independent: float = 0.5
    context_noise: float = 0.0
    density: Density = Uniform()
    drop_cond: float = 0.1
    slices: int = 8

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
        grouping = [self.grouping] if isinstance(self.grouping, str) else self.grouping
        grouping = sequence(grouping, "grouping", "equal or levels")
        if not grouping:
            raise UsageError("grouping must hold at least one of equal and levels, got none")
        plain = tuple(check_grouping(each, "each of grouping") for each in grouping)
        if len(set(plain)) < len(plain):
            raise UsageError(f"grouping must hold each rule once, got {shown(plain)}")
        object.__setattr__(self, "grouping", plain)
        overlap = sequence(self.overlap, "overlap", "numbers in [0, 1] and ranges such as 0..1")
        if not 1 <= len(overlap) <= MAX_SETTINGS:
            raise UsageError(
                f"overlap must hold 1 … {MAX_SETTINGS} numbers or ranges, got {len(overlap)}"
            )
        object.__setattr__(self, "overlap", tuple(_checked_overlap(entry) for entry in overlap))
        instance(self.density, Density, "density", "Uniform() or LogitNormal()")
        for name in ("clean_context", "independent", "context_noise", "drop_cond"):
            number = finite_number(getattr(self, name), name, minimum=0, maximum=1)
            object.__setattr__(self, name, number)
        if self.context_noise == 1:
            raise UsageError(f"context_noise must be below 1, got {self.context_noise}")
        object.__setattr__(self, "slices", whole_number(self.slices, "slices"))

    def trains_overlap(self, overlap: float) -> bool:
        """Whether an overlap is one of those drawn."""
        return any(low <= overlap <= high for low, high in map(_range, self.overlap))

    def nearest_overlap(self, overlap: float) -> float:
        """The overlap nearest to one, among those that are drawn."""
        near = (min(max(overlap, low), high) for low, high in map(_range, self.overlap))
        return min(near, key=lambda drawn: abs(drawn - overlap))

    def tables(
        self, coords: Float[Tensor, "N 3"]
    ) -> tuple[Int[Tensor, "orders N"], Int[Tensor, "counts N"]]:
        """Every decode order, and for every group count the group of each token in decode order.

        A group count has a row for each `grouping` that it fits.

        Raises:
            UsageError: if an order or a group count does not fit the tokens, or there are so many
                that their tables would have more than 2^24 entries.
        """
        settings = len(self.orders) + len(self.num_groups) * len(self.grouping)
        if len(coords) * settings > MAX_ENTRIES:
            raise UsageError(
                f"num_groups and orders must hold at most {MAX_ENTRIES // len(coords)} settings "
                f"for {len(coords)} tokens, got {len(self.num_groups)} and {len(self.orders)}"
            )
        orders = [decode_order(order, coords) for order in self.orders]
        groups = []
        for g in self.num_groups:
            for sizes in self._sizes(g, coords, orders):
                schedule = GroupSchedule(num_tokens=len(coords), num_groups=g, sizes=sizes)
                groups.append(schedule.group)
        return torch.stack(orders), torch.stack(groups)

    def _sizes(
        self, num_groups: int, coords: Float[Tensor, "N 3"], orders: Sequence[Int[Tensor, " N"]]
    ) -> list[tuple[int, ...] | None]:
        """The group sizes of a count, those of each grouping that it fits; None for equal ones."""
        if "levels" not in self.grouping:
            return [None]
        level = coords[:, 0]
        num_levels = len(level.unique())
        ways = groupings_of(
            num_groups, [check_grouping(each) for each in self.grouping], num_levels=num_levels
        )
        if "levels" not in ways:
            return [None]
        if any(not torch.equal(level[order], level[orders[0]]) for order in orders):
            raise UsageError(
                "orders must decode the levels in the same order with grouping=levels, got "
                + shown(self.orders)
            )
        sizes = level_groups(level[orders[0]], num_groups)
        return [None if grouping == "equal" else sizes for grouping in ways]

    def sample(
        self,
        batch: int,
        groups: Int[Tensor, "counts N"],
        generator: torch.Generator | None = None,
        *,
        shard: Shard = Shard(),
    ) -> Draw:
        """Draw everything for a batch, on the CPU.

        Args:
            batch: number of examples.
            groups: for every group count the group of each token, see `tables`; on the CPU.
            generator: a CPU generator; None uses torch's own.
            shard: the part that the examples are of a global batch, for which all is drawn.
        """
        own_batch = whole_number(batch, "batch")
        batch = own_batch * shard.count
        # The largest number of slices that divides the batch.
        slices = max(m for m in range(1, min(self.slices, batch) + 1) if batch % m == 0)
        choice = _strata(slices, 2, generator)
        counts = (choice[:, 0] * len(groups)).long().tolist()
        entries = (choice[:, 1] * len(self.overlap)).long().tolist()
        u = _strata(batch, int(groups.max()) + 1, generator).chunk(slices)
        own, noise = _strata(batch, 2, generator)[:, :, None].unbind(1)
        is_independent = (own < self.independent).chunk(slices)
        context = (noise * self.context_noise).chunk(slices)
        order = torch.randint(len(self.orders), (batch,), generator=generator)
        drawn, shared = [], True
        for m in range(slices):
            v, of_context, place = torch.rand(3, generator=generator).tolist()
            low, high = _range(self.overlap[entries[m]])
            lag = 1 - low - (high - low) * v
            group = groups[counts[m]]
            num_groups = int(group[-1]) + 1
            windows = cut(num_groups, lag, generator)
            t = windows.times(u[m], lag)  # [B / M, G]
            shared = shared and (num_groups == 1 or lag == 0)
            if lag > 0:
                t = u[m][:, :num_groups].where(is_independent[m], t)
            t = self.density.quantile(t.clamp(1e-6, 1 - 1e-6))
            first = int(place * len(windows.low)) if of_context < self.clean_context else 0
            clean = windows.window < first
            t = context[m].where(clean, t)
            drawn.append((t[:, group], group, windows.window[group], clean[group]))
        times, *tokens = zip(*drawn, strict=True)
        group, window, clean = map(torch.stack, tokens)
        size = batch // slices
        num_moving = int((~clean).sum()) * size / shard.count
        # A process may begin or end in the middle of a slice.
        step = math.gcd(size, own_batch)
        here = (shard.index * own_batch + torch.arange(0, own_batch, step)) // size
        group, window, clean = group[here], window[here], clean[here]
        t = shard.rows(torch.cat(times))
        together = not (window.any() or clean.any())
        return Draw(shard.rows(order), t, group, window, clean, together, shared, num_moving)


def cut(num_groups: int, lag: float, generator: torch.Generator | None = None) -> Windows:
    """Cut groups into windows of those that move at once.

    Args:
        num_groups: `G`.
        lag: `l = 1 - overlap`.
        generator: a CPU generator; None uses torch's own.
    """
    if num_groups == 1 or lag < 1e-6:  # all together, at one time
        one = torch.zeros(num_groups, dtype=torch.long)
        return Windows(one, one, torch.zeros(1), torch.ones(1))
    size = math.floor(1 / lag)
    larger = 1 / lag - size  # the share of phases with one group more
    *u, offset = torch.rand(num_groups + 1, generator=generator).tolist()
    window: list[int] = []
    position: list[int] = []
    bounds: list[tuple[float, float]] = []
    while len(window) < num_groups:
        has_more = u[len(bounds)] < larger
        length = size + has_more
        start = 0 if bounds else int(offset * length)
        here = range(start, min(length, start + num_groups - len(window)))
        window += [len(bounds)] * len(here)
        position += here
        bounds.append((0.0, larger) if has_more else (larger, 1.0))
    low, high = torch.tensor(bounds).T
    return Windows(torch.tensor(window), torch.tensor(position), low, high)


def _checked_overlap(entry: object) -> float | str:
    if not isinstance(entry, str):
        return finite_number(entry, "each of overlap", minimum=0, maximum=1)
    if match := re.fullmatch(r"\s*([\d.]+)\s*\.\.\s*([\d.]+)\s*", entry):
        try:
            low, high = map(float, match.groups())
        except ValueError:
            low, high = 1.0, 0.0
        if low <= high <= 1:
            return f"{low:g}..{high:g}"
    raise UsageError(
        "each of overlap must be a number in [0, 1] or a range such as 0..1, got " + shown(entry)
    )


def _range(entry: float | str) -> tuple[float, float]:
    if not isinstance(entry, str):
        return entry, entry
    low, _, high = entry.partition("..")
    return float(low), float(high)


def _strata(batch: int, width: int, generator: torch.Generator | None) -> Float[Tensor, "B G"]:
    """Uniform numbers in (0, 1), each column stratified over the batch."""
    ranks = torch.rand(batch, width, generator=generator).argsort(dim=0)
    u = (ranks + torch.rand(batch, width, generator=generator)) / batch
    # Rounding may reach 1, which would turn a moving token into a waiting one.
    return u.clamp(1e-6, 1 - 1e-6)
