import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Cosine, Rectified

KINDS = [Rectified, Cosine]
shifts = st.floats(0.1, 10)


@pytest.mark.parametrize("kind", KINDS)
@given(shift=shifts)
def test_the_ends_are_exact(kind, shift):
    noise = kind(shift)
    ends = torch.tensor([0.0, 1.0])
    assert noise.alpha(ends).tolist() == [1, 0]
    assert noise.sigma(ends).tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@given(shift=shifts)
def test_monotone_and_rates_are_derivatives(kind, shift):
    noise = kind(shift)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    assert (noise.log_snr(t).diff() < 0).all()
    for level, rate in zip((noise.alpha, noise.sigma), noise.rates(t), strict=True):
        (derivative,) = torch.autograd.grad(level(t).sum(), t)
        torch.testing.assert_close(rate, derivative, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(shift=shifts)
def test_shift_divides_the_ratio_of_data_to_noise(kind, shift):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    ratio, plain = (n.alpha(t) / n.sigma(t) for n in (kind(shift), kind()))
    torch.testing.assert_close(ratio * shift, plain)


def test_cosine_keeps_the_variance():
    noise, t = Cosine(2.0), torch.linspace(0, 1, 11)
    torch.testing.assert_close(noise.alpha(t) ** 2 + noise.sigma(t) ** 2, torch.ones(11))


def test_perturb_gives_each_token_its_own_time():
    noise, x, eps = Rectified(), torch.ones(2, 2, 2), torch.zeros(2, 2, 2)
    t = torch.tensor([[0.0, 0.5], [1.0, 0.25]])  # B = N = D: a wrong axis would show
    assert noise.perturb(x, eps, t)[..., 0].tolist() == [[1, 0.5], [0, 0.75]]


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_shift(shift):
    with pytest.raises(ValueError, match="shift"):
        Rectified(shift)
