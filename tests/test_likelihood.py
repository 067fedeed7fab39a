"""Likelihoods are those of exact denoisers, at every group count, order and overlap."""

import math

import numpy as np
import pytest
import torch

from oracles import masked_decoder, natural_covariance
from rolldiff import Cosine, Guidance, LinearBeta, Midpoint, Rectified
from rolldiff.errors import UsageError
from rolldiff.likelihood import LikelihoodConfig


@pytest.fixture
def smooth(make):
    """Decoders with random weights whose velocity changes slowly with the time."""

    def build(*, octaves=12, **arguments):
        decoder = make(
            **({"dtype": torch.float64, "prediction": "velocity", "depth": 1} | arguments)
        )
        hidden = decoder.backbone.time_embed.hidden.weight.data.view(-1, 2, 32)
        hidden[..., octaves:] = 0  # of the 32 octaves of Fourier features
        return decoder

    return build


SETTINGS = [
    {"num_groups": 1},
    {"num_groups": 4},
    {"num_groups": 16, "order": "random:0"},
    {"num_groups": 4, "overlap": 0.5},
    {"num_groups": 4, "overlap": 0.3, "order": "centre_out"},
    {"num_groups": 3, "overlap": 0.75},
    {"num_groups": 4, "overlap": 1.0},
]
SLOW = pytest.mark.slow
# All settings once; more of them with another noise or more samples are slow.
SOME = [case if i in (1, 3) else pytest.param(case, marks=SLOW) for i, case in enumerate(SETTINGS)]
DENSITY = {"dequantization": None, "tolerance": 1e-4}


