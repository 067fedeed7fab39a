"""The variational bound in continuous time, along the schedule of the groups.

    -log p(x) <= -E log p(x | x_s) + 1/2 int_s^1 |lambda'| sum_i E (eps_i - eps_i*)^2 dt

(Kingma et al. 2021, VDM, eq. 11 and 15), where `lambda` is the log-SNR and the sum is over the
tokens that move: a line integral of their denoising errors in their log-SNRs. The prior term is 0
if `alpha(1) = 0`. All windows of an image are evaluated in one call.

The integral is a mean over random noise levels. They are drawn more often where the error matters,
stratified over the samples and the windows; and the part of the error that is due to the noise
alone, whose mean is known, is taken out as a control variate.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.diffusion.process import (
    NoiseSchedule,
    PerSampleNoise,
    coefficients,
    loss_weight,
)
from rolldiff.likelihood.config import LikelihoodConfig
from rolldiff.likelihood.teacher import Teacher

__all__ = ["bound"]

# Noise levels are drawn by a density of log-SNR that falls off as the error does on both sides: as
# the SNR where there is much noise, not at all where there is little.
LOG_SNR_KNEE = 0.0


def bound(
    teacher: Teacher,
    image: Tensor,
    config: LikelihoodConfig,
    *,
    tokens: Callable[[Tensor], Tensor],
    samples: PerSampleNoise,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """The bound of the log-likelihood; it has a gradient where torch records one.

    Args:
        teacher: the network, shown the images.
        image: the images.
        config: how.
        tokens: from images to tokens in decode order, an orthonormal map.
        samples: the noise of each image.

    Returns:
        The bound and its standard error.
    """
    noise, t_min = teacher.noise, config.first_time(teacher.noise)
    first = torch.tensor(t_min, dtype=torch.float64)
    scale = float(noise.sigma(first) / noise.alpha(first))  # of the noise at t_min, over the signal
    numbers, golden = image[0].numel(), (math.sqrt(5) - 1) / 2
    start = samples.uniform(1).to(image.device)  # [B, 1]
    cuts = torch.Generator().manual_seed(samples.seed % 2**63)  # the same for all images
    nats, variance = torch.zeros_like(start[:, 0]), torch.zeros_like(start[:, 0])
    if config.dequantization == "uniform":
        nats = nats + numbers * math.log(config.spacing)
    if config.dequantization != "discretised":
        nats = nats - numbers * (1 + math.log(2 * math.pi * scale**2)) / 2
    nats = nats - _prior(noise, image)
    group = teacher.group if teacher.num_groups > 1 else torch.zeros_like(teacher.group)
    for i, law in enumerate(_laws(teacher)):
        # As many strata of the noise level as possible, each with windows that begin everywhere.
        offsets = min(law.size, config.samples)
        strata = math.ceil(config.samples / offsets)
        strata += strata % 2 if law.size > 1 else 0  # two halves, see `_draw_phase`
        shares: list[Tensor | None] = [None] * offsets
        values = []
        for m in range(strata):
            places = torch.arange(offsets) + torch.rand(1, generator=cuts)
            total = torch.zeros_like(start[:, 0])
            for j, offset in enumerate((places * law.size / offsets).long().tolist()):
                plan = law.windows(group, offset)
                x = image
                if config.dequantization == "uniform":
                    x = image + config.spacing * (samples.uniform(*image.shape[1:]).to(x) - 0.5)
                if config.dequantization == "discretised" and i == 0:
                    eps = samples.normal(*image.shape[1:]).to(image)
                    total = total + _reconstruction(
                        image, scale * eps, levels=config.levels, scale=scale
                    )
                x = tokens(x)
                w = torch.arange(plan.num_windows, device=x.device)
                u = (m + torch.frac(start + golden * (w + j * law.size))) / strata  # [B, W]
                eps = samples.normal(*x.shape[1:]).to(x)
                here, shares[j] = _errors(teacher, x, eps, plan, u=u, t_min=t_min, share=shares[j])
                total = total + here
            values.append(total / offsets)
        found = torch.stack(values)  # [strata, B]
        nats = nats - found.mean(0)
        # Successive values are of neighbouring strata. The mean of no differences is NaN.
        halves = found.detach().chunk(2 if law.size > 1 else 1)
        steps = torch.cat([half.diff(dim=0) for half in halves])
        variance = variance + steps.square().mean(0) / (2 * strata)
    return nats, variance.sqrt()


def _prior(noise: NoiseSchedule, x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """`KL(N(alpha x, sigma^2) | N(0, 1))` at t = 1, in nats: what is known of an image there."""
    end = torch.ones((), dtype=torch.float64)
    signal, variance = noise.alpha(end).square().to(x), noise.sigma(end).square().to(x)
    return (signal * x.square() + variance - 1 - variance.log()).flatten(1).sum(1) / 2


class Law(NamedTuple):
    """Windows that hold the same number of groups.

    The group at the place `i` of a window has the time `(i + phase) lag`.

    Attributes:
        size: groups of a whole window.
        lag: `l`, between two groups; 1 if a window is a single one.
        low: the lowest phase with which a window holds so many groups.
        high: the highest.
    """

    size: int
    lag: float
    low: float
    high: float

    def windows(self, group: Int[Tensor, " N"], offset: int) -> "Plan":
        """The windows, of which the first lacks `offset` groups.

        Over all offsets below the size, every group is equally often at every place.
        """
        shifted = group + offset
        return Plan(self, shifted // self.size, shifted % self.size)


class Plan(NamedTuple):
    """How the groups of an image are cut into windows.

    Attributes:
        law: of the windows.
        window: of each token.
        place: `i` of each token.
    """

    law: Law
    window: Int[Tensor, " N"]
    place: Int[Tensor, " N"]

    @property
    def num_windows(self) -> int:
        return int(self.window[-1]) + 1


def _laws(teacher: Teacher) -> Iterator[Law]:
    """A law for every number of groups that a window can hold."""
    lag = 1 - teacher.overlap
    whole = math.floor(1 / lag + 1e-9)
    share = max(0.0, 1 / lag - whole)  # of the phases with one group more
    for size, low, high in ((whole + 1, 0.0, share), (whole, share, 1.0)):
        if high - low > 1e-9:
            yield Law(size, lag, low, high)


def _errors(
    teacher: Teacher,
    x: Float[Tensor, "B N D"],
    eps: Float[Tensor, "B N D"],
    plan: Plan,
    *,
    u: Float[Tensor, "B W"],
    t_min: float,
    share: Float[Tensor, "B size"] | None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B size"]]:
    """`1/2 int |lambda'| sum_i (eps_i - eps_i*)^2 dt` of a plan, at one noise level per window.

    Returns:
        The sum, and for every place in a window the share of its error due to its own noise.
    """
    noise, prediction = teacher.noise, teacher.prediction
    span = 1 - t_min
    law = plan.law
    phase, density = _draw_phase(u, law, noise, t_min=t_min)  # [B, W] each
    t = t_min + span * law.lag * (plan.place + phase[:, plan.window])  # [B, N]
    weight = span * law.lag * law.size / density[:, plan.window]
    inside = t < 1
    t = t.clamp(max=1 - 1e-9)
    x_t = noise.add_noise(x, eps, t.to(x)).to(x)
    single = plan.num_windows == 1
    predict = (
        teacher.together()
        if single
        else teacher.windows(plan.window, cached=not torch.is_grad_enabled())
    )
    y = predict(x_t, t.to(x))
    a, b = (part[..., None].to(x) for part in coefficients(prediction, noise, t))
    miss = ((a * x + b * eps) - y).double()
    factor = loss_weight(prediction, noise, t, space="eps")
    error = factor * miss.square().sum(-1)
    # Some share of the error is that of the noise itself, whose mean is known. The share of the
    # sample before, in the next stratum, is independent of this noise.
    if share is None:
        known = torch.sigmoid(noise.log_snr(t) - LOG_SNR_KNEE)
    else:
        known = share[:, plan.place]
    error = error - known * (eps.double().square() - 1).sum(-1)
    total = (weight * noise.log_snr_slope(t) / 2 * error).where(inside, 0.0).sum(1)
    sign = torch.where(b * noise.alpha(t)[..., None] > a * noise.sigma(t)[..., None], 1.0, -1.0)
    here = factor.sqrt() * (sign * miss * eps).detach().mean(-1)  # [B, N]
    places = F.one_hot(plan.place, law.size).double()
    count = places.sum(0)
    means = (here @ places / count.clamp(min=1)).clamp(0, 1)
    return total, means if share is None else means.where(count > 0, share)


def _draw_phase(
    u: Float[Tensor, "B W"], law: Law, noise: NoiseSchedule, *, t_min: float
) -> tuple[Tensor, Tensor]:
    """Phases in `low … high`, and their density.

    The log-SNR of the first group of a window is drawn with a density like the error's. If a window
    holds more than one group, half of the phases are uniform instead, for the others.
    """
    span = (1 - t_min) * law.lag
    low, high = (t_min + span * end for end in (law.low, law.high))
    ends = noise.log_snr(torch.tensor([high, low], dtype=torch.float64, device=u.device))
    bottom, top = F.softplus(ends - LOG_SNR_KNEE)  # bottom is 0 at t = 1
    mixed = law.size > 1
    v = torch.frac(2 * u) if mixed else u
    area = (bottom + v * (top - bottom)).clamp(min=1e-12)
    t = noise.time(area + torch.log(-torch.expm1(-area)) + LOG_SNR_KNEE)  # softplus inverted
    phase = ((t - t_min) / span).clamp(law.low, law.high)
    if mixed:
        phase = phase.where(u < 0.5, law.low + v * (law.high - law.low))
    t = (t_min + span * phase).clamp(max=1 - 1e-9)
    log_snr = noise.log_snr(t)
    density = torch.sigmoid(log_snr - LOG_SNR_KNEE) / (top - bottom)
    density = density * noise.log_snr_slope(t) * span
    if mixed:
        density = (density + 1 / (law.high - law.low)) / 2
    return phase, density


def _reconstruction(
    image: Float[Tensor, "B C H W"], noise: Tensor, *, scale: float, levels: int
) -> Float[Tensor, " B"]:
    """`-log p(x | x_s)`, each level around a noisy value as likely as its distance says."""
    spacing = 2 / (levels - 1)
    k = (image.double() + 1) / spacing
    reach = min(levels - 1, math.ceil(10 * scale / spacing))
    total = torch.full_like(k, -torch.inf)
    for shift in range(-reach, reach + 1):
        exists = (k + shift > -0.5) & (k + shift < levels - 0.5)
        log_ratio = (noise.double().square() - (noise.double() - shift * spacing).square()) / 2
        total = torch.logaddexp(total, (log_ratio / scale**2).where(exists, -torch.inf))
    return total.flatten(1).sum(1)
