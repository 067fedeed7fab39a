"""From a network to posterior means: `Backbone`, `Denoiser` and classifier-free guidance.

A *backbone* is the raw network. `prepare` computes once what stays the same while the times move
(places, condition), and `embed_time` what the network is shown of a local time. A call then takes a
span of tokens in decode order, each at its own time, and a mask that says who may see whom. A
*denoiser* combines a backbone with the noise level of its tokens and returns an `Estimate` of data
and noise.

Waiting tokens are pure noise and independent of the data, so a backbone that takes masks is never
shown them. Finished tokens never change: with a cache each of them is shown once more, in the first
call in which it is clean, and never again. Only such a call needs a mask, because finished tokens
do not see moving ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.conditioning import Conditioning, Masked
from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.process import Estimate, to_x_eps
from rolldiff.diffusion.sampler import NoiseLevel, TimeGrid
from rolldiff.diffusion.schedule import GroupSchedule, Visibility, attention_mask
from rolldiff.errors import UsageError, finite_number, sequence

__all__ = ["Backbone", "Denoiser", "Guidance"]


class Backbone(nn.Module, ABC):
    """The interface of a network.

    Attributes:
        causal: whether a token sees no more than its mask allows. Only then can there be an exact
            cache; other backbones are always shown all tokens.
        local: whether calls take a `Visibility` in place of a mask of all pairs.
        conditioning: what the network is conditioned on.
    """

    causal: bool
    local: bool = False
    conditioning: Conditioning

    @abstractmethod
    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        cond: dict[str, Masked] | None = None,
        *,
        grouped: bool = True,
    ) -> Any:
        """Everything that stays the same while the times move: the context of the calls.

        Args:
            order: the raster index of each token, in decode order.
            cond: the validated conditions; None is null. Their batch may be a multiple of the batch
                of tokens (guidance), and every part then sees the same tokens.
            grouped: whether the tokens of an example may have different times.
        """

    @abstractmethod
    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """The embedding of local times."""

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "B n D"],
        time: Float[Tensor, "*B #n E"],
        context: Any,
        *,
        start: int = 0,
        mask: Float[Tensor, "*M n m"] | Visibility | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "B2 n D"]:
        """The prediction for the tokens `start … start + n - 1`, given those before them.

        Args:
            x_t: the tokens.
            time: the embedded time of each token, or a single row if all times are equal.
            context: what `prepare` returned.
            start: position of the first token in decode order.
            mask: 0 where a token may see one of the `m = start + n` up to the end of the span,
                minus infinity elsewhere; None if all see all. With a leading axis, one for each of
                `M` equal parts of the batch. A `Visibility` says the same for a `local` network.
            cache: what `make_cache` returned. The call writes the keys and values of its tokens at
                their places, and reads those before; it does not move `cache.length`.
        """

    def make_cache(
        self, batch: int, context: Any, *, dtype: torch.dtype | None = None, keep: bool = False
    ) -> Any:
        """An empty cache for `batch` examples, or None if the network does not need or have one.

        It has a `length`, `commit(length)` which sets it, and `freeze()`, after which calls read it
        but write nothing, so that they can be differentiated.

        Args:
            batch: number of examples.
            context: what `prepare` returned.
            dtype: of what is kept; None is that of the weights.
            keep: whether tokens stay that no later token sees.
        """
        return None

    def resized(self, layout: Layout) -> "Backbone":
        """The same weights for images of another size.

        Raises:
            UsageError: if the network is made for one size.
        """
        raise UsageError(
            f"image_size must be the one that the network was made for, got "
            f"{layout.image_shape[1:]}; a Transformer with a window decodes any size"
        )

    def required_prefix(self) -> dict[str, Int[Tensor, " N"]]:
        """How much of each streamed condition each image token depends on, in raster order."""
        return {}


@dataclass(frozen=True)
class Guidance:
    """The weight `w` of classifier-free guidance, `y + w (y - y_null)`, by group and time.

    Guiding the prediction guides data and noise alike, because both are affine in it (Ho and
    Salimans 2022).

    Args:
        scale: `w` of the last group.
        ramp_from: `w` of the first group as a fraction of the last group's; linear in between. 0
            ramps up from no guidance, as in xAR (Ren et al. 2025).
        interval: the local times with guidance, from and to; 0 is data (Kynkäänniemi et al. 2024).

    Raises:
        UsageError: if a number is not finite, or the interval is not an interval in [0, 1].
    """

    scale: float
    ramp_from: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", finite_number(self.scale, "scale"))
        object.__setattr__(self, "ramp_from", finite_number(self.ramp_from, "ramp_from"))
        interval = tuple(
            finite_number(end, "each of interval", minimum=0, maximum=1)
            for end in sequence(self.interval, "interval", "two numbers")
        )
        if len(interval) != 2 or interval[0] > interval[1]:
            raise UsageError(f"interval must be two numbers in [0, 1] and in order, got {interval}")
        object.__setattr__(self, "interval", interval)

    def weight(
        self, position: Float[Tensor, " n"], t: Float[Tensor, "*B #n"]
    ) -> float | Float[Tensor, "*B n 1"]:
        """`w` of tokens.

        Args:
            position: of each token's group in the decode order, 0 for the first, 1 for the last.
            t: the local times.
        """
        low, high = self.interval
        if self.ramp_from == 1 and (low, high) == (0, 1):
            return self.scale
        w = self.scale * (self.ramp_from + (1 - self.ramp_from) * position)
        tolerance = 1e-6  # grid times are rounded to float32
        inside = (t >= low - tolerance) & (t <= high + tolerance)
        return w.where(inside, 0.0)[..., None]


@dataclass(frozen=True)
class Denoiser:
    """`E[x | x_t]` and `E[eps | x_t]` of the moving tokens, from one call of a backbone.

    Args:
        backbone: the network.
        schedule: the groups.
        grid: the noise levels of the decoding.
        guidance: with a scale other than 0 the context holds the condition followed by the null
            condition, and both are evaluated in the same call.
        position: of each token's group in the decode order, in [0, 1].
        context: the noise level at which finished tokens are shown.
    """

    backbone: Backbone
    schedule: GroupSchedule
    grid: TimeGrid
    guidance: Guidance
    position: Float[Tensor, " N"]
    context: NoiseLevel

    @property
    def branches(self) -> int:
        """Evaluations per token: 2 with guidance, 1 without."""
        return 2 if self.guidance.scale else 1

    def shown(self, span: slice, cached: int) -> slice:
        """The tokens that a call for a span shows the network.

        Args:
            span: the moving tokens.
            cached: leading tokens that are in the cache.
        """
        return slice(cached, span.stop if self.backbone.causal else len(self.position))

    def mask(
        self, shown: slice, finished: int, started: int
    ) -> Float[Tensor, "n m"] | Visibility | None:
        """Who may see whom in a call; None if all see all.

        Args:
            shown: the tokens of the call.
            finished: leading tokens at time 0.
            started: leading tokens that are finished or moving.
        """
        if not self.backbone.causal or (finished <= shown.start and started >= shown.stop):
            return None
        rule = Visibility(self.schedule, finished, started)
        if self.backbone.local:
            return rule
        make = _kept_mask if len(self.position) <= KEPT_TOKENS else _mask
        return make(rule, shown.start, shown.stop, self.position.device)

    def __call__(
        self,
        x_t: Float[Tensor, "B N D"],
        level: NoiseLevel,
        span: slice,
        *,
        context: Any,
        cache: Any = None,
        started: int | None = None,
    ) -> Estimate:
        """The estimate of the moving tokens.

        Args:
            x_t: all tokens; those before the span are finished.
            level: the noise level of the span.
            span: the moving tokens.
            context: what `backbone.prepare` returned.
            cache: what `backbone.make_cache` returned, or None.
            started: leading tokens that are finished or moving, if the span holds waiting ones too.
        """
        shown = self.shown(span, cache.length if cache is not None else 0)
        before, after = span.start - shown.start, shown.stop - span.stop
        time = level.embedding
        if before or after:
            count, size = span.stop - span.start, time.shape[-1]
            clean, noise = self.context.embedding, self.grid.noise_end.embedding
            time = torch.cat(
                [clean.expand(before, size), time.expand(count, size), noise.expand(after, size)]
            )
        finished = min(span.start + level.finished, span.stop)
        mask = self.mask(shown, finished, span.stop if started is None else started)
        x = x_t[:, shown]
        if before and self.context is not self.grid.data_end:
            x = torch.cat([self.context.alpha * x[:, :before], x[:, before:]], dim=1)
        y = self.backbone(x, time, context, start=shown.start, mask=mask, cache=cache)
        if before or after:
            y = y[:, before : y.shape[1] - after]
        if self.branches == 2:
            y, y_null = y.chunk(2)
            w = self.guidance.weight(self.position[span], level.t[:, 0])
            y = y + w * (y - y_null)
        return to_x_eps(y, x_t[:, span], level.inverse)


def _mask(
    rule: Visibility, start: int, stop: int, device: torch.device
) -> Float[Tensor, "n m"] | None:
    block = rule.blocks[:stop]
    if block[start] == block[-1]:
        return None
    block = block.to(device, non_blocking=True)
    return attention_mask(block[start:], block)


# Two decodings of equal settings use the same masks; at most about 256 MiB of them are kept.
KEPT_TOKENS = 1024
_kept_mask = lru_cache(maxsize=64)(_mask)
