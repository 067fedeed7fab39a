import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Cosine, Grouping, RollingSchedule
from rolldiff.prediction import inverse
from rolldiff.timetable import KEPT, Timetable

LIKE = torch.zeros(1, dtype=torch.float64)


def table(schedule, steps, num_tokens, **arguments):
    return Timetable(
        schedule, steps, num_tokens, noise=Cosine(2.0), prediction="v", like=LIKE, **arguments
    )


@given(st.integers(1, 7), st.floats(0, 1), st.integers(1, 6), st.data())
def test_levels_are_those_of_the_scheduling_matrix(num_groups, overlap, steps, data):
    schedule, noise = RollingSchedule(num_groups, overlap), Cosine(2.0)
    times = table(schedule, steps, 17, embed=lambda t: torch.stack([t, t**2], -1))
    matrix, grouping = schedule.matrix(steps), Grouping(17, num_groups)
    row = data.draw(st.integers(0, times.rows))
    first = data.draw(st.integers(0, num_groups - 1))
    last = data.draw(st.integers(first + 1, num_groups))
    k = schedule.stagger(steps)
    times.ages = [min(max(row - g * k, 0), steps) for g in range(num_groups)]
    t = matrix[row][grouping.group]
    torch.testing.assert_close(times.t, t)
    lo, hi = grouping.ends[first], grouping.ends[last]
    level, t = times.level(lo, hi), t[lo:hi, None]
    alike = len(t.unique()) == 1
    assert len(level.t) == (1 if alike else hi - lo)
    torch.testing.assert_close(level.t.expand_as(t), t)
    torch.testing.assert_close(level.alpha.expand_as(t), noise.alpha(t))
    torch.testing.assert_close(level.sigma.expand_as(t), noise.sigma(t))
    for found, rate in zip(level.rates, noise.rates(t), strict=True):
        torch.testing.assert_close(found.expand_as(t), rate)
    for found, number in zip(level.inverse, inverse("v", noise, t[None]), strict=True):
        torch.testing.assert_close(found.expand_as(number), number)
    time = times.embedded(level)
    torch.testing.assert_close(time.expand(len(t), 2), torch.cat([t, t**2], -1))
    groups = slice(first, last)
    before = [max(age - 1, 0) for age in times.ages[groups]]
    behind = times.at(groups, before).t.expand_as(t)
    torch.testing.assert_close(behind, (t + 1 / steps).clamp(max=1))
    if row < times.rows:
        after = [min(age + 1, steps) for age in times.ages[groups]]
        ahead = times.at(groups, after).t.expand_as(t)
        torch.testing.assert_close(ahead, (t - 1 / steps).clamp(min=0))


def test_few_levels_are_kept():
    times = table(RollingSchedule(100, 0.5), 8, 100)
    for row in range(3 * KEPT):
        times.ages = [(row * (g + 1)) % 9 for g in range(100)]
        times.level(0, 100)
    assert len(times._levels) <= KEPT
    times.ages = [3] * 100
    assert times.level(0, 50) is times.level(50, 100), "the same time is the same level"
