"""The sampler: solvers that take tokens from `t` to `s <= t`, and the loop that applies them.

All solvers follow the probability-flow equation `dx_t/dt = alpha' x + sigma' eps`, whose exact
solution for a constant estimate is `x_s = alpha_s x + sigma_s eps` (DDIM; Song et al. 2020). The
state is the tokens in decode order, `[B, N, D]`. Step by step of the schedule, the span of moving
groups is advanced; finished and waiting tokens are not touched. The loop needs a function from
tokens to estimates and nothing else about networks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.diffusion.process import Estimate, Inverse, NoiseSchedule, Prediction, inverse
from rolldiff.diffusion.schedule import GroupSchedule
from rolldiff.errors import finite_number

__all__ = [
    "DDIM",
    "AdamsBashforth2",
    "Euler",
    "Heun",
    "Interval",
    "Midpoint",
    "NoiseLevel",
    "Solver",
    "State",
    "TimeGrid",
    "sample",
]

# Noise levels of spans with unequal times that a `TimeGrid` keeps; decoding revisits a few.
CACHED_LEVELS = 64


class NoiseLevel(NamedTuple):
    """The local times of some tokens, and everything that follows from them.

    Fields are `[n, 1]`, to be combined with `[B, n, D]`, or `[1, 1]` if all times are equal.
    """

    t: Float[Tensor, "n 1"]
    alpha: Float[Tensor, "n 1"]
    sigma: Float[Tensor, "n 1"]
    rates: Float[Tensor, "2 n 1"]  # alpha' and sigma'
    inverse: Inverse  # of the prediction, each part [2, 1, n, 1]
    embedding: Float[Tensor, "n E"]  # the network's embedding of t
    finished: int = 0  # leading tokens at time 0; known on the host, for levels of the grid

    def velocity(self, estimate: Estimate) -> Tensor:
        """`dx_t/dt = alpha' x + sigma' eps`."""
        d_alpha, d_sigma = self.rates
        return d_alpha * estimate.x + d_sigma * estimate.eps

    def point(self, estimate: Estimate) -> Tensor:
        """`alpha x + sigma eps`: the estimate at this noise level."""
        return torch.addcmul(self.alpha * estimate.x, self.sigma, estimate.eps)


class TimeGrid:
    """The `S + 1` local times that groups meet, with everything that depends on the time alone.

    A group that has taken `a` of its `S` steps is at the time `1 - a / S`. All quantities are
    computed once and looked up by `a`; the tables are read-only.

    Args:
        schedule: the groups and their steps.
        noise: the noise schedule.
        prediction: what the network predicts.
        embed: the network's embedding of local times, `[T]` to `[T, E]`.
        like: a tensor of the state's type, on its device.
    """

    def __init__(
        self,
        schedule: GroupSchedule,
        noise: NoiseSchedule,
        prediction: Prediction = "x",
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        like: Tensor,
    ) -> None:
        self.noise, self.prediction, self.embed, self.like = noise, prediction, embed, like
        self.sizes = tuple(b - a for a, b in zip(schedule.ends, schedule.ends[1:], strict=False))
        steps = schedule.steps
        # Whole numbers until the division, and float64 until the last, so that the ends are exact.
        self._grid = self.level(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
        self._single = [_rows(self._grid, slice(a, a + 1)) for a in range(steps + 1)]
        self._single[-1] = self._single[-1]._replace(finished=schedule.num_tokens)
        self._mixed: dict[tuple[int, ...], NoiseLevel] = {}

    @property
    def noise_end(self) -> NoiseLevel:
        """The level of waiting tokens, t = 1."""
        return self._single[0]

    @property
    def data_end(self) -> NoiseLevel:
        """The level of finished tokens, t = 0."""
        return self._single[-1]

    def level(self, t: Float[Tensor, " n"]) -> NoiseLevel:
        """The noise level of any local times above 0, on the grid or off it."""
        alpha, sigma, rates = self.noise.alpha(t), self.noise.sigma(t), self.noise.rates(t)
        solution = inverse(self.prediction, self.noise, t[None, :, None])
        like = self.like
        return NoiseLevel(
            t[:, None].to(like),
            alpha[:, None].to(like),
            sigma[:, None].to(like),
            torch.stack(rates)[..., None].to(like),
            Inverse(*(part.to(like) for part in solution)),
            t[:, None].to(like) if self.embed is None else self.embed(t.to(like)),
        )

    def at(self, groups: range, steps_done: tuple[int, ...]) -> NoiseLevel:
        """The noise level of the tokens of consecutive groups.

        Args:
            groups: the groups.
            steps_done: the steps that each of them has taken.
        """
        if steps_done.count(steps_done[0]) == len(steps_done):
            return self._single[steps_done[0]]
        sizes = self.sizes[groups.start : groups.stop]
        key = (*steps_done, *sizes)
        level = self._mixed.get(key)
        if level is None:
            index = torch.tensor(steps_done).repeat_interleave(torch.tensor(sizes))
            if len(self._mixed) == CACHED_LEVELS:
                self._mixed.clear()
            level = _rows(self._grid, index.to(self.like.device, non_blocking=True))
            # Earlier groups are ahead, so those at the end are the first.
            ended = zip(sizes, steps_done, strict=True)
            finished = sum(size for size, done in ended if done == len(self._single) - 1)
            level = self._mixed[key] = level._replace(finished=finished)
        return level


def _rows(level: NoiseLevel, index: slice | Tensor) -> NoiseLevel:
    t, alpha, sigma, rates, solution, embedding, _ = level
    return NoiseLevel(
        t[index],
        alpha[index],
        sigma[index],
        rates[:, index],
        Inverse(*(part[:, :, index] for part in solution)),
        embedding[index],
    )


class History(NamedTuple):
    """The estimate of the same tokens in the step before, and the noise level that it was made at.

    A token that had not started then has the same time in both steps.
    """

    estimate: Estimate
    level: NoiseLevel


class Interval(NamedTuple):
    """What a solver is given for one step beside the tokens."""

    t: NoiseLevel  # now
    s: NoiseLevel  # at the end of the step
    level: Callable[[Tensor], NoiseLevel]  # of any times [n] between the two
    randn: Callable[[], Tensor]  # unit noise like x_t, from each sample's own generator
    history: History | None = None  # for multistep solvers, from the second step on


Denoise = Callable[[Tensor, NoiseLevel], Estimate]


class Solver(ABC):
    """A rule for one step of all moving tokens, token by token.

    Attributes:
        order: the order of the global error in `1 / S` for smooth data.
        nfe_per_step: network calls per step.
        nfe_last_step: network calls in a token's last step, at s = 0.
        multistep: whether the rule uses the step before.
    """

    order: int
    nfe_per_step: int = 1
    nfe_last_step: int = 1
    multistep: bool = False

    @abstractmethod
    def step(
        self, denoise: Denoise, x_t: Float[Tensor, "B n D"], interval: Interval
    ) -> tuple[Tensor, Estimate]:
        """Take one step.

        Args:
            denoise: `(x_u, level of u)` to the estimate of the moving tokens, `s <= u <= t`.
            x_t: the moving tokens.
            interval: the times, and what else a rule may use.

        Returns:
            The tokens at `s`, and the estimate made at `t`.
        """


@dataclass(frozen=True)
class Euler(Solver):
    """`x_s = alpha_s x + sigma_s eps`: DDIM at eta 0, and Euler's rule on straight paths."""

    order = 1

    def step(self, denoise: Denoise, x_t: Tensor, interval: Interval) -> tuple[Tensor, Estimate]:
        estimate = denoise(x_t, interval.t)
        return interval.s.point(estimate), estimate


