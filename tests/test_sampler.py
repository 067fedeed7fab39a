"""The loop, the grid of times, and every solver against exact solutions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from oracles import FiniteData, Gaussian, decoded_covariance, natural_covariance, run
from rolldiff import (
    DDIM,
    AdamsBashforth2,
    Cosine,
    Euler,
    GroupSchedule,
    Heun,
    Midpoint,
    Rectified,
)
from rolldiff.diffusion.process import inverse
from rolldiff.diffusion.sampler import CACHED_LEVELS, Solver, TimeGrid, sample

NOISES = [Rectified(), Rectified(2.0), Cosine()]
SOLVERS = [Euler(), Heun(), Midpoint(), AdamsBashforth2(), DDIM(0.5), DDIM(1.0)]
COVARIANCE = natural_covariance(3)
ORACLE = Gaussian(COVARIANCE, Rectified())
X_1 = torch.randn(2, 9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def schedule_of(num_groups, overlap=0.0, steps=16, num_tokens=9):
    return GroupSchedule(num_tokens=num_tokens, num_groups=num_groups, overlap=overlap, steps=steps)


def states(solver, schedule):
    return sample(
        ORACLE,
        X_1,
        schedule,
        grid=TimeGrid(schedule, Rectified(), like=X_1),
        solver=solver,
        randn=lambda n: torch.randn(2, n, 1, dtype=torch.float64),
    )


# The loop


@run_settings(max_examples=50)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(1, 5), st.sampled_from(SOLVERS))
def test_waiting_and_finished_tokens_are_bitwise_untouched(num_groups, overlap, steps, solver):
    schedule = schedule_of(num_groups, overlap, steps)
    matrix, ends = schedule.matrix, schedule.ends
    before, i = X_1, 0
    for i, state in enumerate(states(solver, schedule)):
        started = ends[int((matrix[i] < 1).sum())]
        finished = ends[int((matrix[i] == 0).sum())]
        assert (state.step, state.finished) == (i, finished)
        assert state.started >= started
        assert torch.equal(state.x_t[:, state.started :], X_1[:, state.started :])
        if i:
            done = ends[int((matrix[i - 1] == 0).sum())]
            assert torch.equal(state.x_t[:, :done], before[:, :done])
        before = state.x_t.clone()
    assert i == schedule.num_steps


def test_one_group_is_ordinary_diffusion_bit_by_bit():
    """Against a loop without groups."""
    noise, steps, x = Rectified(), 7, X_1.clone()
    schedule = schedule_of(1, steps=steps)
    grid = TimeGrid(schedule, noise, like=x)
    for i in range(steps):
        s = torch.tensor((steps - i - 1) / steps, dtype=torch.float64)
        estimate = ORACLE(x, grid.at(range(1), (i,)), slice(0, 9))
        x = torch.addcmul(noise.alpha(s) * estimate.x, noise.sigma(s), estimate.eps)
    assert torch.equal(run(ORACLE, X_1, schedule, noise=noise, solver=Euler()).x_t, x)


def test_a_span_is_evaluated_only_while_it_moves():
    spans = []

    def denoise(x_t, level, span):
        spans.append((span.start, span.stop))
        return ORACLE(x_t, level, span)

    run(denoise, X_1, schedule_of(3, steps=2), noise=Rectified(), solver=Euler())
    assert spans == [(0, 3), (0, 3), (3, 6), (3, 6), (6, 9), (6, 9)]


# The grid of times


@given(st.integers(1, 7), st.floats(0, 1), st.integers(1, 6), st.data())
def test_levels_are_those_of_the_scheduling_matrix(num_groups, overlap, steps, data):
    noise, like = Cosine(2.0), torch.zeros(1, dtype=torch.float64)
    schedule = schedule_of(num_groups, overlap, steps, num_tokens=17)
    grid = TimeGrid(schedule, noise, "v", embed=lambda t: torch.stack([t, t**2], -1), like=like)
    i = data.draw(st.integers(0, schedule.num_steps))
    first = data.draw(st.integers(0, num_groups - 1))
    groups = range(first, data.draw(st.integers(first + 1, num_groups)))
    level = grid.at(groups, schedule.steps_done(i, groups))
    t = schedule.matrix[i][schedule.group][schedule.span(groups), None]
    assert len(level.t) == (1 if len(t.unique()) == 1 else len(t))
    check_level(level, t, noise)
    off_grid = grid.level(t[:, 0] * 0.9)
    check_level(off_grid, t * 0.9, noise)


def check_level(level, t, noise):
    torch.testing.assert_close(level.t.expand_as(t), t)
    torch.testing.assert_close(level.alpha.expand_as(t), noise.alpha(t))
    torch.testing.assert_close(level.sigma.expand_as(t), noise.sigma(t))
    for found, rate in zip(level.rates, noise.rates(t), strict=True):
        torch.testing.assert_close(found.expand_as(t), rate)
    for found, number in zip(level.inverse, inverse("v", noise, t[None]), strict=True):
        torch.testing.assert_close(found.expand_as(number), number)
    torch.testing.assert_close(level.embedding.expand(len(t), 2), torch.cat([t, t**2], -1))


def test_the_grid_is_exact_at_its_ends():
    grid = TimeGrid(schedule_of(1, steps=7), Rectified(), like=X_1)
    assert (grid.noise_end.t, grid.noise_end.alpha, grid.noise_end.sigma) == (1, 0, 1)
    assert (grid.data_end.t, grid.data_end.alpha, grid.data_end.sigma) == (0, 1, 0)


def test_few_levels_are_kept():
    schedule = schedule_of(100, 0.5, 8, num_tokens=100)
    grid = TimeGrid(schedule, Cosine(), like=X_1)
    for i in range(3 * CACHED_LEVELS):
        grid.at(range(100), tuple((i * (g + 1)) % 9 for g in range(100)))
    assert len(grid._mixed) <= CACHED_LEVELS
    assert grid.at(range(50), (3,) * 50) is grid.at(range(50, 100), (3,) * 50)


# Solvers


def error(noise, solver, schedule):
    return (decoded_covariance(COVARIANCE, noise, solver, schedule) - COVARIANCE).norm().item()


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 1.0), (3, 0.0), (3, 0.5), (9, 0.75)])
def test_declared_order_is_fitted_order(noise, solver, num_groups, overlap):
    coarse, fine = (16, 32) if isinstance(solver, DDIM) and num_groups > 3 else (32, 64)
    errors = [error(noise, solver, schedule_of(num_groups, overlap, n)) for n in (coarse, fine)]
    rate = math.log2(errors[0] / errors[1])
    # On straight paths to Gaussian data the midpoint rule happens to gain an order.
    lucky = isinstance(solver, Midpoint) and noise == Rectified()
    assert solver.order - 0.25 < rate < solver.order + (1.2 if lucky else 0.6)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_marginals_are_preserved_at_any_overlap(solver, overlap):
    made = decoded_covariance(COVARIANCE, Rectified(), solver, schedule_of(3, overlap, 100))
    tolerance = 0.06 if solver.order == 1 else 0.002
    assert (made - COVARIANCE).norm() / COVARIANCE.norm() < tolerance


def test_groups_one_after_another_equal_one_group_at_the_same_steps_each():
    """G sequential groups at S steps each are as good as one group at S steps."""
    joint = error(Rectified(), Euler(), schedule_of(1, steps=32))
    for num_groups in (3, 9):
        assert error(Rectified(), Euler(), schedule_of(num_groups, steps=32)) < 1.2 * joint


@pytest.mark.parametrize("num_groups", [3, 9])
def test_decoding_is_the_chain_rule_over_groups(num_groups):
    """A group depends on its own noise and that of earlier groups; with all tokens, exactly."""
    x_1 = torch.eye(9, dtype=torch.float64)[..., None]
    schedule = schedule_of(num_groups, steps=400)
    made = run(ORACLE, x_1, schedule, noise=Rectified(), solver=Euler()).x_t[..., 0].T
    assert (made[schedule.group[:, None] < schedule.group[None]] == 0).all()
    if num_groups == 9:  # x_i = E[x_i | x_<i] + its own deviation times its noise: Cholesky
        torch.testing.assert_close(made, torch.linalg.cholesky(COVARIANCE), rtol=0, atol=0.01)


def test_ddim_at_eta_0_is_euler():
    torch.manual_seed(0)
    x_1 = torch.randn(4, 9, 1, dtype=torch.float64)
    oracle = Gaussian(COVARIANCE, Cosine())
    ends = [
        run(oracle, x_1, schedule_of(3, 0.5, 8), noise=Cosine(), solver=solver).x_t
        for solver in (Euler(), DDIM(0.0))
    ]
    torch.testing.assert_close(*ends)


def test_midpoint_evaluates_halfway_and_never_at_the_end():
    times = []

    def denoise(x_t, level, span):
        times.append(float(level.t[0]))
        return ORACLE(x_t, level, span)

    run(denoise, X_1, schedule_of(1, steps=2), noise=Rectified(), solver=Midpoint())
    assert times == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta)


@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 1.0), (2, 0.0), (4, 0.5), (6, 0.0)])
def test_a_finite_data_set_comes_back_whole_and_evenly(num_groups, overlap):
    torch.manual_seed(0)
    points = torch.randn(5, 6, 2, dtype=torch.float64)
    oracle = FiniteData(points, Rectified())
    x_1 = torch.randn(2000, 6, 2, dtype=torch.float64)
    schedule = schedule_of(num_groups, overlap, 40, num_tokens=6)
    made = run(oracle, x_1, schedule, noise=Rectified(), solver=Heun()).x_t
    distance = (made[:, None] - points).square().sum((-1, -2))
    nearest, index = distance.min(1)
    assert (nearest < 1e-2).double().mean() > 0.98, "samples are data points"
    counts = index.bincount(minlength=5).double()
    # Standard error of a count: sqrt(2000 * 0.2 * 0.8) = 17.9; four of them.
    assert (counts - 400).abs().max() < 4 * 17.9


class SigmaOfT(Solver):
    """A deliberate mistake: the noise level of `t` instead of `s`."""

    order = 1

    def step(self, denoise, x_t, interval):
        estimate = denoise(x_t, interval.t)
        return interval.s.alpha * estimate.x + interval.t.sigma * estimate.eps, estimate


class Short(GroupSchedule):
    """A deliberate mistake: the last step is dropped."""

    @property
    def num_steps(self):
        return self.steps + (self.num_groups - 1) * self.stagger - 1


def test_deliberate_mistakes_are_seen():
    good = error(Rectified(), Euler(), schedule_of(3, steps=64))
    assert error(Rectified(), SigmaOfT(), schedule_of(3, steps=64)) > 3 * good
    short = Short(num_tokens=9, num_groups=3, steps=64)
    assert error(Rectified(), Heun(), short) > 10 * error(
        Rectified(), Heun(), schedule_of(3, steps=64)
    )
