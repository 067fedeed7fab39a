"""When each group moves: one family of schedules with two numbers, `num_groups` and `overlap`.

Every group takes `S` solver steps and starts `k` steps after the one before it. Row `r` of the
scheduling matrix gives group `g` the local time

    t[r, g] = 1 - clip((r - g k) / S, 0, 1),      r = 0 … R,      R = S + (G - 1) k,

so a decode takes `R` steps, and every group starts and ends on a grid point. The overlap is
`o = 1 - k / S`: at 1 all groups move together (ordinary diffusion), at 0 one after another
(groupwise, block autoregressive), in between a window of about `S / k` groups rolls over the
image. In continuous time, with progress `u` in [0, 1]:

    t_g(u) = clip(1 - (P u - g (1 - o)), 0, 1),      P = 1 + (G - 1)(1 - o).

Dictionary: Diffusion Forcing's `uncertainty_scale` and AR-Diffusion's `ar_step` are `k`; Rolling
Diffusion's window `W` is `S / k`; Groupwise Diffusion, ACDiT and xAR are `k = S`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["RollingSchedule", "clock"]


def clock(
    u: Float[Tensor, " B"], num_groups: Tensor, overlap: Tensor, *, width: int
) -> Float[Tensor, "B G"]:
    """Local times of `width` groups at progress `u`, in continuous time (see above).

    Groups beyond an example's own `num_groups` get the time 1: they wait.
    """
    g = torch.arange(width, device=u.device)
    lag = (1 - overlap)[:, None]
    travelled = u[:, None] * (1 + (num_groups[:, None] - 1) * lag)
    t = (1 - (travelled - g * lag)).clamp(0, 1)
    return t.where(g < num_groups[:, None], 1.0)


@dataclass(frozen=True)
class RollingSchedule:
    """The schedule of `num_groups` groups at a given `overlap`.

    Args:
        num_groups: groups, 1 or more.
        overlap: `o` in [0, 1]. The stagger is the whole number of steps nearest to `(1 - o) S`, and
            at least one below overlap 1, so that groups never merge unasked.

    Raises:
        ValueError: if an argument is out of range.
    """

    num_groups: int
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(
                f"num_groups must be a whole number of 1 or more, got {self.num_groups!r}"
            )
        if not isinstance(self.overlap, int | float) or not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap!r}")

    def stagger(self, steps: int) -> int:
        """`k`, the steps between the starts of two groups, for `steps` solver steps a group."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of 1 or more, got {steps!r}")
        return 0 if self.overlap == 1 else max(1, round((1 - self.overlap) * steps))

    def rounded(self, steps: int) -> float:
        """The overlap `1 - k / S` after rounding the stagger; 1 for a single group."""
        return 1 - self.stagger(steps) / steps if self.num_groups > 1 else 1.0

    def num_steps(self, steps: int) -> int:
        """`R = S + (G - 1) k`, the solver steps of the whole decode."""
        return steps + (self.num_groups - 1) * self.stagger(steps)

    def moving(self, row: int, steps: int) -> tuple[int, int]:
        """The groups `first … last - 1` that move between `row` and `row + 1`.

        Those before `first` are finished, those from `last` on wait.
        """
        k = self.stagger(steps)
        if k == 0:
            return (0 if row < steps else self.num_groups), self.num_groups
        first = max(0, -(-(row - steps + 1) // k))
        return first, min(self.num_groups, row // k + 1)

    def matrix(self, steps: int) -> Float[Tensor, "rows G"]:
        """The scheduling matrix, `[R + 1, G]`, in float64: from all ones to all zeros."""
        r = torch.arange(self.num_steps(steps) + 1)[:, None]
        g = torch.arange(self.num_groups)
        # Whole numbers until the last division: the ends are exactly 1 and 0.
        age = (r - g * self.stagger(steps)).clamp(0, steps)
        return (steps - age).double() / steps

    def local(self, u: Float[Tensor, " B"]) -> Float[Tensor, "B G"]:
        """Local times at progress `u` in continuous time."""
        return clock(
            u,
            torch.full_like(u, self.num_groups),
            torch.full_like(u, self.overlap),
            width=self.num_groups,
        )