@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoidal rule on the velocity (Karras et al. 2022, algorithm 1).

    The velocity at s = 0 is not defined for every prediction, so a token's last step is Euler's.
    """

    order = 2
    nfe_per_step = 2

    def step(self, denoise: Denoise, x_t: Tensor, interval: Interval) -> tuple[Tensor, Estimate]:
        t, s = interval.t, interval.s
        estimate = denoise(x_t, t)
        x_s = s.point(estimate)
        if s.finished >= x_t.shape[1]:
            return x_s, estimate
        slope = t.velocity(estimate) + s.velocity(denoise(x_s, s))
        trapezoid = x_t + (s.t - t.t) / 2 * slope
        return trapezoid.where(s.t > 0, x_s), estimate


@dataclass(frozen=True)
class Midpoint(Solver):
    """The midpoint rule on the velocity: one estimate at `t`, one halfway to `s`.

    Unlike Heun's it never evaluates the velocity at s = 0, so the last step is of second order too.
    """

    order = 2
    nfe_per_step = 2
    nfe_last_step = 2

    def step(self, denoise: Denoise, x_t: Tensor, interval: Interval) -> tuple[Tensor, Estimate]:
        t, s = interval.t, interval.s
        estimate = denoise(x_t, t)
        middle = interval.level((t.t[:, 0] + s.t[:, 0]) / 2)
        slope = middle.velocity(denoise(middle.point(estimate), middle))
        return x_t + (s.t - t.t) * slope, estimate


@dataclass(frozen=True)
class AdamsBashforth2(Solver):
    """The two-step rule of Adams and Bashforth on the velocity, with a history per token.

    `x_s = x_t + (s - t) [v + (s - t) / (2 (t - t')) (v - v')]`, where a prime marks the step
    before. A token's first step has no history and is Euler's.
    """

    order = 2
    multistep = True

    def step(self, denoise: Denoise, x_t: Tensor, interval: Interval) -> tuple[Tensor, Estimate]:
        t, s, history = interval.t, interval.s, interval.history
        estimate = denoise(x_t, t)
        x_s = s.point(estimate)
        if history is None:
            return x_s, estimate
        v, v_before = t.velocity(estimate), history.level.velocity(history.estimate)
        h, h_before = s.t - t.t, t.t - history.level.t
        two_step = x_t + h * (v + h / (2 * h_before) * (v - v_before))
        return two_step.where(h_before < 0, x_s), estimate


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM with fresh noise: `x_s = alpha_s x + sqrt(sigma_s^2 - c^2) eps + c z`.

    `c = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)` is `eta` times
    the standard deviation of the posterior `q(x_s | x_t, x)` (Song et al. 2020, eq. 16).

    Args:
        eta: in [0, 1]: 0 is `Euler`, 1 the ancestral sampler of DDPM.

    Raises:
        UsageError: if `eta` is out of range.
    """

    eta: float = 1.0
    order = 1

    def __post_init__(self) -> None:
        eta = finite_number(self.eta, "eta", minimum=0, maximum=1)
        object.__setattr__(self, "eta", eta)

    def step(self, denoise: Denoise, x_t: Tensor, interval: Interval) -> tuple[Tensor, Estimate]:
        t, s = interval.t, interval.s
        estimate = denoise(x_t, t)
        posterior_var = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
        c = self.eta * s.sigma / t.sigma * posterior_var.clamp(min=0).sqrt()
        eps_scale = (s.sigma**2 - c**2).clamp(min=0).sqrt()
        return s.alpha * estimate.x + eps_scale * estimate.eps + c * interval.randn(), estimate


