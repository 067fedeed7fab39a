import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Cosine, Rectified
from rolldiff.prediction import coefficients, inverse, solve, squared_error, weight

KINDS = ["x", "eps", "v", "velocity"]
NOISES = [Rectified(), Rectified(3.0), Cosine(), Cosine(0.5)]


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@given(t=st.floats(0.02, 0.98))
def test_solve_recovers_data_and_noise(noise, kind, t):
    times = torch.full((2, 3), t, dtype=torch.float64)
    x, eps = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    a, b = (c[..., None] for c in coefficients(kind, noise, times))
    y, x_t = a * x + b * eps, noise.perturb(x, eps, times)
    estimate = solve(y, x_t, inverse(kind, noise, times[..., None]))
    torch.testing.assert_close(estimate.x, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.eps, eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_space_is_a_weight(noise, kind, loss):
    t = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)
    x, eps, y = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    a, b = (c[:, None] for c in coefficients(kind, noise, t))
    estimate = solve(y, noise.perturb(x, eps, t), inverse(kind, noise, t[None, :, None]))
    c, d = (c[:, None] for c in coefficients(loss, noise, t))
    direct = (c * (estimate.x - x) + d * (estimate.eps - eps)).square()
    weighted = weight(kind, loss, noise, t)[:, None] * (y - a * x - b * eps).square()
    torch.testing.assert_close(direct, weighted)


@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_has_a_finite_estimate(kind):
    y, x_t = torch.randn(2, 1, 2, 3)
    estimate = solve(y, x_t, inverse(kind, Rectified(), torch.ones(1, 2, 1)))
    assert estimate.x.isfinite().all()
    assert estimate.eps.isfinite().all()


@pytest.mark.usefixtures("unchecked")
def test_bad_prediction():
    with pytest.raises(ValueError, match="prediction must be one of x, eps, v, velocity"):
        coefficients("z", Rectified(), torch.ones(1))


def test_squared_error_is_a_mean_over_moving_tokens():
    t = torch.tensor([[0.0, 0.5, 1.0, 0.25]])
    x, eps, y = torch.randn(3, 1, 4, 2)
    ask = {"prediction": "velocity", "loss": "velocity", "noise": Rectified()}
    error = (y - (eps - x)).square().mean(-1)[0]
    found = squared_error(y, x, eps, t, **ask)
    torch.testing.assert_close(found, (error[1] + error[3]) / 2)
    assert squared_error(y, x, eps, t.round(), **ask) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_finite_up_to_the_ends(kind):
    t = torch.tensor([[1e-6, 1 - 1e-6]])
    x, eps, y = torch.randn(3, 1, 2, 2)
    ask = {"prediction": kind, "loss": "velocity", "noise": Rectified()}
    assert squared_error(y, x, eps, t, **ask) < 1e4
