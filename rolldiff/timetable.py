"""The local times of a decode, and all that depends on them alone, computed once.

A group that has made `a` of its `S` steps is at the time `1 - a / S`, so a decode meets `S + 1`
local times and no others. For each of them a table holds what the noise schedule says, the inverse
of the prediction, and the backbone's embedding of the time. The *level* of a span of tokens is rows
of that table; `ages` keeps the steps that each group has made.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.grouping import Grouping
from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Inverse, Prediction, inverse
from rolldiff.schedule import RollingSchedule

__all__ = ["Level", "Timetable"]

# Levels of spans that are kept: a decode comes back to a few, over and over.
KEPT = 64


class Level(NamedTuple):
    """The local times of some tokens and what the noise schedule says of them.

    Fields are `[n, 1]`, to go with `[B, n, D]`; or `[1, 1]` where all have the same time.
    """

    rows: int | Tensor  # where in the table this comes from
    t: Float[Tensor, "n 1"]
    alpha: Float[Tensor, "n 1"]
    sigma: Float[Tensor, "n 1"]
    rates: Float[Tensor, "2 n 1"]  # alpha' and sigma'
    inverse: Inverse  # of the prediction, each part [2, 1, n, 1]


class Timetable:
    """How far each group of a decode is.

    Args:
        schedule: the groups and their overlap.
        steps: `S`, solver steps a group.
        num_tokens: `N`.
        known: leading tokens that are data from the start; the groups share the others.
        noise: the noise schedule.
        prediction: what the backbone predicts.
        embed: the backbone's embedding of local times, `[T]` to `[T, E]`.
        like: a tensor of the state's type, on its device.
    """

    def __init__(
        self,
        schedule: RollingSchedule,
        steps: int,
        num_tokens: int,
        *,
        known: int = 0,
        noise: NoiseSchedule,
        prediction: Prediction = "x",
        embed: Callable[[Tensor], Tensor] | None = None,
        like: Tensor,
    ) -> None:
        self.schedule = schedule
        self.steps = steps
        self.rows = schedule.num_steps(steps)
        ends = Grouping(num_tokens - known, schedule.num_groups).ends
        # What is known is a group before the others that has arrived.
        self.first = 1 if known else 0
        self.ends = [0] * self.first + [known + end for end in ends]
        self.ages = [steps] * self.first + [0] * schedule.num_groups
        self._group = {end: group for group, end in enumerate(self.ends)}
        self._sizes = [b - a for a, b in pairwise(self.ends)]
        # Whole numbers until the division, and float64 until the last: the ends are exact.
        t = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        self._embedding = t[:, None] if embed is None else embed(t.to(like))
        levels = t, noise.alpha(t), noise.sigma(t), torch.stack(noise.rates(t))
        solution = inverse(prediction, noise, t[None, :, None])
        self._fields = [field.to(like) for field in (*(c[..., None] for c in levels), *solution)]
        self._times, *rows = (_rows(part) for part in (self._embedding, *self._fields))
        self._alone = [_level(a, fields) for a, fields in enumerate(zip(*rows, strict=True))]
        self._levels: dict[tuple[int, ...], Level] = {}

    def moving(self, row: int) -> slice:
        """The groups that move in a row of the scheduling matrix."""
        first, stop = self.schedule.moving(row, self.steps)
        return slice(first + self.first, stop + self.first)

    def each(self, lo: int, hi: int, weight: Callable[[float, float], float]) -> list[float]:
        """A number for each of the tokens `lo … hi - 1`.

        Args:
            lo: the first token.
            hi: one past the last.
            weight: from how far back the group is in the order, 0 … 1, and its local time.
        """
        last = max(1, self.schedule.num_groups - 1)
        groups = range(self._group[lo], self._group[hi])
        return [
            number
            for group in groups
            for number in [weight((group - self.first) / last, 1 - self.ages[group] / self.steps)]
            * self._sizes[group]
        ]

    @property
    def t(self) -> Float[Tensor, " N"]:
        """The local time of every token."""
        level = self.level(0, self.ends[-1])
        return level.t[:, 0].expand(self.ends[-1])

    def embedded(self, level: Level) -> Float[Tensor, "n E"]:
        """The embedded times of a level; a single row if they are the same."""
        rows = level.rows
        return self._times[rows] if isinstance(rows, int) else self._embedding[rows]

    def level(self, lo: int, hi: int) -> Level:
        """The level of the tokens `lo … hi - 1`, which are whole groups, as they are now."""
        groups = slice(self._group[lo], self._group[hi])
        return self.at(groups, self.ages[groups])

    def at(self, groups: slice, ages: list[int]) -> Level:
        """The level of some groups after so many steps each."""
        if ages.count(ages[0]) == len(ages):
            return self._alone[ages[0]]
        key = (*ages, *self._sizes[groups])
        level = self._levels.get(key)
        if level is None:
            sizes = torch.tensor(self._sizes[groups])
            rows = torch.tensor(ages).repeat_interleave(sizes).to(self._embedding.device)
            if len(self._levels) == KEPT:
                self._levels.clear()
            level = _level(rows, [field[..., rows, :] for field in self._fields])
            self._levels[key] = level
        return level


def _rows(field: Tensor) -> Sequence[Tensor]:
    """As `split(1, -2)` gives them; `unbind` takes half the time."""
    return field.unsqueeze(-2).unbind(-3)


def _level(rows: int | Tensor, fields: Sequence[Tensor]) -> Level:
    t, alpha, sigma, rates, *solution = fields
    return Level(rows, t, alpha, sigma, rates, Inverse(*solution))
