"""One decode: the states of the sampler, seen as images.

Holds what stays the same from the first row to the last. Tokens are kept in decode order and in
float32 (float64 if the weights are), whatever the network runs in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.denoiser import Context, Denoiser
from rolldiff.layout import Layout
from rolldiff.prediction import Estimate
from rolldiff.sampler import State, sample
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Step
from rolldiff.streams import Streams

__all__ = ["Decoding"]


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

    @cached_property
    def _places(self) -> Int[Tensor, " N"]:
        return self.order.argsort()

    def states(self, dtype: torch.dtype) -> Iterator[State]:
        """The sampler's states, from noise to data. The noise of a pixel does not depend on the order."""
        num_tokens, dim = self.layout.num_tokens, self.layout.token_dim
        x_1 = self.streams.normal(num_tokens, dim).to(self.order.device, dtype)
        return sample(
            self._denoise,
            x_1[:, self.order],
            noise=self.denoiser.noise,
            step=self.step,
            schedule=self.schedule,
            steps=self.steps,
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
            x[:, done:] = self._denoise(state.x_t, state.t, (done, num_tokens)).x
            # As if nothing had been asked: the decode goes on with the same calls, bit by bit.
            self.context.cached = cached
        return self.image(torch.cat([state.x_t[:, :done], x[:, done:]], dim=1))

    def _denoise(self, x_t: Tensor, t: Tensor, span: tuple[int, int]) -> Estimate:
        return self.denoiser(x_t, t, self.context, span)