class State(NamedTuple):
    """The tokens after a step.

    Tensors are the sampler's own memory and valid until the next step: copy what you keep.

    Attributes:
        step: solver steps done, 0 … R; the row of the scheduling matrix.
        x_t: `[B, N, D]`, every token at its own time.
        x: `[B, N, D]`, the last estimate `E[x | x_t]` of each token; 0, the middle of the data's
            range, for tokens without one.
        finished: leading tokens that are final.
        started: leading tokens that are finished or moving.
    """

    step: int
    x_t: Tensor
    x: Tensor
    finished: int
    started: int


def sample(
    denoise: Callable[[Tensor, NoiseLevel, slice], Estimate],
    x_1: Float[Tensor, "B N D"],
    schedule: GroupSchedule,
    *,
    grid: TimeGrid,
    solver: Solver = Euler(),
    randn: Callable[[int], Tensor],
) -> Iterator[State]:
    """Decode noise, one state per step, the initial state first.

    Args:
        denoise: from all tokens `[B, N, D]`, the noise level of the moving ones and their span to
            the estimate of the moving tokens.
        x_1: unit noise in decode order, after the tokens that are known.
        schedule: when each group moves.
        grid: the times of the schedule.
        solver: the rule for a step.
        randn: fresh unit noise `[B, n, D]` for n tokens, for solvers that add noise.

    Yields:
        The state, `R + 1` times.
    """
    known = schedule.num_known
    x_t, x0 = x_1.clone(), torch.zeros_like(x_1)
    x0[:, :known] = x_1[:, :known]
    eps = torch.zeros_like(x_1) if solver.multistep else None
    yield State(0, x_t, x0, known, known)
    for i in range(schedule.num_steps):
        groups = schedule.moving(i)
        span, done = schedule.span(groups), schedule.steps_done(i, groups)
        t = grid.at(groups, done)
        s = grid.at(groups, tuple(a + 1 for a in done))
        here, x0_here = x_t[:, span], x0[:, span]
        # A solver that calls the network twice needs its tokens apart from the state it changes.
        x_span = here if solver.nfe_per_step == 1 else here.clone()
        history = None
        if eps is not None and i > 0:
            before = grid.at(groups, tuple(max(a - 1, 0) for a in done))
            history = History(Estimate(x0_here, eps[:, span]), before)
        interval = Interval(t, s, grid.level, partial(randn, here.shape[1]), history)
        x_s, estimate = solver.step(_Moving(denoise, x_t, span), x_span, interval)
        here.copy_(x_s)
        x0_here.copy_(estimate.x)
        if eps is not None:
            eps[:, span] = estimate.eps
        finished = schedule.ends[schedule.moving(i + 1).start]
        yield State(i + 1, x_t, x0, finished, span.stop)


@dataclass(frozen=True)
class _Moving:
    """The estimate of the moving tokens as a function of these tokens alone."""

    denoise: Callable[[Tensor, NoiseLevel, slice], Estimate]
    x_t: Tensor
    span: slice

    def __call__(self, x_u: Tensor, u: NoiseLevel, /) -> Estimate:
        here = self.x_t[:, self.span]
        if x_u.data_ptr() != here.data_ptr():
            here.copy_(x_u)
        return self.denoise(self.x_t, u, self.span)