def gaussian(count, *, scale=0.2, side=4, noise=Rectified(), seed=0):
    """A decoder of `N(0, covariance)`, images of it, and their log-density with the first noise."""
    covariance = scale**2 * natural_covariance(side)
    torch.manual_seed(seed)
    x = torch.randn(count, side**2, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    first = torch.tensor(LikelihoodConfig(dequantization=None).first_time(noise)).double()
    smooth = covariance + (noise.sigma(first) / noise.alpha(first)) ** 2 * torch.eye(side**2)
    exact = torch.distributions.MultivariateNormal(torch.zeros(side**2).double(), smooth)
    decoder = masked_decoder(covariance, noise)
    return decoder, x.clamp(-1, 1).view(-1, 1, side, side), exact.log_prob(x.clamp(-1, 1))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_ode_is_the_density_at_every_setting(settings):
    the_ode_is_the_density(settings, Rectified())


@pytest.mark.parametrize("settings", SOME, ids=str)
@pytest.mark.slow
def test_the_ode_is_the_density_with_another_noise(settings):
    the_ode_is_the_density(settings, Cosine(shift=2.0))


def the_ode_is_the_density(settings, noise):
    decoder, image, exact = gaussian(3, noise=noise)
    found = decoder.log_likelihood(image, **settings, **DENSITY, divergence="exact")
    # The tolerance is 1e-4 bits per dimension, of 16.
    assert torch.allclose(found.nats, exact, atol=1e-4 * 16 * math.log(2), rtol=0)
    assert (found.solver_error <= 1e-4).all()
    assert (found.standard_error == 0).all()
    assert torch.allclose(found.bits_per_dim, -exact / (16 * math.log(2)), atol=1e-4)
    assert found.divergence == "exact"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bound_is_the_density_at_every_setting(settings):
    the_bound_is_the_density(settings, samples=8)


@pytest.mark.parametrize("settings", SOME, ids=str)
def test_the_error_of_the_bound_is_the_one_reported(settings):
    the_bound_is_the_density(settings, samples=96)


@torch.no_grad()
def the_bound_is_the_density(settings, *, samples):
    decoder, image, exact = gaussian(24)
    found = decoder.log_likelihood(
        image, **settings, dequantization=None, method="bound", samples=samples
    )
    error = found.nats - exact
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(24)
    if samples == 96:
        reported = (found.standard_error * 16 * math.log(2)).square().mean().sqrt()
        assert 0.4 < error.square().mean().sqrt() / reported < 1.7  # strata differ by themselves
    assert found.products == 0
    assert found.divergence is None


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.slow
@torch.no_grad()
def test_the_bound_counts_what_the_last_time_leaves_of_the_signal(num_groups):
    """It is below the density by how far the data's own law at t = 1 is from the noise there."""
    noise, side = LinearBeta(beta_end=1e-3), 4  # alpha(1)^2 is 0.58
    decoder, image, exact = gaussian(24, noise=noise)
    end, eye = torch.ones(()).double(), torch.eye(side**2).double()
    signal, variance = noise.alpha(end) ** 2, noise.sigma(end) ** 2
    mean, covariance = signal.sqrt() * image.flatten(1), 0.2**2 * natural_covariance(side)

    def divergence(other):
        """From `N(mean, variance)` to `N(0, other)`."""
        inner = (variance * other.inverse()).trace() + (mean @ other.inverse() * mean).sum(1)
        return (inner - side**2 + other.logdet() - side**2 * variance.log()) / 2

    expected = exact + divergence(signal * covariance + variance * eye) - divergence(eye)
    found = decoder.log_likelihood(
        image, num_groups=num_groups, dequantization=None, method="bound", samples=32
    )
    error = found.nats - expected
    tolerance = 4 * error.std() / math.sqrt(24)
    assert abs(error.mean()) < tolerance < abs((expected - exact).mean())


def test_products_are_the_numbers_of_a_group():
    decoder, image, _ = gaussian(1)
    fixed = {"dequantization": None, "tolerance": None, "steps": 2, "divergence": "exact"}
    calls = 4 * 2  # Runge-Kutta of fourth order
    for num_groups, numbers in ((1, 16), (4, 4), (16, 1)):
        found = decoder.log_likelihood(image, num_groups=num_groups, **fixed)
        assert found.products == calls * numbers
        assert found.nfe == calls + (num_groups > 1)  # and one that shows the clean tokens


def test_random_signs_are_exact_for_a_number_per_group():
    decoder, image, exact = gaussian(2)
    found = decoder.log_likelihood(image, num_groups=16, divergence="hutchinson", **DENSITY)
    assert torch.allclose(found.nats, exact, atol=2e-3)


def test_hutchinson_agrees_and_its_variance_falls_with_the_probes():
    decoder, image, exact = gaussian(1)
    image = image.expand(200, -1, -1, -1)  # each with probes of its own
    settings = {"dequantization": None, "tolerance": None, "steps": 16}
    spread = {}
    for probes in (1, 4):
        found = decoder.log_likelihood(image, divergence="hutchinson", probes=probes, **settings)
        spread[probes] = found.nats.var()
        mean_error = (found.nats.mean() - exact[0]).abs()
        assert mean_error < 4 * found.nats.std() / math.sqrt(200) + 1e-3
        assert found.products == probes * found.nfe
    assert 2.5 < spread[1] / spread[4] < 6.4  # 4, within three standard errors of 200 draws
    reported = (found.standard_error * 16 * math.log(2)).square().mean()
    assert 0.6 < reported / spread[4] < 1.6


def test_auto_is_exact_for_few_numbers():
    decoder, image, _ = gaussian(1)
    settings = {"dequantization": None, "tolerance": None, "steps": 1}
    assert decoder.log_likelihood(image, **settings).divergence == "exact"
    big = masked_decoder(0.04 * natural_covariance(9))
    image = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    assert big.log_likelihood(image, **settings).divergence == "hutchinson"
    assert big.log_likelihood(image, num_groups=3, **settings).divergence == "exact"


PAIR = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)


def all_images(levels, numbers):
    """Every image of so many levels, `[L^n, 1, 1, n]`."""
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    return torch.cartesian_prod(*[values] * numbers).view(-1, 1, 1, numbers)


