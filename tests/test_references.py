"""Second implementations: diffusers' own loops, from the same noise."""

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from oracles import Gaussian, natural_covariance, run
from rolldiff import Euler, GroupSchedule, Rectified
from rolldiff.diffusion.process import NoiseSchedule

COVARIANCE = natural_covariance(4)
X_1 = torch.randn(3, 16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_flow_euler():
    steps, noise = 10, Rectified()
    oracle = Gaussian(COVARIANCE, noise)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=[(steps - i) / steps for i in range(steps)])
    x = X_1.clone()
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        estimate = oracle.at(x, torch.full((16,), float(sigma), dtype=torch.float64), slice(0, 16))
        x = scheduler.step(estimate.eps - estimate.x, time, x).prev_sample
    schedule = GroupSchedule(num_tokens=16, steps=steps)
    ours = run(oracle, X_1, schedule, noise=noise, solver=Euler()).x_t
    torch.testing.assert_close(ours, x.double(), rtol=1e-5, atol=1e-5)


class Tabled(NoiseSchedule):
    """A schedule by DDIM's table of cumulated alphas, clean before its first entry."""

    def __init__(self, cumulated, steps):
        object.__setattr__(self, "shift", 1.0)
        object.__setattr__(self, "table", cumulated.double())
        object.__setattr__(self, "steps", steps)

    def _cumulated(self, t):
        # Time r / S stands for the timestep that DDIM calls r (1000 / S) - 1, "trailing".
        index = (t * self.steps).round().long() * (1000 // self.steps) - 1
        return self.table[index.clamp(min=0)].where(index >= 0, 1.0)

    def alpha(self, t):
        return self._cumulated(t).sqrt()

    def sigma(self, t):
        return (1 - self._cumulated(t)).sqrt()

    def rates(self, t):
        return t * torch.nan, t * torch.nan  # DDIM does not use them


def test_ddim():
    steps = 10
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    noise = Tabled(scheduler.alphas_cumprod, steps)
    oracle = Gaussian(COVARIANCE, noise)
    x = X_1.clone()
    for r, time in enumerate(scheduler.timesteps):
        t = torch.full((16,), (steps - r) / steps, dtype=torch.float64)
        x = scheduler.step(oracle.at(x, t, slice(0, 16)).eps, time, x).prev_sample
    schedule = GroupSchedule(num_tokens=16, steps=steps)
    ours = run(oracle, X_1, schedule, noise=noise, solver=Euler()).x_t
    torch.testing.assert_close(ours, x.double(), rtol=1e-5, atol=1e-5)
