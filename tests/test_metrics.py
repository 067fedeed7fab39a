"""Metrics against closed forms, torchmetrics and loops over their definitions."""

import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from rolldiff import GroupSchedule
from rolldiff.evaluation import metrics
from rolldiff.evaluation.images import all_finite
from rolldiff.evaluation.metrics import (
    band_distances,
    frechet_distance,
    kernel_distance,
    pixel_distance,
    precision_recall,
    psnr,
    seam_ratio,
)


def of_gaussians(mean_a, cov_a, mean_b, cov_b):
    """The Fréchet distance from means and covariances, by two symmetric eigenvalue problems."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def moments(*sides):
    return [m for f in sides for m in (f.double().mean(0), f.double().T.cov())]


@pytest.mark.parametrize("few", [False, True])
def test_frechet_distance_is_the_closed_form_for_gaussians(few):
    """Samples with the wanted moments exactly; with few, one side spans fewer axes than there are.

    Covariances that commute: the sum over axes of squared differences of standard deviations.
    """
    size = 6
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    a, b = torch.rand(2, size, dtype=torch.float64) + 0.1
    if few:
        b[4:] = 0  # five samples have four axes
    mean_a, mean_b = torch.randn(2, size, dtype=torch.float64)

    def samples(count, scale, mean):
        white = torch.randn(count, count, dtype=torch.float64)
        white = torch.linalg.qr(white - white.mean(0)).Q[:, : min(count - 1, size)]
        white = torch.nn.functional.pad(white, (0, size - white.shape[1]))
        return white * (count - 1) ** 0.5 * scale @ turn.T + mean

    found = frechet_distance(samples(40, a, mean_a), samples(5 if few else 30, b, mean_b))
    expected = (mean_a - mean_b).square().sum() + (a - b).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", [(300, 200), (20, 200), (200, 20), (20, 12), (17, 16)])
def test_frechet_distance_equals_both_eigenvalue_forms(counts):
    """Ours and that of torchmetrics; covariances of few samples cost those half of the digits."""
    size = 16
    real = torch.randn(counts[0], size, dtype=torch.float64) + 3
    fake = torch.randn(counts[1], size, dtype=torch.float64) @ torch.randn(size, size).double()
    tolerance = 1e-9 if min(counts) > size else 1e-6
    found = frechet_distance(real, fake)
    for form in (of_gaussians, _compute_fid):
        other = form(*moments(real, fake))
        torch.testing.assert_close(found, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, frechet_distance(fake, real), rtol=1e-10, atol=1e-10)


def test_frechet_distance_of_fewer_samples_than_features():
    """Its digits are all there: a set is at distance 0 of itself, moved it is the square of that.

    The eigenvalue form is off by the square root of the rounding, once for each missing axis.
    """
    real = torch.randn(20, 300, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    turned = turn @ (real - real.mean(0)) + 100
    assert abs(frechet_distance(real, real)) < 1e-10
    assert abs(frechet_distance(real, real + 0.1) - 3) < 1e-10
    torch.testing.assert_close(
        frechet_distance(real, turned),
        of_gaussians(*moments(real, turned)),
        rtol=1e-6,
        atol=1e-4,
    )


def test_frechet_distance_is_immune_to_autocast():
    real, fake = torch.randn(50, 4) + 100, torch.randn(3, 4) + 100
    with torch.autocast("cpu", torch.bfloat16):
        found = frechet_distance(real, fake)
    assert found.dtype == torch.float64
    assert found == frechet_distance(real.double(), fake.double())
    images = real.view(50, 1, 2, 2), fake.view(3, 1, 2, 2)
    assert pixel_distance(*images) == float(found)


def test_kernel_distance_is_that_of_torchmetrics_on_all_samples(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 64)  # several blocks, the last one ragged
    real, fake = torch.randn(150, 8), 1.3 * torch.randn(150, 8) + 0.2
    with torch.autocast("cpu", torch.bfloat16):
        found = kernel_distance(real, fake)
    torch.testing.assert_close(found, poly_mmd(real.double(), fake.double()))


def test_kernel_distance_is_unbiased():
    """Two samples of one law: 0 in the mean, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            kernel_distance(*torch.randn(2, 20, 4, generator=generator, dtype=torch.float64))
            for _ in range(400)
        ]
    )
    assert draws.mean().abs() < 4 * draws.std() / 20


def test_precision_and_recall(monkeypatch):
    """Against loops over the definition."""
    monkeypatch.setattr(metrics, "BLOCK", 8)
    real, fake = torch.randn(20, 3), torch.randn(15, 3)

    def share(points, centres):
        inside = 0
        for point in points:
            balls = (sorted((c - d).norm() for d in centres)[2] for c in centres)
            inside += any((point - c).norm() <= r for c, r in zip(centres, balls, strict=True))
        return inside / len(points)

    precision, recall = precision_recall(real, fake, k=2)
    assert float(precision) == pytest.approx(share(fake.double(), real.double()))
    assert float(recall) == pytest.approx(share(real.double(), fake.double()))


