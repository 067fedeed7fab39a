"""One decode: the states of the sampler, seen as images.

Holds what stays the same from the first row to the last. Tokens are kept in decode order and in
float32 (float64 if the weights are), whatever the network runs in.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.arrivals import Arrivals
from rolldiff.conditioning import Conditions, joined
from rolldiff.conditions import Given
from rolldiff.cost import Cost
from rolldiff.denoiser import Backbone, Context, Denoiser, Guided
from rolldiff.layout import Layout
from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate, Prediction
from rolldiff.sampler import State, sample
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Step
from rolldiff.streams import Streams
from rolldiff.timetable import Timetable
from rolldiff.training import Training

__all__ = ["Decoded", "Decoding", "Frame", "Model"]


@dataclass(frozen=True)
class Decoded:
    """A finished decode.

    Attributes:
        image: `[B, C, H, W]`, values about [-1, 1] (not clipped).
        cost: what it took.
        overlap: the overlap after rounding the stagger to whole steps.
    """

    image: Tensor
    cost: Cost
    overlap: float


@dataclass(frozen=True)
class Frame:
    """A decode on its way.

    Attributes:
        image: `[B, C, H, W]`: finished tokens as they stay, the others as `E[x | x_t]`.
        finished: `[H, W]`, True where pixels will not change any more.
        tau: global time, from 1 to 0.
        nfe: network calls so far, those for previews included.
    """

    image: Tensor
    finished: Tensor
    tau: float
    nfe: int


@runtime_checkable
class Model(Protocol):
    """What a decode needs to know of a decoder."""

    layout: Layout
    backbone: Backbone
    noise: NoiseSchedule
    prediction: Prediction
    trained_for: Training

    @property
    def condition(self) -> Conditions: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def state_dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Decoding:
    """A decode about to run."""

    denoiser: Denoiser
    layout: Layout
    context: Context
    order: Int[Tensor, " N"]
    schedule: RollingSchedule
    steps: int
    step: Step
    streams: Streams
    arrivals: Arrivals
    needs: dict[str, list[int]]
    x_1: Float[Tensor, "B N D"]
    known: int
    autocast: torch.dtype | None

    @cached_property
    def _places(self) -> Int[Tensor, " N"]:
        return self.order.argsort()

    def timetable(self) -> Timetable:
        """The local times, before the first step."""
        known, num_tokens = self.known, self.layout.num_tokens
        return self.denoiser.timetable(
            self.schedule, self.steps, num_tokens, known=known, like=self.x_1
        )

    def states(self) -> Iterator[State]:
        """The sampler's states; whoever takes them does so in `_mode`."""
        dim = self.layout.token_dim
        return sample(
            self._denoise,
            self.x_1,
            timetable=self.timetable(),
            step=self.step,
            draw=lambda n: self.streams.normal(n, dim).to(self.x_1),
        )

    def _mode(self) -> AbstractContextManager[Any]:
        """Inference mode spares a CPU much in a small call. Autocast keeps no casts in it."""
        cast = self.autocast or torch.is_autocast_enabled(self.order.device.type)
        return torch.no_grad() if cast else torch.inference_mode()

    def noise(self, image: Float[Tensor, "B N D"], *, iterations: int) -> Float[Tensor, "B N D"]:
        """The noise from which the decode would draw these tokens, all in decode order.

        Group by group, each among the finished ones before it, the steps are taken back: of each,
        the point that it would have started from is found by iterating
        `x_t <- x_t + x_s - step(x_t)`, which holds still where `step(x_t) = x_s`.
        """
        timetable, x_t, noise = self.timetable(), image.clone(), []
        for group in range(timetable.first, len(timetable.ages)):
            lo, hi = timetable.ends[group], timetable.ends[group + 1]
            here, x_s = x_t[:, lo:hi], image[:, lo:hi]
            for age in range(self.steps - 1, -1, -1):
                timetable.ages[group] = age
                s = timetable.at(slice(group, group + 1), [age + 1])
                for _ in range(iterations):
                    with self._autocast():
                        estimate = self._denoise(x_t, timetable, (lo, hi))
                    here += x_s - torch.addcmul(s.alpha * estimate.x, s.sigma, estimate.eps)
                x_s = here.clone()
            noise.append(x_s)
            timetable.ages[group] = self.steps  # the next groups see it finished
            x_t[:, lo:hi] = image[:, lo:hi]
        return torch.cat(noise, dim=1)

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Tokens in decode order as images."""
        return self.layout.image(tokens[:, self._places])

    def finished(self, state: State) -> Bool[Tensor, "H W"]:
        """Where pixels will not change any more."""
        tokens = torch.zeros(1, *state.x.shape[1:], device=state.x.device)
        tokens[:, : state.finished] = 1
        return self.image(tokens)[0].amin(0) > 0

    def preview(self, state: State, *, waiting: bool) -> Float[Tensor, "B C H W"]:
        """Finished tokens as they are, the others as `E[x | x_t]`.

        Waiting tokens are in no call of the sampler, so to show them too this makes one more.
        """
        x, done, num_tokens = state.x, state.finished, self.layout.num_tokens
        if waiting and state.started < num_tokens:
            x, cached = x.clone(), self.context.cached
            # What has not arrived for them is null here: a preview waits for nothing.
            with self._autocast():
                ahead = self.denoiser(state.x_t, state.timetable, self.context, (done, num_tokens))
            x[:, done:] = ahead.x
            # As if nothing had been asked: the decode goes on with the same calls, bit by bit.
            self.context.cached = cached
        return self.image(torch.cat([state.x_t[:, :done], x[:, done:]], dim=1))

    def decoded(self) -> Decoded:
        """Run to the end."""
        meter = self.denoiser.meter
        with self._mode():
            states = self.states()
            with self._autocast():  # around all calls: casts of the weights are kept
                state = next(state for state in states if state.finished)
                first = meter.seconds()
                state = deque(chain([state], states), maxlen=1).pop()
        image = self.image(state.x_t)
        cost = meter.cost(first=first, cached=self.context.cached is not None)
        return Decoded(image, cost, self.schedule.rounded(self.steps))

    def frames(self, count: int | None, *, preview: bool) -> Iterator[Frame]:
        """Run, and show `count` evenly spaced rows, the last one among them; None shows all.

        Raises:
            ValueError: at once, if there are not as many rows.
        """
        rows = self.schedule.num_steps(self.steps)
        count = rows if count is None else count
        if not isinstance(count, int) or not 1 <= count <= rows:
            raise ValueError(
                f"frames must be in 1 … {rows} (the steps of this decode), got {count!r}"
            )
        shown = {-(-i * rows // count) for i in range(1, count + 1)}
        return self._frames(rows, shown, preview)

    def _frames(self, rows: int, shown: set[int], preview: bool) -> Iterator[Frame]:
        with self._mode():
            states = self.states()
        for row in range(rows + 1):
            with self._mode(), self._autocast():
                state = next(states)
            if row in shown:
                with torch.no_grad():
                    image, finished = self.preview(state, waiting=preview), self.finished(state)
                yield Frame(image, finished, 1 - row / rows, self.denoiser.meter.nfe)

    def _denoise(self, x_t: Tensor, timetable: Timetable, span: tuple[int, int]) -> Estimate:
        if self.needs:
            self._wait(span[1] if self.denoiser.backbone.causal else len(self.order))
        return self.denoiser(x_t, timetable, self.context, span)

    def _wait(self, count: int) -> None:
        """Until there is what the first tokens look at; `needs` is empty if nothing arrives."""
        if self.arrivals.wait({name: need[count - 1] for name, need in self.needs.items()}):
            with torch.no_grad(), torch.autocast(self.order.device.type, enabled=False):
                self.denoiser.backbone.arrive(self.context, self._given())

    def _given(self) -> dict[str, Given]:
        given = self.arrivals.given
        if not isinstance(self.denoiser, Guided):
            return given
        return joined(given, self.arrivals.null)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.order.device.type, self.autocast)
