"""Every step against the exact solution of Gaussian and finite data."""

import math

import pytest
import torch

from oracles import FiniteData, Gaussian, decoded_covariance, natural_covariance, run
from rolldiff import Ancestral, Cosine, Euler, Grouping, Heun, Multistep, Rectified, RollingSchedule

NOISES = [Rectified(), Rectified(2.0), Cosine()]
STEPS = [Euler(), Heun(), Multistep(), Ancestral(0.5), Ancestral(1.0)]
COVARIANCE = natural_covariance(3)


def error(noise, step, schedule, steps):
    made = decoded_covariance(COVARIANCE, noise, step, schedule, steps)
    return (made - COVARIANCE).norm().item()


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("step", STEPS, ids=repr)
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 1.0), (3, 0.0), (3, 0.5), (9, 0.75)])
def test_declared_order_is_fitted_order(noise, step, num_groups, overlap):
    schedule = RollingSchedule(num_groups, overlap)
    coarse, fine = (16, 32) if isinstance(step, Ancestral) and num_groups > 3 else (32, 64)
    rate = math.log2(error(noise, step, schedule, coarse) / error(noise, step, schedule, fine))
    assert step.order - 0.25 < rate < step.order + 0.6


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_marginals_are_preserved_at_any_overlap(step, overlap):
    made = decoded_covariance(COVARIANCE, Rectified(), step, RollingSchedule(3, overlap), 100)
    assert (made - COVARIANCE).norm() / COVARIANCE.norm() < (0.06 if step.order == 1 else 0.002)


def test_groups_one_after_another_equal_one_group_at_the_same_steps_each():
    """DESIGN: G sequential groups at S steps each are as good as one group at S steps."""
    joint = error(Rectified(), Euler(), RollingSchedule(1), 32)
    for num_groups in (3, 9):
        assert error(Rectified(), Euler(), RollingSchedule(num_groups), 32) < 1.2 * joint


@pytest.mark.parametrize("num_groups", [3, 9])
def test_a_decode_is_the_chain_rule_over_groups(num_groups):
    """A group answers to its own noise and that of earlier groups; with all tokens, exactly."""
    x_1 = torch.eye(9, dtype=torch.float64)[..., None]
    oracle = Gaussian(COVARIANCE, Rectified())
    made = run(oracle, x_1, Rectified(), Euler(), RollingSchedule(num_groups), 400).x_t[..., 0].T
    group = Grouping(9, num_groups).group
    assert (made[group[:, None] < group[None]] == 0).all()
    if num_groups == 9:  # x_i = E[x_i | x_<i] + its own deviation times its noise: Cholesky
        torch.testing.assert_close(made, torch.linalg.cholesky(COVARIANCE), rtol=0, atol=0.01)


def test_ancestral_at_eta_0_is_euler():
    torch.manual_seed(0)
    x_1 = torch.randn(4, 9, 1, dtype=torch.float64)
    oracle = Gaussian(COVARIANCE, Cosine())
    ends = [
        run(oracle, x_1, Cosine(), step, RollingSchedule(3, 0.5), 8).x_t
        for step in (Euler(), Ancestral(0.0))
    ]
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta"):
        Ancestral(eta)


@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 1.0), (2, 0.0), (4, 0.5), (6, 0.0)])
def test_a_finite_data_set_comes_back_whole_and_evenly(num_groups, overlap):
    torch.manual_seed(0)
    points = torch.randn(5, 6, 2, dtype=torch.float64)
    oracle = FiniteData(points, Rectified())
    x_1 = torch.randn(2000, 6, 2, dtype=torch.float64)
    made = run(oracle, x_1, Rectified(), Heun(), RollingSchedule(num_groups, overlap), 40).x_t
    distance = (made[:, None] - points).square().sum((-1, -2))
    nearest, index = distance.min(1)
    assert (nearest < 1e-2).double().mean() > 0.98, "samples are data points"
    counts = index.bincount(minlength=5).double()
    # Standard error of a count: sqrt(2000 * 0.2 * 0.8) = 17.9; four of them.
    assert (counts - 400).abs().max() < 4 * 17.9


class _SigmaOfT(Euler):
    """A deliberate mistake: the noise of the time left, not of the time reached."""

    def __call__(self, denoise, x_t, t, s, *, last=None, draw):
        estimate = denoise(x_t, t)
        return s.alpha * estimate.x + t.sigma * estimate.eps, estimate


class _Short(RollingSchedule):
    """A deliberate mistake: the last step is dropped."""

    def num_steps(self, steps):
        return super().num_steps(steps) - 1


def test_deliberate_mistakes_are_seen():
    good = error(Rectified(), Euler(), RollingSchedule(3), 64)
    assert error(Rectified(), _SigmaOfT(), RollingSchedule(3), 64) > 3 * good
    assert error(Rectified(), Heun(), _Short(3), 64) > 10 * error(
        Rectified(), Heun(), RollingSchedule(3), 64
    )
