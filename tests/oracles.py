"""Exact denoisers, and what samplers make of them: the ground truth of every schedule and order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rolldiff import GroupSchedule
from rolldiff.diffusion.process import Estimate, NoiseSchedule
from rolldiff.diffusion.sampler import NoiseLevel, Solver, TimeGrid, sample


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
