import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from rolldiff import Grouping
from rolldiff.metrics import (
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    by_band,
    frechet_distance,
    kernel,
    neighbours,
    precision_recall,
    seams,
)


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


def test_kernel_distance_is_that_of_torchmetrics_on_all_samples(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 64)  # several blocks, the last one ragged
    real, fake = torch.randn(150, 8), 1.3 * torch.randn(150, 8) + 0.2
    metric = KernelDistance(8)
    for batch in real.split(70):
        metric.update(batch, real=True)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(fake, real=False)
        found = metric.compute()
    torch.testing.assert_close(found, poly_mmd(real.double(), fake.double()))


def test_kernel_distance_is_unbiased():
    """Two samples of one law: 0 in the mean, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            kernel.kernel_distance(*torch.randn(2, 20, 4, generator=generator, dtype=torch.float64))
            for _ in range(400)
        ]
    )
    assert draws.mean().abs() < 4 * draws.std() / 20


def test_precision_and_recall(monkeypatch):
    """Against loops over the definition."""
    monkeypatch.setattr(neighbours, "BLOCK", 8)
    real, fake = torch.randn(20, 3), torch.randn(15, 3)
    metric = PrecisionRecall(3, neighbours=2)
    metric.update(real, real=True)
    metric.update(fake, real=False)

    def share(points, centres):
        inside = 0
        for point in points:
            balls = (sorted((c - d).norm() for d in centres)[2] for c in centres)
            inside += any((point - c).norm() <= r for c, r in zip(centres, balls, strict=True))
        return inside / len(points)

    found = metric.compute()
    assert found["precision"] == pytest.approx(share(fake.double(), real.double()))
    assert found["recall"] == pytest.approx(share(real.double(), fake.double()))


def test_precision_and_recall_of_what_is_known():
    real = torch.randn(50, 4)
    assert [float(v) for v in precision_recall(real, real)] == [1, 1]
    assert [float(v) for v in precision_recall(real, real + 100)] == [0, 0]
    few = real[:1] + 1e-3 * torch.randn(50, 4)  # one mode: precise, and little is covered
    precision, recall = precision_recall(real, few)
    assert precision == 1
    assert recall < 0.1
    with pytest.raises(ValueError, match="fake must have more than 3 samples, got 3"):
        precision_recall(real, real[:3])


def test_seams():
    group = Grouping(8, 4).group[:, None].expand(8, 8)
    real = torch.rand(200, 1, 8, 8)
    assert seams(real, real, group) == 1
    steps = real + 3 * group  # each group a level higher: the boundary is all the same height
    expected = steps.diff(dim=2)[:, :, 1::2].mean() / real.diff(dim=2)[:, :, 1::2].abs().mean()
    assert float(seams(steps, real, group)) == pytest.approx(float(expected), rel=1e-4)
    assert seams(steps, real, group) > 5
    with pytest.raises(ValueError, match="neighbouring pixels of two groups"):
        seams(real, real, torch.zeros(8, 8, dtype=torch.long))


def test_by_band_sees_drift():
    real, fake = torch.randn(2, 500, 1, 8, 8)
    fake = fake + torch.linspace(0, 2, 8)[:, None]
    found = by_band(fake, real)
    assert len(found) == 4
    assert found == sorted(found)
    assert found[-1] > 10 * found[0]
    whole = FrechetDistance(64)
    whole.update(real.flatten(1), real=True)
    whole.update(fake.flatten(1), real=False)
    assert by_band(fake, real, bands=1)[0] == pytest.approx(float(whole.compute()))
    with pytest.raises(ValueError, match="bands must be in 1 … 8"):
        by_band(fake, real, bands=9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, PrecisionRecall])
def test_bad_features(kind):
    metric = kind(4)
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\)"):
        metric.update(torch.zeros(3, 5), real=True)
    metric.update(torch.zeros(1, 4), real=True)
    with pytest.raises(ValueError, match="two real samples"):
        metric.compute()
    metric.update(torch.zeros(3, 4), real=True)
    with pytest.raises(ValueError, match="two fake samples"):
        metric.compute()
