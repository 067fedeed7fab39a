import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import RollingSchedule

settings = st.tuples(st.integers(1, 9), st.floats(0, 1), st.integers(1, 9))


@given(settings)
def test_matrix_law(numbers):
    num_groups, overlap, steps = numbers
    schedule = RollingSchedule(num_groups, overlap)
    k, matrix = schedule.stagger(steps), schedule.matrix(steps)
    assert 0 <= k <= steps
    assert len(matrix) == schedule.num_steps(steps) + 1 == steps + (num_groups - 1) * k + 1
    assert (matrix[0] == 1).all()
    assert (matrix[-1] == 0).all()
    assert (matrix.diff(dim=0) <= 0).all()
    assert (matrix.diff(dim=1) >= 0).all()
    # Each group takes `steps` equal steps, from exactly 1 to exactly 0.
    assert ((matrix.diff(dim=0) < 0).sum(0) == steps).all()
    falls = -matrix.diff(dim=0)
    torch.testing.assert_close(
        falls[falls > 0], torch.full((steps * num_groups,), 1 / steps).double()
    )


@given(settings)
def test_moving_agrees_with_the_matrix(numbers):
    num_groups, overlap, steps = numbers
    schedule = RollingSchedule(num_groups, overlap)
    matrix = schedule.matrix(steps)
    for row in range(len(matrix) - 1):
        first, last = schedule.moving(row, steps)
        moves = matrix[row] > matrix[row + 1]
        assert moves.nonzero()[:, 0].tolist() == list(range(first, last))
    assert schedule.moving(len(matrix) - 1, steps)[0] == num_groups


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 8))
def test_the_continuous_clock_meets_the_matrix(num_groups, steps, k):
    overlap = 1 - min(k, steps) / steps
    schedule = RollingSchedule(num_groups, overlap)
    matrix = schedule.matrix(steps)
    u = torch.linspace(0, 1, len(matrix), dtype=torch.float64)
    torch.testing.assert_close(schedule.local(u), matrix, rtol=0, atol=1e-12)


def test_special_cases():
    assert RollingSchedule(4, 1.0).num_steps(8) == 8
    assert RollingSchedule(4, 0.0).num_steps(8) == 32
    assert RollingSchedule(4, 0.5).num_steps(8) == 20
    assert RollingSchedule(4, 0.99).stagger(4) == 1, "groups never merge unasked"
    assert RollingSchedule(4, 0.3).rounded(4) == 0.25


@pytest.mark.parametrize("overlap", [-0.1, 1.1, float("nan"), "half"])
@pytest.mark.usefixtures("unchecked")
def test_bad_overlap(overlap):
    with pytest.raises(ValueError, match="overlap must be in"):
        RollingSchedule(2, overlap)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "4"])
@pytest.mark.usefixtures("unchecked")
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps must be a whole number"):
        RollingSchedule(2).stagger(steps)


@pytest.mark.parametrize("num_groups", [0, 1.5])
@pytest.mark.usefixtures("unchecked")
def test_bad_num_groups(num_groups):
    with pytest.raises(ValueError, match="num_groups"):
        RollingSchedule(num_groups)
