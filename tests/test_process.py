"""The noise schedules, the 2 x 2 solve of every prediction, and noise per sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Cosine, LinearBeta, Rectified
from rolldiff.diffusion.process import (
    PerSampleNoise,
    coefficients,
    denoising_loss,
    inverse,
    loss_weight,
    to_x_eps,
)

SCHEDULES = [Rectified, Cosine]
ALL = [*SCHEDULES, LinearBeta]
shifts = st.floats(0.1, 10)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(shift=shifts)
def test_the_ends_are_exact(kind, shift):
    noise = kind(shift)
    ends = torch.tensor([0.0, 1.0])
    assert noise.alpha(ends).tolist() == [1, 0]
    assert noise.sigma(ends).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ALL)
@given(shift=shifts)
def test_monotone_and_rates_are_derivatives(kind, shift):
    noise = kind(shift)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    assert (noise.log_snr(t).diff() < 0).all()
    for level, rate in zip((noise.alpha, noise.sigma), noise.rates(t), strict=True):
        (derivative,) = torch.autograd.grad(level(t).sum(), t)
        torch.testing.assert_close(rate, derivative, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ALL)
@given(shift=shifts)
def test_shift_divides_the_ratio_of_data_to_noise(kind, shift):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    ratio, plain = (n.alpha(t) / n.sigma(t) for n in (kind(shift), kind()))
    torch.testing.assert_close(ratio * shift, plain)


@pytest.mark.parametrize(
    ("settings", "last"),
    [({}, 0.0064), ({"beta_start": 1e-3, "beta_end": 0.1, "num_timesteps": 100}, 0.0732)],
)
def test_linear_beta_is_the_product_of_ddpm(settings, last):
    noise = LinearBeta(**settings)
    steps = noise.num_timesteps
    beta = torch.linspace(noise.beta_start, noise.beta_end, steps, dtype=torch.float64)
    product = (1 - beta).cumprod(0)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(noise.alpha(t) ** 2, product, rtol=1e-11, atol=0)
    torch.testing.assert_close(noise.sigma(t) ** 2, 1 - product, rtol=1e-9, atol=0)
    assert noise.alpha(t[-1:]).item() == pytest.approx(last, rel=0.02)
    start = torch.zeros(1)
    assert (noise.alpha(start), noise.sigma(start)) == (1, 0)
    assert all(rate.isfinite() for rate in noise.rates(start))
    torch.testing.assert_close(noise.alpha(t.float()).double(), noise.alpha(t), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"beta_start": 0.02}, {"beta_end": 0.5}, {"num_timesteps": 10}, {"beta_start": 0.0}],
    ids=str,
)
def test_bad_betas(settings):
    with pytest.raises(ValueError, match="beta|timesteps"):
        LinearBeta(**settings)


@pytest.mark.parametrize("noise", [Cosine(2.0), LinearBeta(2.0)], ids=repr)
def test_the_variance_is_kept(noise):
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(noise.alpha(t) ** 2 + noise.sigma(t) ** 2, torch.ones(11))


def test_add_noise_gives_each_token_its_own_time():
    noise, x, eps = Rectified(), torch.ones(2, 2, 2), torch.zeros(2, 2, 2)
    t = torch.tensor([[0.0, 0.5], [1.0, 0.25]])  # B = N = D: a wrong axis would show
    assert noise.add_noise(x, eps, t)[..., 0].tolist() == [[1, 0.5], [0, 0.75]]


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_shift(shift):
    with pytest.raises(ValueError, match="shift"):
        Rectified(shift)


KINDS = ["x", "eps", "v", "velocity"]
NOISES = [Rectified(), Rectified(3.0), Cosine(), Cosine(0.5)]


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@given(t=st.floats(0.02, 0.98))
def test_to_x_eps_recovers_data_and_noise(noise, kind, t):
    times = torch.full((2, 3), t, dtype=torch.float64)
    x, eps = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    a, b = (c[..., None] for c in coefficients(kind, noise, times))
    y, x_t = a * x + b * eps, noise.add_noise(x, eps, times)
    estimate = to_x_eps(y, x_t, inverse(kind, noise, times[..., None]))
    torch.testing.assert_close(estimate.x, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.eps, eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_space_is_a_weight(noise, kind, loss):
    t = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)
    x, eps, y = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    a, b = (c[:, None] for c in coefficients(kind, noise, t))
    estimate = to_x_eps(y, noise.add_noise(x, eps, t), inverse(kind, noise, t[None, :, None]))
    c, d = (c[:, None] for c in coefficients(loss, noise, t))
    direct = (c * (estimate.x - x) + d * (estimate.eps - eps)).square()
    weighted = loss_weight(kind, noise, t, space=loss)[:, None] * (y - a * x - b * eps).square()
    torch.testing.assert_close(direct, weighted)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_the_bound_is_half_the_slope_of_the_log_snr(noise, kind):
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise.log_snr(t).sum(), t)
    t = t.detach()
    expected = -slope / 2 * loss_weight(kind, noise, t, space="eps")
    torch.testing.assert_close(loss_weight(kind, noise, t, space="bound"), expected)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_time_is_the_inverse_of_the_log_snr(noise):
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(noise.time(noise.log_snr(t)), t)
    assert noise.time(torch.tensor(-torch.inf)) == 1
    assert noise.time(torch.tensor(torch.inf)) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_has_a_finite_estimate(kind):
    y, x_t = torch.randn(2, 1, 2, 3)
    estimate = to_x_eps(y, x_t, inverse(kind, Rectified(), torch.ones(1, 2, 1)))
    assert estimate.x.isfinite().all()
    assert estimate.eps.isfinite().all()


@pytest.mark.usefixtures("unchecked")
def test_bad_prediction():
    with pytest.raises(ValueError, match="prediction must be one of x, eps, v, velocity"):
        coefficients("z", Rectified(), torch.ones(1))


def test_the_loss_is_a_mean_over_moving_tokens():
    t = torch.tensor([[0.1, 0.5, 0.0, 0.25]])
    x, eps, y = torch.randn(3, 1, 4, 2)
    ask = {"prediction": "velocity", "space": "velocity", "noise": Rectified()}
    error = (y - (eps - x)).square().mean(-1)[0]
    moving = torch.tensor([[False, True, False, True]])
    found = denoising_loss(y, x, eps, t=t, moving=moving, **ask)
    torch.testing.assert_close(found, (error[1] + error[3]) / 2)
    assert denoising_loss(y, x, eps, t=t, moving=moving & False, **ask) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_finite_up_to_the_ends(kind):
    t = torch.tensor([[1e-6, 1 - 1e-6]])
    x, eps, y = torch.randn(3, 1, 2, 2)
    ask = {"prediction": kind, "space": "velocity", "noise": Rectified(), "moving": t > 0}
    assert denoising_loss(y, x, eps, t=t, **ask) < 1e4


def test_a_sample_has_its_own_generator():
    together = PerSampleNoise(3, 4).normal(5, 2)
    for i in range(4):
        assert torch.equal(PerSampleNoise(3, 1, start_index=i).normal(5, 2)[0], together[i])
    assert len({row.sum().item() for row in together}) == 4
    assert not torch.equal(PerSampleNoise(4, 4).normal(5, 2), together)


def test_later_draws_are_new_and_reproducible():
    a, b = PerSampleNoise(0, 2), PerSampleNoise(0, 2)
    first = a.normal(3)
    assert torch.equal(first, b.normal(3))
    assert not torch.equal(first, a.normal(3))


def test_neighbouring_samples_are_independent_unit_noise():
    draws = PerSampleNoise(0, 200).normal(500)
    assert abs(draws.mean()) < 4 / 1e5**0.5
    assert abs(draws.var() - 1) < 4 * (2 / 1e5) ** 0.5
    neighbours = (draws[1:] * draws[:-1]).mean()
    assert abs(neighbours) < 4 / 1e5**0.5


def test_no_seed_is_a_new_seed():
    assert not torch.equal(PerSampleNoise(None, 1).normal(4), PerSampleNoise(None, 1).normal(4))


@pytest.mark.parametrize(("seed", "first"), [(-1, 0), (0, -1), ("a", 0), (1.5, 0)])
@pytest.mark.usefixtures("unchecked")
def test_bad_seed(seed, first):
    with pytest.raises(ValueError, match="seed|start_index"):
        PerSampleNoise(seed, 1, start_index=first)
