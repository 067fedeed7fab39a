"""One decode: the states of the sampler, seen as images.

Holds what stays the same from the first row to the last. Tokens are kept in decode order and in
float32 (float64 if the weights are), whatever the network runs in.
"""

import math
import warnings
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

from rolldiff.conditioning import ClassLabels
from rolldiff.cost import Cost, Meter, metered
from rolldiff.denoiser import Backbone, Context, Denoiser, Guided
from rolldiff.grouping import Grouping, Order, decode_order
from rolldiff.layout import Layout
from rolldiff.noise import NoiseSchedule
from rolldiff.prediction import Estimate, Prediction
from rolldiff.sampler import State, sample
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Step
from rolldiff.streams import Streams
from rolldiff.timetable import Timetable
from rolldiff.training import Training

__all__ = ["Decoded", "Decoding", "Frame", "Model", "begin"]


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
    condition: ClassLabels
    trained_for: Training

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
    dtype: torch.dtype
    autocast: torch.dtype | None

    @cached_property
    def _places(self) -> Int[Tensor, " N"]:
        return self.order.argsort()

    def states(self) -> Iterator[State]:
        """The sampler's states. A pixel starts from the same noise whatever the order."""
        num_tokens, dim = self.layout.num_tokens, self.layout.token_dim
        x_1 = self.streams.normal(num_tokens, dim).to(self.order.device, self.dtype)
        timetable = self.denoiser.timetable(self.schedule, self.steps, num_tokens, like=x_1)
        return sample(
            self._denoise,
            x_1[:, self.order],
            timetable=timetable,
            step=self.step,
            draw=lambda n: self.streams.normal(n, dim).to(x_1),
        )

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
            x[:, done:] = self._denoise(state.x_t, state.timetable, (done, num_tokens)).x
            # As if nothing had been asked: the decode goes on with the same calls, bit by bit.
            self.context.cached = cached
        return self.image(torch.cat([state.x_t[:, :done], x[:, done:]], dim=1))

    def decoded(self, meter: Meter) -> Decoded:
        """Run to the end."""
        states = self.states()
        with self._autocast():  # around all calls: the weights are cast once
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

    @torch.no_grad()
    def _frames(self, rows: int, shown: set[int], preview: bool) -> Iterator[Frame]:
        with metered(self.denoiser.backbone, self.context) as meter:
            for state in self.states():
                if state.row in shown:
                    image = self.preview(state, waiting=preview)
                    yield Frame(image, self.finished(state), 1 - state.row / rows, meter.nfe)

    def _denoise(self, x_t: Tensor, timetable: Timetable, span: tuple[int, int]) -> Estimate:
        with self._autocast():
            return self.denoiser(x_t, timetable, self.context, span)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.order.device.type, self.autocast)


def _computes_in(model: Model, dtype: torch.dtype | None) -> torch.dtype:
    """The type that the network computes in."""
    if dtype is None:
        mixed = model.device.type == "cuda" and model.dtype == torch.float32
        return torch.bfloat16 if mixed else model.dtype
    allowed = {model.dtype}
    if model.dtype == torch.float32:
        allowed |= {torch.bfloat16, torch.float16}
    if dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise ValueError(f"dtype must be {names} with {model.dtype} weights, got {dtype}")
    return dtype


@torch.no_grad()
def begin(
    model: Model,
    cond: Any,
    num_images: int | None,
    num_groups: int,
    overlap: float,
    steps: int,
    order: Order,
    step: Step,
    guidance: float,
    seed: int | torch.Generator | None,
    first: int,
    cache: bool,
    dtype: torch.dtype | None,
) -> Decoding:
    """Check the settings of a decode and prepare it.

    Raises:
        ValueError: if one of them is out of range; see `Decoder.decode` for what they mean.
    """
    computes_in = _computes_in(model, dtype)
    grouping = Grouping(model.layout.num_tokens, num_groups)
    schedule = RollingSchedule(num_groups, overlap)
    schedule.stagger(steps)
    for words in model.trained_for.beyond(num_groups, overlap, order):
        warnings.warn(
            f"decoding beyond what this checkpoint was trained for: {words}", stacklevel=4
        )
    if num_images is None:
        num_images = 1 if cond is None or torch.as_tensor(cond).ndim == 0 else len(cond)
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images must be a whole number of 1 or more, got {num_images!r}")
    if not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    label = model.condition.check(cond, num_images, model.device)
    denoiser = Denoiser(model.backbone, model.noise, model.prediction)
    if guidance != 0:
        if cond is None:
            raise ValueError(f"guidance needs a condition, got guidance {guidance} without cond")
        label = torch.cat([label, model.condition.null(num_images, model.device)])
        denoiser = Guided(model.backbone, model.noise, model.prediction, guidance)
    permutation = decode_order(order, model.layout.coords).to(model.device)
    context = model.backbone.prepare(
        permutation,
        grouping.group.to(model.device),
        label,
        batch=len(label) if cache else None,
        dtype=computes_in,
    )
    streams = Streams(seed, num_images, first=first)
    return Decoding(
        denoiser,
        model.layout,
        context,
        permutation,
        schedule,
        steps,
        step,
        streams,
        model.state_dtype,
        None if computes_in == model.dtype else computes_in,
    )
