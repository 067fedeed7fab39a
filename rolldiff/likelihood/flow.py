"""The probability-flow equation from data to noise, and the density that follows from it.

    log p(x_s) = log N(x_1; 0, 1) + int_s^1 div v dt        (Chen et al. 2018; Song et al. 2021)

`s > 0` is a time at which there is hardly any noise. At overlap 0 all groups move at once, each
given its own clean prefix, and the Jacobian is block-diagonal over the groups. One vector then
probes every group at once, and the exact divergence takes as many products as one group has
numbers. Between overlap 0 and 1 the groups are coupled in a chain: the last moves first, and a
window rolls back over the image.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.diffusion.process import NoiseSchedule, PerSampleNoise, inverse
from rolldiff.diffusion.schedule import MAX_STEPS
from rolldiff.likelihood.config import EXACT_PRODUCTS, LikelihoodConfig
from rolldiff.likelihood.teacher import Predict, Teacher

__all__ = ["encode", "ode"]

# Half of the steps grow: they are smallest near the data, and twice that this much time later.
STEP_GROWTH = 0.05


def ode(
    teacher: Teacher,
    image: Tensor,
    config: LikelihoodConfig,
    *,
    tokens: Callable[[Tensor], Tensor],
    steps: int,
    samples: PerSampleNoise,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """The log-likelihood by the flow.

    Args:
        teacher: the network, shown the images.
        image: the images.
        config: how.
        tokens: from images to tokens in decode order, an orthonormal map.
        steps: of the solver, from data to noise.
        samples: the noise of each image.

    Returns:
        `log p`, its standard error, the estimated error of the solver, and how the divergence was
        computed.
    """
    t_min = config.first_time(teacher.noise)
    exact = config.divergence == "exact"
    if config.divergence == "auto":
        exact = _products(teacher) <= EXACT_PRODUCTS
    values, errors, variances = [], [], []
    for _ in range(config.samples):
        x, log_q = _noisy(image, config, noise=teacher.noise, samples=samples)
        probes = None
        if not exact:
            shape = (config.probes, *teacher.x.shape[1:])
            probes = (samples.uniform(*shape).to(image) > 0.5).to(image) * 2 - 1  # [B, P, N, D]
        log_p, error = _converged(
            teacher, tokens(x), probes, config=config, steps=steps, t_min=t_min
        )
        count = log_p.shape[1]
        values.append(log_p.mean(1) - log_q)
        variances.append(log_p.var(1) / count if count > 1 else torch.zeros_like(log_p[:, 0]))
        errors.append(error)
    log_w = torch.stack(values)  # [K, B]
    nats = log_w.logsumexp(0) - math.log(config.samples)
    share = log_w.softmax(0)
    error = (share * torch.stack(errors)).sum(0)
    if config.samples > 1:  # the delta method on the logarithm of the mean
        variance = config.samples * share.var(0)
    elif config.dequantization is not None or (not exact and config.probes == 1):
        variance = torch.full_like(nats, torch.nan)
    else:
        variance = variances[0]
    return nats, variance.sqrt(), error, "exact" if exact else "hutchinson"


def _noisy(
    image: Tensor, config: LikelihoodConfig, *, noise: NoiseSchedule, samples: PerSampleNoise
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """The images at the first time, and the logarithm of the density that they are drawn from."""
    first = torch.tensor(config.first_time(noise), dtype=torch.float64)
    alpha, sigma = float(noise.alpha(first)), float(noise.sigma(first))
    shape, numbers = image.shape[1:], image[0].numel()
    none = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    if config.dequantization is None:
        return alpha * image, none - numbers * math.log(alpha)
    u = samples.uniform(*shape).to(image.device)
    if config.dequantization == "uniform":
        x = image + config.spacing * (u - 0.5).to(image)
        return alpha * x, none - numbers * math.log(alpha * config.spacing)
    # z in (-tau, tau), of density exp(-z^2 / 2) / (sqrt(2 pi) Z)
    tau = alpha * config.spacing / 2 / sigma
    inside = math.erf(tau / math.sqrt(2))
    z = torch.special.ndtri(0.5 + (u - 0.5) * inside)
    log_q = -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    return alpha * image + (sigma * z).to(image), log_q - numbers * math.log(sigma * inside)


def _products(teacher: Teacher) -> int:
    """Products of an exact divergence: the numbers of the largest block of the Jacobian."""
    return max(int(stage.block.max()) + 1 for stage in _stages(teacher, 1))


def _converged(
    teacher: Teacher,
    x: Tensor,
    probes: Tensor | None,
    *,
    config: LikelihoodConfig,
    steps: int,
    t_min: float,
) -> tuple[Float[Tensor, "B P"], Float[Tensor, " B"]]:
    """`log p` of tokens at `t_min`, and the estimated error of the solver."""

    def run(index: Tensor, steps: int) -> Tensor:
        mine = None if probes is None else probes[index]
        part = teacher.select(index)
        z, change = _flow(part, x[index], mine, steps=steps, t_min=t_min, divergence=True)
        assert change is not None
        z = z.double().flatten(1)
        log_prior = -(z.square() + math.log(2 * math.pi)).sum(1) / 2
        return log_prior[:, None] + change

    left = torch.arange(len(x), device=x.device)
    log_p = run(left, steps)
    error = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    if config.tolerance is None:
        return log_p, error
    limit = config.tolerance * math.log(2) * x[0].numel()
    while len(left) and steps < MAX_STEPS:
        steps = 2 * steps
        finer = run(left, steps)
        # Of fourth order, a fifteenth of this would do. A network that changes fast next to the
        # data keeps the order below 2, where the error is nearly as large as the difference.
        error[left] = (finer - log_p[left]).abs().mean(1)
        log_p[left] = finer
        left = left[error[left] > limit]
    return log_p, error


class Stage(NamedTuple):
    """A part of the flow in which the same groups move.

    Attributes:
        span: their tokens.
        clock: `[n]`, the share of its time that each of them has moved, at the beginning.
        length: of the part, in this unit.
        steps: of the solver.
        block: `[n, D]`, the position of each number in its block of the Jacobian.
    """

    span: slice
    clock: Float[Tensor, " n"]
    length: float
    steps: int
    block: Int[Tensor, "n D"]


def _stages(teacher: Teacher, steps: int) -> Iterator[Stage]:
    """The parts of the flow from data to noise: the last group moves first.

    At overlap 0, all groups move at once, each given its own clean prefix.
    """
    group, dim = teacher.group, teacher.x.shape[2]
    count = len(group)
    if teacher.num_groups == 1 or teacher.overlap == 0:
        first = torch.searchsorted(group, group)  # of the group's tokens
        place = torch.arange(count, device=group.device)
        if teacher.num_groups > 1:
            place = place - first
        channel = torch.arange(dim, device=group.device)
        index = place[:, None] * dim + channel
        yield Stage(slice(0, count), torch.zeros(count, dtype=torch.float64), 1.0, steps, index)
        return
    lag, last = 1 - teacher.overlap, teacher.num_groups - 1
    starts = [j * lag for j in range(teacher.num_groups)]
    ends = sorted([*starts, *(start + 1 for start in starts)])
    cuts = [a for a, b in zip(ends, [*ends[1:], math.inf], strict=True) if b - a > 1e-9]
    groups = group.tolist()
    for a, b in pairwise(cuts):
        middle = (a + b) / 2
        moving = [g for g in range(last + 1) if 0 < middle - (last - g) * lag < 1]
        span = slice(groups.index(moving[0]), count - groups[::-1].index(moving[-1]))
        clock = (a - (last - group[span].cpu().double()) * lag).clamp(0, 1)
        size = span.stop - span.start
        index = torch.arange(size * dim, device=group.device).view(size, dim)
        yield Stage(span, clock, b - a, max(1, math.ceil(steps * (b - a) - 1e-9)), index)


def _flow(
    teacher: Teacher,
    x: Float[Tensor, "B N D"],
    probes: Float[Tensor, "B P N D"] | None,
    *,
    steps: int,
    t_min: float,
    divergence: bool = False,
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B P"] | None]:
    """Tokens at `t_min` to noise, and the integral of the divergence of the velocity."""
    z, change = x.clone(), None
    if divergence:
        width = 1 if probes is None else probes.shape[1]
        change = torch.zeros(len(x), width, dtype=torch.float64, device=x.device)
    if teacher.num_groups == 1:
        predict = teacher.together()
    elif teacher.overlap == 0:
        predict = teacher.windows(teacher.group)
    else:
        predict = None
        of = teacher.spans()
    for stage in _stages(teacher, steps):
        span = stage.span
        velocity = _Velocity(
            teacher,
            of(span) if predict is None else predict,
            block=stage.block if divergence else None,
            probes=None if probes is None else probes[:, :, span],
        )
        here = z[:, span]

        def slope(
            z: Tensor, elapsed: float, *, stage: Stage = stage, velocity: "_Velocity" = velocity
        ) -> tuple[Tensor, Tensor | float]:
            t = t_min + (1 - t_min) * (stage.clock + elapsed).clamp(max=1)
            return velocity(z, t)

        for a, b in _grid(stage.length, stage.steps):
            h = (b - a) * (1 - t_min)
            v1, d1 = slope(here, a)
            v2, d2 = slope(here + h / 2 * v1, (a + b) / 2)
            v3, d3 = slope(here + h / 2 * v2, (a + b) / 2)
            v4, d4 = slope(here + h * v3, b)
            here = here + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
            if change is not None:
                change += h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        z[:, span] = here
    return z, change


def _grid(length: float, steps: int) -> Iterator[tuple[float, float]]:
    """Steps that grow: twice as long after `STEP_GROWTH` of the local time."""
    growth = length / STEP_GROWTH
    ends = [STEP_GROWTH * math.expm1(i / steps * math.log1p(growth)) for i in range(steps + 1)]
    # Half of the steps are even ones, so that the last are not too long.
    ends = [(end + i / steps * length) / 2 for i, end in enumerate(ends)]
    ends[-1] = length
    return pairwise(ends)


@dataclass(frozen=True)
class _Velocity:
    """`dx_t/dt = c x_t + d y` and its divergence.

    `c` and `d` follow from the time alone, so only the prediction `y` is differentiated.
    """

    teacher: Teacher
    predict: Predict
    block: Int[Tensor, "n D"] | None
    probes: Float[Tensor, "B P n D"] | None

    def __call__(
        self, z: Float[Tensor, "B n D"], t: Float[Tensor, " n"]
    ) -> tuple[Tensor, Tensor | float]:
        teacher = self.teacher
        rates = torch.stack(teacher.noise.rates(t))  # [2, n]
        by = inverse(teacher.prediction, teacher.noise, t)
        c = (rates * by.from_x_t).sum(0)[:, None].to(z)
        d = (rates * by.from_y).sum(0)[:, None].to(z)
        t = t.to(z)
        if bool((t == t[0]).all()):
            t = t[:1]
        if self.block is None:
            return c * z + d * self.predict(z, t), 0.0
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = self.predict(z, t)
            divergence = self._divergence(y, z, d)
        return (c * z + d * y).detach(), divergence + z.shape[2] * c.double().sum()

    def _divergence(self, y: Tensor, z: Tensor, d: Tensor) -> Float[Tensor, "B P"]:
        assert self.block is not None
        if self.probes is None:
            products = int(self.block.max()) + 1
            vectors = ((self.block == i).to(z).expand_as(z) for i in range(products))
        else:
            products = self.probes.shape[1]
            vectors = (self.probes[:, p] for p in range(products))
        parts = []
        for i, vector in enumerate(vectors):
            (row,) = torch.autograd.grad(y, z, d * vector, retain_graph=i < products - 1)
            parts.append((row * vector).double().flatten(1).sum(1))
        self.teacher.work.products += products
        found = torch.stack(parts, 1)
        return found if self.probes is not None else found.sum(1, keepdim=True)


def encode(teacher: Teacher, *, steps: int, t_min: float) -> Float[Tensor, "B N D"]:
    """The noise of the clean tokens: the probability-flow equation from `t_min` to 1.

    Args:
        teacher: the network, shown the tokens.
        steps: of the solver, from data to noise.
        t_min: the local time next to the data.
    """
    alpha = teacher.noise.alpha(torch.tensor(t_min, dtype=torch.float64)).to(teacher.x)
    with torch.no_grad():
        return _flow(teacher, alpha * teacher.x, None, steps=steps, t_min=t_min)[0]