@pytest.mark.parametrize("dequantization", ["uniform", "truncated_normal"])
@pytest.mark.parametrize("num_groups", [pytest.param(1, marks=SLOW), 2])
def test_the_probabilities_of_all_images_sum_to_one(num_groups, dequantization):
    decoder, image = masked_decoder(0.2**2 * PAIR), all_images(4, 2)
    # Half a level is one standard deviation of the noise at t = 1/4. A thousandth of the mass lies
    # outside of the levels' cells, which end at 4/3.
    found = decoder.log_likelihood(
        image,
        num_groups=num_groups,
        levels=4,
        samples=30,
        dequantization=dequantization,
        t_min=0.25,
        tolerance=None,
        steps=6,
    )
    assert found.nats.exp().sum() == pytest.approx(1, abs=0.04)


@pytest.mark.slow
def test_importance_samples_are_a_mean_of_probabilities():
    # One pixel: P(x) is the mass of the cell around x, whose log a single sample bounds.
    decoder, levels = masked_decoder(torch.tensor([[0.16]], dtype=torch.float64)), 5
    image = all_images(levels, 1)
    # At t = 1/5 half a level, 1/4, is one standard deviation of the noise.
    cells = torch.distributions.Normal(0.0, math.sqrt(0.16 + 0.25**2))
    x = image.flatten()
    exact = (cells.cdf(x + 0.25) - cells.cdf(x - 0.25)).log()

    def mean_of(samples, count):
        many = image.repeat(count, 1, 1, 1)
        found = decoder.log_likelihood(
            many,
            levels=levels,
            samples=samples,
            dequantization="truncated_normal",
            t_min=0.2,
            tolerance=None,
            steps=8,
        )
        return found.nats.view(count, levels).mean(0), found

    once, found = mean_of(1, 200)
    twenty, found_20 = mean_of(20, 20)
    assert (once < exact).all()
    assert (once < twenty).all()
    assert torch.allclose(twenty, exact, atol=0.05)  # log 20 would be 3.0 more
    assert found.standard_error.isnan().all()
    assert (found_20.standard_error > 0).all()


@torch.no_grad()
@pytest.mark.slow
def test_what_the_discretised_bound_loses_of_a_smooth_density():
    # The noise of one sixth of a level has less entropy than the level's cell by this.
    loss = math.log(6) - math.log(2 * math.pi * math.e) / 2
    decoder, settings = masked_decoder(0.3**2 * PAIR), {"levels": 33, "num_groups": 2}
    image = all_images(33, 2)[33 * 16 + 10 : 33 * 16 + 22]  # the density is flat enough here
    exact = decoder.log_likelihood(image, samples=3, tolerance=None, steps=8, **settings)
    found = decoder.log_likelihood(
        image, method="bound", dequantization="discretised", samples=200, **settings
    )
    gap = exact.nats - found.nats
    error = (found.standard_error**2 + exact.standard_error**2).sqrt() * 2 * math.log(2)
    assert (gap > -4 * error).all()
    assert abs(gap.mean() - 2 * loss) < 4 * error.mean() / math.sqrt(len(gap)) + 0.03


@torch.no_grad()
def test_the_uniform_bound_is_the_mean_of_the_logarithm():
    decoder, image = masked_decoder(0.3**2 * PAIR), all_images(9, 2)[36:45]
    many, settings = image.repeat(40, 1, 1, 1), {"levels": 9, "num_groups": 2}
    ode = decoder.log_likelihood(many, tolerance=None, steps=8, **settings).nats.view(40, -1)
    bound = decoder.log_likelihood(many, method="bound", samples=16, **settings).nats.view(40, -1)
    error = ((ode.var(0) + bound.var(0)) / 40).sqrt()
    assert ((ode.mean(0) - bound.mean(0)).abs() < 4 * error).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ode", "bound"])
