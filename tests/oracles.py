"""Exact denoisers, and what samplers make of them: the ground truth of every schedule and order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rolldiff import Conditioning, Decoder, GroupSchedule, Patches, Rectified, Training
from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.process import Estimate, NoiseSchedule
from rolldiff.diffusion.sampler import NoiseLevel, Solver, TimeGrid, sample
from rolldiff.nn.denoiser import Backbone


def natural_covariance(side: int, power: float = 2.0) -> Tensor:
    """Covariance of `side x side` pixels with a natural-image spectrum, unit mean variance."""
    frequency = torch.fft.fftfreq(side, dtype=torch.float64) * side
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    spectrum = (1 + radius) ** -power
    kernel = torch.fft.ifft2(spectrum).real
    kernel = kernel / kernel[0, 0]
    index = torch.arange(side)
    rows = (index[:, None] - index[None]) % side
    covariance = kernel[rows[:, None, :, None], rows[None, :, None, :]]
    return covariance.reshape(side**2, side**2)


def all_times(level: NoiseLevel, span: slice, num_tokens: int) -> Tensor:
    """The local times of all tokens: those before the span are finished, those after it wait."""
    t = torch.ones(num_tokens, dtype=level.t.dtype)
    t[: span.start], t[span] = 0, level.t[:, 0]
    return t


@dataclass
class Gaussian:
    """`E[x | x_t]` for `x ~ N(0, covariance)`, tokens of one channel, each at its own time."""

    covariance: Tensor
    noise: NoiseSchedule

    def __call__(self, x_t: Tensor, level: NoiseLevel, span: slice) -> Estimate:
        return self.at(x_t, all_times(level, span, x_t.shape[1]), span)

    def at(self, x_t: Tensor, t: Tensor, span: slice) -> Estimate:
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        mixed = alpha[:, None] * self.covariance * alpha + torch.diag(sigma**2)
        solved = torch.linalg.solve(mixed, x_t[..., 0].T).T
        x = (solved * alpha) @ self.covariance
        return Estimate(x[:, span, None], (sigma * solved)[:, span, None])


@dataclass
class FiniteData:
    """`E[x | x_t]` when the data are `points [K, N, D]`, all equally probable."""

    points: Tensor
    noise: NoiseSchedule

    def __call__(self, x_t: Tensor, level: NoiseLevel, span: slice) -> Estimate:
        t = all_times(level, span, x_t.shape[1])
        alpha, sigma = self.noise.alpha(t)[:, None], self.noise.sigma(t)[:, None]
        seen = sigma[:, 0] < 1
        far = (x_t[:, None] - alpha * self.points)[:, :, seen] / sigma[seen].clamp(min=1e-4)
        share = (-far.square().sum((-1, -2)) / 2).softmax(-1)
        x = torch.einsum("bk,knd->bnd", share, self.points)
        eps = (x_t - alpha * x) / sigma
        return Estimate(x[:, span], eps[:, span])


def decoded_covariance(
    covariance: Tensor, noise: NoiseSchedule, solver: Solver, schedule: GroupSchedule
) -> Tensor:
    """The covariance of what the sampler makes, in closed form: it is linear in all its noise."""
    size = len(covariance)
    fresh = size * schedule.num_steps
    x_1 = torch.zeros(size + fresh, size, 1, dtype=torch.float64)
    x_1[:size, :, 0] = torch.eye(size)
    used = size

    def randn(n: int) -> Tensor:
        nonlocal used
        z = torch.zeros(len(x_1), n, 1, dtype=torch.float64)
        z[used : used + n, :, 0] = torch.eye(n)
        used += n
        return z

    state = run(Gaussian(covariance, noise), x_1, schedule, noise=noise, solver=solver, randn=randn)
    return state.x_t[..., 0].T @ state.x_t[..., 0]


def run(
    denoise: Callable[[Tensor, NoiseLevel, slice], Estimate],
    x_1: Tensor,
    schedule: GroupSchedule,
    *,
    noise: NoiseSchedule,
    solver: Solver,
    randn: Callable[[int], Tensor] | None = None,
):
    """The last state of a sampler."""
    states = sample(
        denoise,
        x_1,
        schedule,
        grid=TimeGrid(schedule, noise, like=x_1),
        solver=solver,
        randn=randn or (lambda n: torch.randn(len(x_1), n, x_1.shape[2], dtype=x_1.dtype)),
    )
    return deque(states, maxlen=1).pop()


class Call(NamedTuple):
    """What a backbone was given: whom the shown tokens may see, and all of those with times."""

    x_t: Tensor  # [B, m]
    sees: Tensor  # [n, m]
    t: Tensor  # [*B, m]
    order: Tensor  # [m], raster index
    mask: Tensor | None


class Shown:
    """The cache of a `MaskedGaussian`: what it was shown."""

    def __init__(self, batch: int, num_tokens: int) -> None:
        self.length, self.frozen = 0, False
        self.x_t = torch.zeros(batch, num_tokens, dtype=torch.float64)
        self.t = torch.zeros(num_tokens, dtype=torch.float64)

    def commit(self, length: int) -> None:
        self.length = length

    def freeze(self) -> None:
        self.frozen = True


class MaskedGaussian(Backbone):
    """`E[x | the tokens that the mask of the call allows]` for `x ~ N(0, covariance)`.

    The best that a network can do under the decoder's own masks and cache. It keeps its `calls`.
    """

    causal = True

    def __init__(self, covariance: Tensor, noise: NoiseSchedule) -> None:
        super().__init__()
        self.covariance, self.noise = covariance, noise
        self.conditioning = Conditioning.of(None)
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.calls: list[Call] = []

    def prepare(self, order, cond=None, *, grouped=True):
        return order

    def embed_time(self, t):
        return t[..., None]

    def make_cache(self, batch, context, *, dtype=None, keep=False):
        return Shown(batch, len(context))

    def forward(self, x_t, time, context, *, start=0, mask=None, cache=None):
        n, m = x_t.shape[1], start + x_t.shape[1]
        x, t = x_t[..., 0], time[..., 0].expand(*time.shape[:-2], n)
        if cache is not None and cache.frozen:
            before = cache.t[:start].expand(*t.shape[:-1], start)
            x, t = torch.cat([cache.x_t[:, :start], x], 1), torch.cat([before, t], -1)
        elif cache is not None:
            cache.x_t[:, start:m], cache.t[start:m] = x, t
            x, t = cache.x_t[:, :m], cache.t[:m]
        assert x.shape[1] == m, "keys that were neither shown nor kept"
        sees = torch.ones(n, m, dtype=torch.bool) if mask is None else mask == 0
        self.calls.append(Call(x.clone(), sees, t.clone(), context[:m], mask))
        covariance = self.covariance[context[:m]][:, context[:m]]
        y = torch.zeros(len(x), n, dtype=x.dtype)
        for row in sees.unique(dim=0):
            alpha, sigma = self.noise.alpha(t[..., row]), self.noise.sigma(t[..., row])
            mixed = alpha[..., :, None] * covariance[row][:, row] * alpha[..., None, :]
            mixed = mixed + torch.diag_embed(sigma**2)
            here = (sees == row).all(1)
            to_x = covariance[start:m][here][:, row] * alpha[..., None, :]
            y[:, here] = (x[:, None, row] @ torch.linalg.solve(mixed, to_x.mT))[:, 0]
        return y[..., None]


def masked_decoder(
    covariance: Tensor, noise: NoiseSchedule = Rectified(), *, layout: Layout | None = None
) -> Decoder:
    """A decoder of one channel and one number per token around a `MaskedGaussian`.

    The covariance is that of the pixels; by default a token is a pixel.
    """
    side = round(len(covariance) ** 0.5)
    size = (side, side) if side**2 == len(covariance) else (1, len(covariance))
    if layout is None:
        layout = Patches(size, channels=1, patch=1)
    else:
        change = layout.tokens(torch.eye(side**2).double().view(-1, 1, side, side))[..., 0]
        covariance = change.T @ covariance @ change
    counts = tuple(range(1, len(covariance) + 1))
    orders = ("top_to_bottom", "random:0", "centre_out")
    training = Training(counts, orders=orders, grouping=("equal", "levels"))
    return Decoder(layout, MaskedGaussian(covariance, noise), noise=noise, training=training)


def covariance_of(decoder: Decoder, **settings) -> Tensor:
    """The covariance of the images of a decoder that is linear in its noise."""
    size = decoder.layout.num_tokens
    noise = torch.eye(size, dtype=torch.float64).view(size, *decoder.layout.image_shape)
    made = decoder.decode(noise=noise, **settings).image.flatten(1)
    return made.T @ made


def squared_frechet(a: Tensor, b: Tensor) -> float:
    """Between centred Gaussians: `tr(a + b - 2 (a^(1/2) b a^(1/2))^(1/2))`."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt()
    return float(a.trace() + b.trace() - 2 * middle.sum())
