"""The schedule: in which order tokens are decoded, which of them form a group, and when each moves.

A decode order is a permutation of the raster tokens. It is cut into `G` consecutive groups whose
sizes differ by at most one. Everything downstream is in decode order, so that a group is a
contiguous span and an image is always three spans: finished | moving | waiting.

Every group takes `S` solver steps and starts `k` steps after the group before it. Row `r` of the
scheduling matrix gives group `g` the local time

    t[r, g] = 1 - clip((r - g k) / S, 0, 1),      r = 0 … R,      R = S + (G - 1) k,

so decoding takes `R` solver steps, and every group starts and ends on a grid point. The overlap is
`o = 1 - k / S`: at 1 all groups move together, at 0 one after another (groupwise, block
autoregressive), and in between a window of about `S / k` groups rolls over the image.

In other systems: Diffusion Forcing's `uncertainty_scale` and AR-Diffusion's `ar_step` are `k`;
Rolling Diffusion's window `W` is `S / k`; Groupwise Diffusion, ACDiT and xAR have `k = S`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.errors import UsageError

__all__ = ["ORDERS", "GroupSchedule", "Order", "decode_order"]

Order = str | Sequence[int]

ORDERS = (
    "top_to_bottom",
    "bottom_to_top",
    "left_to_right",
    "right_to_left",
    "centre_out",
    "cells:K",
    "random:SEED",
)


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
    if not isinstance(order, str):
        permutation = torch.as_tensor(list(order), dtype=torch.long)
        if sorted(permutation.tolist()) != list(range(num_tokens)):
            raise UsageError(
                f"order must be a permutation of 0 … {num_tokens - 1}, got {len(permutation)} "
                "numbers that are not one"
            )
        return permutation
    level, row, column = coords.double().numpy().T
    name, _, parameter = order.partition(":")
    keys: tuple[np.ndarray, ...]
    match name:
        case "top_to_bottom":
            keys = (row, column)
        case "bottom_to_top":
            keys = (-row, column)
        case "left_to_right":
            keys = (column, row)
        case "right_to_left":
            keys = (-column, row)
        case "centre_out":
            keys = ((row - row.mean()) ** 2 + (column - column.mean()) ** 2, row, column)
        case "cells":
            k = _parameter(order, parameter, minimum=1)
            keys = (row // k, column // k, row, column)
        case "random":
            seed = _parameter(order, parameter, minimum=0)
            keys = (np.random.default_rng(seed).permutation(num_tokens),)
        case _:
            raise UsageError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    # lexsort takes the most significant key last.
    return torch.from_numpy(np.lexsort((*reversed(keys), level)))


def _parameter(order: str, value: str, *, minimum: int) -> int:
    if not value.isdecimal() or int(value) < minimum:
        raise UsageError(
            f"order {order.partition(':')[0]!r} takes a whole number of {minimum} or more after a "
            f"colon, got {order!r}"
        )
    return int(value)


@dataclass(frozen=True, kw_only=True)
class GroupSchedule:
    """When each group of `num_tokens` tokens in decode order moves.

    Group sizes are those of `numpy.array_split`: the first `N mod G` groups hold one token more. In
    the order `top_to_bottom` the groups are bands of rows if the count divides them, and runs of
    the raster otherwise.

    Args:
        num_tokens: `N`, tokens of the image.
        num_groups: `G`, in 1 … N.
        overlap: `o` in [0, 1]. The stagger `k` is the whole number of steps nearest to `(1 - o) S`,
            and at least 1 below overlap 1, so that groups merge only at overlap 1.
        steps: `S`, solver steps per group.
        num_known: leading tokens that are data from the start (inpainting). The groups share the
            other tokens.

    Raises:
        UsageError: if an argument is out of range.
    """

    num_tokens: int
    num_groups: int = 1
    overlap: float = 0.0
    steps: int = 16
    num_known: int = 0

    def __post_init__(self) -> None:
        limit = self.num_tokens - self.num_known
        if not _is_count(self.num_groups) or self.num_groups > limit:
            raise UsageError(
                f"num_groups must be a whole number in 1 … {limit} (the tokens to decode), got "
                f"{self.num_groups!r}"
            )
        if not isinstance(self.overlap, int | float) or not 0 <= self.overlap <= 1:
            raise UsageError(f"overlap must be in [0, 1], got {self.overlap!r}")
        if not _is_count(self.steps):
            raise UsageError(f"steps must be a whole number of 1 or more, got {self.steps!r}")

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
        size, larger = divmod(self.num_tokens - self.num_known, self.num_groups)
        return tuple(self.num_known + g * size + min(g, larger) for g in range(self.num_groups + 1))

    @cached_property
    def group(self) -> Int[Tensor, " N"]:
        """The group of each token, non-decreasing from 0; known tokens are a group before."""
        sizes = torch.tensor([0, *self.ends] if self.num_known else self.ends).diff()
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

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
        i = torch.arange(self.num_steps + 1)[:, None]
        done = (i - torch.arange(self.num_groups) * self.stagger).clamp(0, self.steps)
        # Whole numbers until the last division, so that the ends are exactly 1 and 0.
        return (self.steps - done).double() / self.steps


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