@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=str)
@torch.no_grad()
def test_an_image_has_its_likelihood_alone_and_in_a_batch(smooth, method, settings):
    decoder = smooth()
    image = (torch.rand(3, 1, 8, 8).double() * 256).floor() / 255 * 2 - 1
    image, label = image.clamp(-1, 1), torch.tensor([1, 2, 3])
    settings = settings | {"method": method, "samples": 2, "steps": 1, "tolerance": None}
    together = decoder.log_likelihood(image, label, seed=3, **settings)
    alone = decoder.log_likelihood(image[2:], label[2:], seed=3, start_index=2, **settings)
    assert torch.allclose(together.nats[2:], alone.nats, rtol=1e-9)
    assert torch.equal(together.nats, decoder.log_likelihood(image, label, seed=3, **settings).nats)
    other = decoder.log_likelihood(image, label, seed=4, **settings)
    assert not torch.allclose(together.nats, other.nats)


@pytest.mark.slow
def test_the_solver_stops_for_every_image_by_itself(smooth):
    decoder = smooth(num_classes=0)
    image = torch.cat([torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 8, 8) * 2 - 1]).double()
    settings = {"dequantization": None, "num_groups": 4, "steps": 4, "tolerance": 1e-3}
    both = decoder.log_likelihood(image, **settings)
    apart = [decoder.log_likelihood(image[i : i + 1], **settings).nats for i in range(2)]
    assert torch.allclose(both.nats, torch.cat(apart), rtol=1e-9)
    assert (both.solver_error < 1e-3).all()


@pytest.mark.slow
def test_the_error_of_the_solver_is_not_understated(smooth):
    """Of a network that changes so fast with the time that the order is below four."""
    decoder = smooth(num_classes=0, octaves=24)
    image = torch.rand(3, 1, 8, 8).double() * 2 - 1
    settings = {"dequantization": None, "num_groups": 4, "divergence": "exact"}
    found = decoder.log_likelihood(image, steps=8, tolerance=100.0, **settings)
    fine = decoder.log_likelihood(image, steps=32, tolerance=None, **settings)
    # Of single images the last doubling may change less by chance.
    error = (found.bits_per_dim - fine.bits_per_dim).abs().mean()
    reported = found.solver_error.mean()
    assert reported / 15 < error < reported


