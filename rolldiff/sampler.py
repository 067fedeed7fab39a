"""The loop: a generator of states. It knows spans and times, not networks.

The state is the tokens in decode order, `[B, N, D]`. Row by row of the scheduling matrix, the span
of groups that move is taken from `t` to `s`; finished and waiting tokens are not touched. What is
yielded is the sampler's own memory, valid until the next step: copy what you keep.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.grouping import Grouping
from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Last, Step

__all__ = ["State", "sample"]

Denoise = Callable[[Tensor, Tensor, tuple[int, int]], Estimate]


class State(NamedTuple):
    """The tokens after a step.

    Attributes:
        row: rows of the scheduling matrix done, 0 … R.
        x_t: `[B, N, D]`, every token at its own time.
        t: `[N]`, those times.
        x: `[B, N, D]`, the last estimate `E[x | x_t]` of each token; 0, the mean of the data's
            range, for a token not yet estimated.
        finished: leading tokens that will not change any more.
        started: leading tokens that are finished or moving.
    """

    row: int
    x_t: Tensor
    t: Tensor
    x: Tensor
    finished: int
    started: int


def sample(
    denoise: Denoise,
    x_1: Float[Tensor, "B N D"],
    *,
    noise: NoiseSchedule,
    step: Step,
    schedule: RollingSchedule,
    steps: int,
    draw: Callable[[int], Tensor],
) -> Iterator[State]:
    """Decode noise, one state a row of the scheduling matrix, the initial one first.

    Args:
        denoise: `(x_t [B, N, D], t [N], (lo, hi))` to the estimate of the tokens `lo … hi - 1`.
        x_1: unit noise in decode order.
        noise: the noise schedule.
        step: the solver step.
        schedule: when each group moves.
        steps: solver steps a group, 1 or more.
        draw: `n` to fresh unit noise `[B, n, D]`, for steps that add noise.

    Yields:
        The state, `R + 1` times.
    """
    grouping = Grouping(x_1.shape[1], schedule.num_groups)
    matrix = schedule.matrix(steps).to(x_1)
    group = grouping.group.to(x_1.device)
    x_t, x, eps = x_1.clone(), torch.zeros_like(x_1), torch.zeros_like(x_1)
    clock = x_1.new_ones(x_1.shape[1])
    yield State(0, x_t, clock, x, 0, 0)
    for row in range(len(matrix) - 1):
        first, last_group = schedule.moving(row, steps)
        lo, hi = grouping.ends[first], grouping.ends[last_group]
        span, members = slice(lo, hi), group[lo:hi]

        def denoise_span(x_u: Tensor, u: Tensor, span: slice = span) -> Estimate:
            x_t[:, span], clock[span] = x_u, u
            return denoise(x_t, clock, (span.start, span.stop))

        def draw_span(n: int = hi - lo) -> Tensor:
            return draw(n)

        last = None
        if step.multistep and row > 0:
            last = Last(Estimate(x[:, span], eps[:, span]), matrix[row - 1][members])
        t, s = matrix[row][members], matrix[row + 1][members]
        # A step may ask for the estimate at a second point, which is written into the state.
        x_s, estimate = step(
            denoise_span, noise, x_t[:, span].clone(), t, s, last=last, draw=draw_span
        )
        x_t[:, span], x[:, span], clock[span] = x_s, estimate.x, s
        if step.multistep:
            eps[:, span] = estimate.eps
        finished = grouping.ends[schedule.moving(row + 1, steps)[0]]
        yield State(row + 1, x_t, clock, x, finished, hi)
