import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from rolldiff.metrics import FrechetDistance, frechet_distance


def test_closed_form_for_gaussians():
    """Commuting covariances: the sum over axes of squared differences of standard deviations."""
    a, b = torch.rand(2, 5, dtype=torch.float64) + 0.1
    mean_a, mean_b = torch.randn(2, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    covariances = ((turn * s**2) @ turn.T for s in (a, b))
    cov_a, cov_b = covariances
    expected = (mean_a - mean_b).square().sum() + (a - b).square().sum()
    torch.testing.assert_close(frechet_distance(mean_a, cov_a, mean_b, cov_b), expected)


def test_equal_to_torchmetrics_on_the_same_features():
    real, fake = torch.randn(300, 8), 1.3 * torch.randn(200, 8) + 0.2
    metric = FrechetDistance(8)
    for batch in real.split(70):
        metric.update(batch, real=True)
    metric.update(fake, real=False)
    moments = [m for f in (real.double(), fake.double()) for m in (f.mean(0), f.T.cov())]
    torch.testing.assert_close(metric.compute(), _compute_fid(*moments), rtol=1e-8, atol=1e-10)


def test_immune_to_autocast_and_zero_for_the_same_set():
    f = torch.randn(100, 4) + 100
    metric = FrechetDistance(4)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(f, real=True)
        metric.update(f, real=False)
        value = metric.compute()
    assert value.dtype == torch.float64
    assert abs(value) < 1e-8


@pytest.mark.usefixtures("unchecked")
def test_bad_features():
    metric = FrechetDistance(4)
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\)"):
        metric.update(torch.zeros(3, 5), real=True)
    metric.update(torch.zeros(1, 4), real=True)
    with pytest.raises(ValueError, match="two real samples"):
        metric.compute()