def test_precision_and_recall_of_what_is_known():
    real = torch.randn(50, 4)
    assert [float(v) for v in precision_recall(real, real)] == [1, 1]
    assert [float(v) for v in precision_recall(real, real + 100)] == [0, 0]
    few = real[:1] + 1e-3 * torch.randn(50, 4)  # one mode: precise, and little is covered
    precision, recall = precision_recall(real, few)
    assert precision == 1
    assert recall < 0.1
    with pytest.raises(ValueError, match="fake must have 4 samples or more, got 3"):
        precision_recall(real, real[:3])


def test_seam_ratio():
    group = GroupSchedule(num_tokens=8, num_groups=4).group[:, None].expand(8, 8)
    real = torch.rand(200, 1, 8, 8)
    assert seam_ratio(real, real, group) == 1
    steps = real + 3 * group  # each group a level higher: the boundary is all the same height
    expected = steps.diff(dim=2)[:, :, 1::2].mean() / real.diff(dim=2)[:, :, 1::2].abs().mean()
    assert float(seam_ratio(real, steps, group)) == pytest.approx(float(expected), rel=1e-4)
    assert seam_ratio(real, steps, group) > 5
    with pytest.raises(ValueError, match="neighbouring pixels of two groups"):
        seam_ratio(real, real, torch.zeros(8, 8, dtype=torch.long))


def test_band_distances_show_drift():
    real, fake = torch.randn(2, 500, 1, 8, 8)
    fake = fake + torch.linspace(0, 2, 8)[:, None]
    found = band_distances(real, fake)
    assert len(found) == 4
    assert found == sorted(found)
    assert found[-1] > 10 * found[0]
    whole = of_gaussians(*moments(real.flatten(1), fake.flatten(1)))
    assert band_distances(real, fake, bands=1)[0] == pytest.approx(float(whole))
    with pytest.raises(ValueError, match="bands must be in 1 … 8"):
        band_distances(real, fake, bands=9)


def test_psnr():
    image = torch.zeros(2, 1, 4, 4)
    assert psnr(image, image + 0.2) == pytest.approx(20)  # 10 log10(4 / 0.04)


@pytest.mark.usefixtures("unchecked")
def test_bad_features_of_frechet_distance():
    good = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\), got \(3, 5\)"):
        frechet_distance(good, torch.zeros(3, 5))
    for args, side in (((good[:1], good), "real"), ((good, good[:1]), "fake")):
        with pytest.raises(ValueError, match=f"{side} must have 2 samples or more, got 1"):
            frechet_distance(*args)
    with pytest.raises(ValueError, match="features must be finite, got fake ones"):
        frechet_distance(good, good.log())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_metric_of_features_that_are_not_finite(metric, bad):
    good = torch.randn(9, 4)
    broken = good.clone()
    broken[5, 2] = bad
    for arguments, side in (((broken, good), "real"), ((good, broken), "fake")):
        with pytest.raises(ValueError, match=f"features must be finite, got {side}"):
            metric(*arguments)
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\), got \(9, 5\)"):
        metric(good, torch.zeros(9, 5))
    with pytest.raises(ValueError, match="fake must have . samples or more, got 1"):
        metric(good, good[:1])


def test_no_metric_of_pixels_that_are_not_finite():
    good, group = torch.rand(4, 1, 4, 4), torch.arange(4)[:, None].expand(4, 4) // 2
    broken = good.where(good < good.max(), torch.nan)
    for arguments in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="finite"):
            seam_ratio(*arguments, group)
        with pytest.raises(ValueError, match="finite"):
            psnr(*arguments)
        with pytest.raises(ValueError, match="finite"):
            band_distances(*arguments)


@pytest.mark.parametrize("counts", [(500, 300), (500, 20), (20, 500)])
def test_frechet_distance_in_parts(monkeypatch, counts):
    """The parts are those of float64 copies; the last one may be short."""
    real, fake = (3 + torch.randn(count, 16).double() for count in counts)
    whole = frechet_distance(real, 2 * fake)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    torch.testing.assert_close(frechet_distance(real, 2 * fake), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, of_gaussians(*moments(real, 2 * fake)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(dtype):
    values = torch.tensor([[1.0, -3.0], [0.0, 2.0]], dtype=dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.where(values == 0, bad, values))


def test_features_whose_squares_are_not_finite_have_no_distance():
    huge = 1e200 * torch.randn(9, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="features must have finite squares"):
        frechet_distance(huge, -huge)


def test_a_distance_is_not_below_zero():
    """The same samples in another order: what remains is rounding, of either sign."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        real = 100 * torch.randn(30, 8, generator=generator)
        assert 0 <= frechet_distance(real, real[torch.randperm(30, generator=generator)]) < 1e-9


def test_a_seam_of_images_without_gradients_is_undefined():
    real, group = torch.rand(9, 1, 4, 4), torch.arange(4)[:, None].expand(4, 4) // 2
    assert seam_ratio(real, torch.zeros(9, 1, 4, 4), group).isnan()
    assert seam_ratio(torch.zeros(9, 1, 4, 4), real, group).isnan()
    assert seam_ratio(real, group.expand(9, 1, 4, 4).float(), group).isnan(), "nothing but seams"


def test_seams_are_measured_in_parts(monkeypatch):
    real, fake = torch.rand(2, 20, 3, 4, 4)
    group = torch.arange(4)[:, None].expand(4, 4) // 2
    whole = seam_ratio(real, fake, group)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    torch.testing.assert_close(seam_ratio(real, fake, group), whole)
