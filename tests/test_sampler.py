import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from oracles import Gaussian, natural_covariance, run
from rolldiff import Ancestral, Euler, Grouping, Heun, Multistep, Rectified, RollingSchedule
from rolldiff.sampler import sample
from rolldiff.timetable import Timetable

ORACLE = Gaussian(natural_covariance(3), Rectified())
X_1 = torch.randn(2, 9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STEPS = st.sampled_from([Euler(), Heun(), Multistep(), Ancestral()])


def states(step, schedule, steps):
    return sample(
        ORACLE,
        X_1,
        timetable=Timetable(schedule, steps, 9, noise=Rectified(), like=X_1),
        step=step,
        draw=lambda n: torch.randn(2, n, 1, dtype=torch.float64),
    )


@run_settings(max_examples=50)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(1, 5), STEPS)
def test_waiting_and_finished_tokens_are_bitwise_untouched(num_groups, overlap, steps, step):
    schedule = RollingSchedule(num_groups, overlap)
    matrix, ends = schedule.matrix(steps), Grouping(9, num_groups).ends
    before = X_1
    rows = 0
    for rows, state in enumerate(states(step, schedule, steps)):
        started = ends[int((matrix[rows] < 1).sum())]
        finished = ends[int((matrix[rows] == 0).sum())]
        assert state.finished == finished
        assert state.started >= started
        assert torch.equal(state.x_t[:, state.started :], X_1[:, state.started :])
        if rows:
            done = ends[int((matrix[rows - 1] == 0).sum())]
            assert torch.equal(state.x_t[:, :done], before[:, :done])
        times = matrix[rows][Grouping(9, num_groups).group].double()
        torch.testing.assert_close(state.timetable.t, times)
        before = state.x_t.clone()
    assert rows == schedule.num_steps(steps)


def test_one_group_is_ordinary_diffusion_bit_by_bit():
    """Against a loop that knows nothing of groups."""
    noise, steps = Rectified(), 7
    x = X_1.clone()
    timetable = Timetable(RollingSchedule(1), steps, 9, noise=noise, like=x)
    for r in range(steps):
        timetable.ages = [r]
        s = torch.tensor((steps - r - 1) / steps, dtype=torch.float64)
        estimate = ORACLE(x, timetable, (0, 9))
        x = torch.addcmul(noise.alpha(s) * estimate.x, noise.sigma(s), estimate.eps)
    assert torch.equal(run(ORACLE, X_1, noise, Euler(), RollingSchedule(1), steps).x_t, x)


def test_a_span_is_asked_for_only_while_it_moves():
    asked = []

    def denoise(x_t, timetable, span):
        asked.append(span)
        t = timetable.t
        assert (t[: span[0]] == 0).all()
        assert (t[span[1] :] == 1).all()
        return ORACLE(x_t, timetable, span)

    run(denoise, X_1, Rectified(), Euler(), RollingSchedule(3), 2)
    assert asked == [(0, 3), (0, 3), (3, 6), (3, 6), (6, 9), (6, 9)]


class _Midpoint(Euler):
    """Asks halfway, where the timetable has nothing."""

    def __call__(self, denoise, x_t, t, s, *, last=None, draw):
        return x_t, denoise(x_t, t._replace(t=(t.t + s.t) / 2))


def test_a_step_asks_at_its_ends():
    with pytest.raises(ValueError, match="its two ends"):
        run(ORACLE, X_1, Rectified(), _Midpoint(), RollingSchedule(3), 2)
