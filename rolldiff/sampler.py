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

from rolldiff.prediction import Estimate
from rolldiff.step import Last, Step
from rolldiff.timetable import Level, Timetable

__all__ = ["State", "sample"]

Denoise = Callable[[Tensor, Timetable, tuple[int, int]], Estimate]


class State(NamedTuple):
    """The tokens after a step.

    Attributes:
        row: rows of the scheduling matrix done, 0 … R.
        x_t: `[B, N, D]`, every token at its own time.
        timetable: those times.
        x: `[B, N, D]`, the last estimate `E[x | x_t]` of each token; 0, the mean of the data's
            range, for a token not yet estimated.
        finished: leading tokens that will not change any more.
        started: leading tokens that are finished or moving.
    """

    row: int
    x_t: Tensor
    timetable: Timetable
    x: Tensor
    finished: int
    started: int


def sample(
    denoise: Denoise,
    x_1: Float[Tensor, "B N D"],
    *,
    timetable: Timetable,
    step: Step,
    draw: Callable[[int], Tensor],
) -> Iterator[State]:
    """Decode noise, one state a row of the scheduling matrix, the initial one first.

    Args:
        denoise: `(x_t [B, N, D], timetable, (lo, hi))` to the estimate of the tokens `lo … hi - 1`.
        x_1: unit noise in decode order, behind the tokens that are known.
        timetable: how far each group is; at the start, when none has moved.
        step: the solver step.
        draw: `n` to fresh unit noise `[B, n, D]`, for steps that add noise.

    Yields:
        The state, `R + 1` times.
    """
    ends, known = timetable.ends, timetable.ends[timetable.first]
    x_t, x = x_1.clone(), torch.zeros_like(x_1)
    x[:, :known] = x_1[:, :known]
    eps = torch.zeros_like(x_1) if step.multistep else x

    def denoise_span(x_u: Tensor, u: Level) -> Estimate:
        if u is not t and u is not s:
            raise ValueError("denoise: a step asks at its two ends only, `t` or `s`")
        timetable.ages[groups] = after if u is s else before
        if x_u is not moving:
            here.copy_(x_u)
        return denoise(x_t, timetable, (lo, hi))

    def draw_span() -> Tensor:
        return draw(hi - lo)

    yield State(0, x_t, timetable, x, known, known)
    following, lo, hi, here, x_here = timetable.moving(0), 0, 0, x_t, x
    for row in range(timetable.rows):
        groups, following = following, timetable.moving(row + 1)
        if (lo, hi) != (ends[groups.start], ends[groups.stop]):
            lo, hi = ends[groups.start], ends[groups.stop]
            here, x_here = x_t[:, lo:hi], x[:, lo:hi]
        before = timetable.ages[groups]
        after = [age + 1 for age in before]
        t, s = timetable.at(groups, before), timetable.at(groups, after)
        # The second call of a step writes into the state.
        moving = here if step.calls == 1 else here.clone()
        last = None
        if step.multistep and row > 0:
            ago = timetable.at(groups, [max(age - 1, 0) for age in before])
            last = Last(Estimate(x_here, eps[:, lo:hi]), ago)
        x_s, estimate = step(denoise_span, moving, t, s, last=last, draw=draw_span)
        timetable.ages[groups] = after
        here.copy_(x_s)
        x_here.copy_(estimate.x)
        if step.multistep:
            eps[:, lo:hi] = estimate.eps
        yield State(row + 1, x_t, timetable, x, ends[following.start], hi)
