"""The schedule: in which order tokens are decoded, which of them form a group, and when each moves.

A decode order is a permutation of the raster tokens. It is cut into `G` consecutive groups, either
of sizes that differ by at most one or of whole levels of the layout (scales, frequencies). All that
follows is in decode order, so that a group is a contiguous span and an image is always three spans:
finished | moving | waiting.

Every group takes `S` solver steps and starts `k` steps after the group before it. Row `r` of the
scheduling matrix gives group `g` the local time

    t[r, g] = 1 - clip((r - g k) / S, 0, 1),      r = 0 … R,      R = S + (G - 1) k,

so decoding takes `R` solver steps, and every group starts and ends on a grid point. The overlap is
`o = 1 - k / S`: at 1 all groups move together, at 0 one after another (groupwise, block
autoregressive), and in between a window of about `S / k` groups rolls over the image.

In other systems: Diffusion Forcing's `uncertainty_scale` and AR-Diffusion's `ar_step` are `k`;
Rolling Diffusion's window `W` is `S / k`; Groupwise Diffusion, ACDiT and xAR have `k = S`.

Who may see whom. The velocity of the tokens preserves the distribution if each moving token is
given all finished and all moving tokens (waiting tokens are noise and tell nothing). So

    a finished token sees the finished tokens of its own and earlier groups,
    a moving token sees all finished and all moving tokens,
    a waiting token is never shown.

A token is finished as soon as its own time is 0. Finished tokens never see moving ones, so what the
network has computed for them stays as it is, at every overlap. All of this is one number per token,
its *block*: a token sees the tokens whose block is not after its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.errors import UsageError, finite_number, shown, whole_number, whole_numbers

__all__ = [
    "MAX_STEPS",
    "ORDERS",
    "GroupSchedule",
    "Grouping",
    "Order",
    "Visibility",
    "attention_mask",
    "check_grouping",
    "check_order",
    "decode_order",
    "groupings_of",
    "level_groups",
]

Order = str | Sequence[int]
Grouping = Literal["equal", "levels"]

MAX_STEPS = 10_000  # per group: everything that depends on the time is computed for all of them

ORDERS = (
    "top_to_bottom",
    "bottom_to_top",
    "left_to_right",
    "right_to_left",
    "centre_out",
    "cells:K",
    "random:SEED",
)


def check_order(order: Order, name: str = "order") -> Order:
    """A decode order as text or a tuple of `int`; whether it has the right length shows later.

    Args:
        order: what a user passed.
        name: what the user calls it.

    Raises:
        UsageError: if the name is unknown or the sequence is not a permutation.
    """
    if not isinstance(order, str):
        permutation = whole_numbers(order, name, minimum=0)
        _check_permutation(permutation, len(permutation), name)
        return permutation
    kind, colon, parameter = order.partition(":")
    allowed = {word.partition(":")[0]: ":" in word for word in ORDERS}
    if kind not in allowed or bool(colon) != allowed[kind]:
        raise UsageError(
            f"{name} must be one of {', '.join(ORDERS)} or a permutation, got {shown(order)}"
        )
    if colon:
        minimum = int(kind == "cells")
        # 38 digits are a seed of 128 bits.
        if not (parameter.isascii() and parameter.isdecimal() and len(parameter) <= 38) or (
            int(parameter) < minimum
        ):
            raise UsageError(
                f"{name} {kind!r} takes a whole number of {minimum} or more after a colon, got "
                f"{shown(order)}"
            )
    return order


def decode_order(order: Order, coords: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
    """The permutation that lists raster tokens in the order in which they are decoded.

    Coarser levels always come first. Within a level the named orders sort by row and column;
    `cells:K` takes blocks of K x K tokens in raster order, `centre_out` sorts by the distance from
    the centre, and `random:SEED` is a shuffle fixed by its seed.

    Args:
        order: one of `ORDERS`, or the permutation itself.
        coords: level, row and column of each token, in raster order.

    Raises:
        UsageError: if the name is unknown or the sequence is not a permutation.
    """
    num_tokens = len(coords)
    order = check_order(order)
    if not isinstance(order, str):
        _check_permutation(order, num_tokens, "order")
        return torch.tensor(order, device="cpu")
    level, row, column = coords.double().cpu().numpy().T
    name, _, parameter = order.partition(":")
    keys: tuple[np.ndarray, ...]
    match name:
        case "bottom_to_top":
            keys = (-row, column)
        case "left_to_right":
            keys = (column, row)
        case "right_to_left":
            keys = (-column, row)
        case "centre_out":
            keys = ((row - row.mean()) ** 2 + (column - column.mean()) ** 2, row, column)
        case "cells":
            k = float(parameter)
            keys = (row // k, column // k, row, column)
        case "random":
            keys = (np.random.default_rng(int(parameter)).permutation(num_tokens),)
        case _:
            keys = (row, column)
    # lexsort takes the most significant key last.
    return torch.from_numpy(np.lexsort((*reversed(keys), level)))


def check_grouping(grouping: Any, name: str = "grouping") -> Grouping:
    """How tokens are grouped.

    Args:
        grouping: what a user passed.
        name: what the user calls it.

    Raises:
        UsageError: if there is no such way.
    """
    known: tuple[Grouping, ...] = get_args(Grouping)
    for each in known:
        if isinstance(grouping, str) and grouping == each:
            return each
    raise UsageError(f"{name} must be one of {', '.join(known)}, got {shown(grouping)}")


def groupings_of(
    num_groups: int, grouping: Sequence[Grouping], *, num_levels: int
) -> tuple[Grouping, ...]:
    """The ways of grouping that a group count has.

    Where both are asked for, a single group, and more groups than levels, are `equal` alone.
    """
    one_way = "equal" in grouping and not 1 < num_groups <= num_levels
    return ("equal",) if one_way else tuple(grouping)


def level_groups(level: Float[Tensor, " N"], num_groups: int) -> tuple[int, ...]:
    """The sizes of groups of whole levels; the first groups hold one level more.

    Args:
        level: of each token, in decode order.
        num_groups: groups, from 1 to the number of levels.

    Raises:
        UsageError: if there are fewer levels, or the order mixes them.
    """
    values, sizes = level.cpu().unique_consecutive(return_counts=True)
    if len(values) != len(values.unique()):
        raise UsageError(
            "order must decode one level after another with grouping=levels, got levels mixed"
        )
    if not 1 <= num_groups <= len(values):
        raise UsageError(
            f"num_groups must be in 1 … {len(values)}, the levels of the layout, with "
            f"grouping=levels, got {num_groups}"
        )
    return tuple(int(part.sum()) for part in sizes.tensor_split(num_groups))


def _check_permutation(order: Sequence[int], num_tokens: int, name: str) -> None:
    if sorted(order) != list(range(num_tokens)) or not order:
        raise UsageError(
            f"{name} must be a permutation of 0 … {num_tokens - 1}, got {len(order)} numbers that "
            "are not one"
        )


@dataclass(frozen=True, kw_only=True)
class GroupSchedule:
    """When each group of `num_tokens` tokens in decode order moves.

    Unless `sizes` says otherwise, group sizes are those of `numpy.array_split`: the first `N mod G`
    groups hold one token more. In the order `top_to_bottom` the groups are bands of rows if the
    count divides them, and runs of the raster otherwise.

    Args:
        num_tokens: `N`, tokens of the image.
        num_groups: `G`, in 1 … N.
        overlap: `o` in [0, 1]. The stagger `k` is the whole number of steps nearest to `(1 - o) S`,
            and at least 1 below overlap 1, so that groups merge only at overlap 1.
        steps: `S`, solver steps per group, at most 10,000.
        num_known: leading tokens that are data from the start (inpainting). The groups share the
            other tokens.
        sizes: of the `G` groups, in tokens; None for equal ones.

    Raises:
        UsageError: if an argument is out of range.
    """

    num_tokens: int
    num_groups: int = 1
    overlap: float = 0.0
    steps: int = 16
    num_known: int = 0
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        num_tokens = whole_number(self.num_tokens, "num_tokens")
        num_known = whole_number(
            self.num_known, "num_known", minimum=0, maximum=max(0, num_tokens - 1)
        )
        plain = {
            "num_tokens": num_tokens,
            "num_known": num_known,
            "num_groups": whole_number(
                self.num_groups, "num_groups", maximum=num_tokens - num_known
            ),
            "overlap": finite_number(self.overlap, "overlap", minimum=0, maximum=1),
            "steps": whole_number(self.steps, "steps", maximum=MAX_STEPS),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.sizes is not None:
            sizes = whole_numbers(self.sizes, "sizes")
            if len(sizes) != self.num_groups or sum(sizes) != num_tokens - num_known:
                raise UsageError(
                    f"sizes must be of {self.num_groups} groups and {num_tokens - num_known} "
                    f"tokens in all, got {len(sizes)} and {sum(sizes)}"
                )
            object.__setattr__(self, "sizes", sizes)

    @cached_property
    def stagger(self) -> int:
        """`k`, the solver steps between the starts of two successive groups."""
        return 0 if self.overlap == 1 else max(1, round((1 - self.overlap) * self.steps))

    @property
    def realised_overlap(self) -> float:
        """The overlap `1 - k / S` of the rounded stagger; 1 for a single group."""
        return 1 - self.stagger / self.steps if self.num_groups > 1 else 1.0

    @cached_property
    def num_steps(self) -> int:
        """`R = S + (G - 1) k`, the solver steps of the whole decoding."""
        return self.steps + (self.num_groups - 1) * self.stagger

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """`G + 1` boundaries: group `g` is the span `ends[g] … ends[g + 1]` of the decode order."""
        if self.sizes is not None:
            return tuple(accumulate(self.sizes, initial=self.num_known))
        size, larger = divmod(self.num_tokens - self.num_known, self.num_groups)
        return tuple(self.num_known + g * size + min(g, larger) for g in range(self.num_groups + 1))

    @cached_property
    def group(self) -> Int[Tensor, " N"]:
        """The group of each token, non-decreasing from 0; known tokens are a group before."""
        ends = [0, *self.ends] if self.num_known else self.ends
        sizes = torch.tensor(ends, device="cpu").diff()
        return torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)

    @cached_property
    def position(self) -> Float[Tensor, " N"]:
        """Where the group of each token stands in the order: 0 for the first, 1 for the last."""
        groups = (self.group - int(self.num_known > 0)).clamp(min=0)
        return groups / max(1, self.num_groups - 1)

    def moving(self, i: int) -> range:
        """The groups that move in step `i`, from row `i` to row `i + 1` of the matrix.

        The groups before are finished, the groups after are waiting.
        """
        if (k := self.stagger) == 0:
            return range(0 if i < self.steps else self.num_groups, self.num_groups)
        return range(
            max(0, -(-(i - self.steps + 1) // k)),
            min(self.num_groups, i // k + 1),
        )

    def steps_done(self, i: int, groups: range) -> tuple[int, ...]:
        """The steps `clip(i - g k, 0, S)` that each of these groups has taken at row `i`."""
        return tuple(min(max(i - g * self.stagger, 0), self.steps) for g in groups)

    def span(self, groups: range) -> slice:
        """The tokens of consecutive groups."""
        return slice(self.ends[groups.start], self.ends[groups.stop])

    @property
    def matrix(self) -> Float[Tensor, "rows G"]:
        """The scheduling matrix, `[R + 1, G]`, in float64: from all ones to all zeros."""
        i = torch.arange(self.num_steps + 1, device="cpu")[:, None]
        done = (i - torch.arange(self.num_groups, device="cpu") * self.stagger).clamp(0, self.steps)
        # Whole numbers until the last division, so that the ends are exactly 1 and 0.
        return (self.steps - done).double() / self.steps


@dataclass(frozen=True)
class Visibility:
    """Who may see whom in a call: a token sees the tokens whose block is not after its own.

    Args:
        schedule: the groups.
        finished: leading tokens at time 0.
        started: leading tokens that are finished or moving; those after them form a last block,
            which sees everything and is seen by none, for previews.
    """

    schedule: GroupSchedule
    finished: int
    started: int

    @property
    def blocks(self) -> Int[Tensor, " N"]:
        """The block of each token: its group if it is finished, and one for all that move."""
        block = self.schedule.group.clone()
        block[self.finished :] = self.schedule.num_groups + 1
        block[self.started :] = self.schedule.num_groups + 2
        return block


def attention_mask(query: Int[Tensor, "*B n"], key: Int[Tensor, "*B m"]) -> Float[Tensor, "*B n m"]:
    """0 where a token of block `query` sees one of block `key`, minus infinity elsewhere."""
    hidden = query[..., :, None] < key[..., None, :]
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