@pytest.mark.parametrize(
    "settings",
    [
        {"num_groups": 1},
        {"num_groups": 4},
        {"num_groups": 4, "overlap": 0.5, "order": "random:0"},
        {"num_groups": 5, "overlap": 0.75},
        {"num_groups": 3, "overlap": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("prediction", ["velocity", pytest.param("v", marks=SLOW)])
def test_encoding_is_undone_by_decoding(smooth, prediction, settings):
    # Ties the teacher-forced calls to the masks and the cache of a decoding.
    decoder = smooth(prediction=prediction)
    image = torch.rand(2, 1, 8, 8).double() * 2 - 1
    label = torch.tensor([3, 5])
    noise = decoder.encode(image, label, steps=16, **settings)
    again = decoder.decode(label, noise=noise, steps=96, solver=Midpoint(), **settings).image
    assert (again - image).abs().max() < 2e-3  # most of it because the flow leaves at t = 1e-4
    assert noise.shape == image.shape


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[4]], ids=str)
def test_encoding_is_undone_by_decoding_with_an_exact_denoiser(settings):
    decoder, image, _ = gaussian(2)
    noise = decoder.encode(image, steps=16, t_min=1e-5, **settings)
    again = decoder.decode(noise=noise, steps=100, solver=Midpoint(), **settings).image
    assert (again - image).abs().max() < 1e-3


def test_guidance_is_part_of_the_flow(smooth):
    decoder = smooth()
    image, label = torch.rand(1, 1, 8, 8).double() * 2 - 1, torch.tensor([3])
    settings = {"num_groups": 2, "guidance": Guidance(0.7, ramp_from=0.5)}
    noise = decoder.encode(image, label, steps=16, **settings)
    again = decoder.decode(label, noise=noise, steps=96, solver=Midpoint(), **settings).image
    assert (again - image).abs().max() < 2e-3


@pytest.mark.parametrize("num_groups", [1, 4])
def test_guidance_is_part_of_the_bound(make, num_groups):
    """At a scale of -1 it is the bound without a condition."""
    decoder = make(dtype=torch.float64)
    image, label = torch.rand(3, 1, 8, 8).double() * 2 - 1, torch.tensor([3, 1, 4])
    ask = {"dequantization": None, "method": "bound", "num_groups": num_groups, "samples": 2}

    @torch.no_grad()
    def nats(guidance, label=label):
        return decoder.log_likelihood(image, label, guidance=guidance, **ask).nats

    ramp = Guidance(2.0, ramp_from=0.5, interval=(0.1, 0.9))
    assert not torch.isclose(nats(0.0), nats(2.0)).any()
    assert not torch.isclose(nats(2.0), nats(ramp)).any()
    torch.testing.assert_close(nats(-1.0), nats(0.0, label=None))


def test_the_bound_has_a_gradient(smooth):
    decoder = smooth(num_classes=0)
    image = torch.rand(4, 1, 8, 8).double() * 2 - 1
    settings = {"dequantization": None, "method": "bound", "num_groups": 4}
    loss = -decoder.log_likelihood(image, **settings).nats.mean()
    loss.backward()
    weight = decoder.backbone.blocks[0].attn.qkv.weight
    step = 1e-5 * weight.grad / weight.grad.norm()
    values = []
    with torch.no_grad():  # the clean tokens are cached here
        for sign in (1, -1):
            weight += sign * step
            values.append(-decoder.log_likelihood(image, **settings).nats.mean())
            weight -= sign * step
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(weight.grad.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be a whole number in 1"),
        ({"samples": 0}, "samples must be a whole number in 1"),
        ({"overlap": 1.5}, "overlap must be"),
        ({"overlap": 0.99999, "num_groups": 2}, "overlap must be 1 or at most 0.9999"),
        ({"method": "exact"}, "method must be one of ode, bound"),
        ({"method": "bound", "dequantization": "truncated_normal"}, "dequantization with bound"),
        ({"dequantization": "gaussian"}, "dequantization with ode must be one of"),
        ({"dequantization": np.ones(2)}, "dequantization with ode must be one of"),
        ({"divergence": "full"}, "divergence must be one of"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"levels": 1}, "levels must be"),
        ({"t_min": 0.9}, "t_min must be"),
        ({"prob": 3}, "arguments must be"),
    ],
    ids=str,
)
def test_refused_settings(make, unchecked, arguments, message):
    decoder, image = make(), torch.zeros(1, 1, 8, 8) - 1
    with pytest.raises(UsageError, match=message):
        decoder.log_likelihood(image, **arguments)


def test_refused_images(make):
    decoder = make()
    with pytest.raises(UsageError, match="image must hold 256 levels"):
        decoder.log_likelihood(torch.full((1, 1, 8, 8), 1 / 510))
    with pytest.raises(UsageError, match="image must be in \\[-1, 1\\]"):
        decoder.log_likelihood(torch.full((1, 1, 8, 8), 1.5))
    with pytest.raises(UsageError, match="num_groups must be 1 for the likelihood of a bidirect"):
        make(causal=False).log_likelihood(torch.zeros(1, 1, 8, 8) - 1, num_groups=4)


def test_a_likelihood_outside_of_the_training_warns(make):
    decoder = make()
    with pytest.warns(UserWarning, match="decoding beyond what this checkpoint was trained for"):
        decoder.log_likelihood(
            torch.zeros(1, 1, 8, 8) - 1, order="centre_out", num_groups=2, tolerance=None, steps=1
        )
