"""Teacher forcing: a network that is shown data, each window of groups given the clean ones before.

The clean tokens see clean tokens up to their own group, as in a decoding, so their keys and values
are computed once. A window of moving groups sees itself and the clean groups before it: the state
that a decoding meets. Windows do not see each other, so all of them move in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.conditioning import Masked
from rolldiff.diffusion.process import NoiseSchedule, Prediction
from rolldiff.diffusion.schedule import MAX_STEPS, attention_mask
from rolldiff.errors import UsageError
from rolldiff.nn.denoiser import Backbone, Guidance

__all__ = ["Predict", "Teacher", "Work"]


@dataclass
class Work:
    """Counts of what was computed."""

    nfe: int = 0
    products: int = 0


Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A network that is shown data: every window of groups is given the clean groups before it.

    Args:
        backbone: the network.
        noise: its noise schedule.
        prediction: what it predicts.
        x: the clean tokens, in decode order.
        order: the raster index of each token.
        group: the group of each token.
        position: of each token's group in the decode order, in [0, 1].
        num_groups: `G`; 1 if all groups move together.
        overlap: `o`, below 1.
        values: the validated conditions, followed by null conditions with guidance.
        guidance: of the predictions.
        context_time: the local time at which clean groups are shown.
        work: counts the calls.
    """

    backbone: Backbone
    noise: NoiseSchedule
    prediction: Prediction
    x: Float[Tensor, "B N D"]
    order: Int[Tensor, " N"]
    group: Int[Tensor, " N"]
    position: Float[Tensor, " N"]
    num_groups: int
    overlap: float
    values: dict[str, Masked]
    guidance: Guidance
    context_time: float = 0.0
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        if self.num_groups > 1 and not self.backbone.causal:
            raise UsageError(
                "num_groups must be 1 for the likelihood of a bidirectional backbone, got "
                f"{self.num_groups}: it shows every token all others"
            )

        if 1 - self.overlap < 1 / MAX_STEPS:
            raise UsageError(
                f"overlap must be 1 or at most {1 - 1 / MAX_STEPS} for a likelihood, got "
                f"{self.overlap}"
            )

    def select(self, index: Int[Tensor, " b"]) -> "Teacher":
        """The same for some of the examples."""
        branches = 2 if self.guidance.scale else 1
        rows = torch.cat([index + b * len(self.x) for b in range(branches)])
        values = {
            name: v._replace(value=v.value[rows], mask=v.mask[rows])
            if len(v.mask) == branches * len(self.x)
            else v
            for name, v in self.values.items()
        }
        return replace(self, x=self.x[index], values=values)

    def together(self) -> Predict:
        """The prediction of all tokens, which see each other."""
        context = self.backbone.prepare(self.order, self.values, grouped=self.num_groups > 1)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            time = self._embedded(t)
            return self._guided(self.backbone(x_t, time, context), t, slice(0, len(self.order)))

        return predict

    def windows(self, window: Int[Tensor, " N"], *, cached: bool = True) -> Predict:
        """The prediction of all tokens, each given its own window and the clean ones before it.

        Args:
            window: the window of each token, non-decreasing.
            cached: whether the clean tokens are shown once; otherwise in every call, with their
                gradient.
        """
        num_tokens, backbone, context = len(self.order), self.backbone, self._twice
        cache = self._cache_of_twice if cached else None
        clean, clean_time = self._clean
        before, same = window[:, None] > window, window[:, None] == window
        to_clean = self._clean_mask
        hidden = torch.full_like(to_clean, -torch.inf)
        shown = torch.zeros_like(to_clean)
        mask = torch.cat([shown.where(before, hidden), shown.where(same, hidden)], 1)  # [N, 2N]
        both = torch.cat([torch.cat([to_clean, hidden], 1), mask])  # [2N, 2N]

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            time = self._embedded(t)
            if cache is not None:
                y = backbone(x_t, time, context, start=num_tokens, mask=mask, cache=cache)
            else:
                shape = (*time.shape[:-2], num_tokens, time.shape[-1])
                time = torch.cat([clean_time.expand(shape), time.expand(shape)], dim=-2)
                y = backbone(torch.cat([clean, x_t], 1), time, context, mask=both)
                y = y[:, num_tokens:]
            return self._guided(y, t, slice(0, num_tokens))

        return predict

    def spans(self) -> Callable[[slice], Predict]:
        """The prediction of a span of tokens, which see each other and the clean ones before."""
        backbone = self.backbone
        context = backbone.prepare(self.order, self.values)
        cache, (clean, clean_time) = self._cache(context), self._clean

        def of(span: slice) -> Predict:
            def predict(x_t: Tensor, t: Tensor) -> Tensor:
                time = self._embedded(t)
                if cache is not None:
                    y = backbone(x_t, time, context, start=span.start, cache=cache)
                else:
                    size, count = time.shape[-1], span.stop - span.start
                    before = clean_time.expand(span.start, size)
                    block = self.group[: span.stop].clone()
                    block[span] = self.num_groups
                    y = backbone(
                        torch.cat([clean[:, : span.start], x_t], 1),
                        torch.cat([before, time.expand(count, size)]),
                        context,
                        mask=attention_mask(block, block).to(x_t),
                    )[:, span.start :]
                return self._guided(y, t, span)

            return predict

        return of

    @cached_property
    def _clean(self) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "1 E"]]:
        """The clean tokens as they are shown, and their embedded time."""
        t = torch.full((1,), self.context_time, dtype=torch.float64, device=self.x.device)
        alpha = self.noise.alpha(t).to(self.x)
        return alpha * self.x, self.backbone.embed_time(t.to(self.x))

    @cached_property
    def _clean_mask(self) -> Float[Tensor, "N N"]:
        return attention_mask(self.group, self.group).to(self.x)

    @cached_property
    def _twice(self) -> Any:
        """The context of the clean tokens followed by the noisy ones."""
        return self.backbone.prepare(self.order.repeat(2), self.values)

    @cached_property
    def _cache_of_twice(self) -> Any:
        return self._cache(self._twice)

    def _cache(self, context: Any) -> Any:
        """A cache that holds the clean tokens; None if the backbone has none."""
        rows = len(self.x) * (2 if self.guidance.scale else 1)
        cache = self.backbone.make_cache(rows, context, dtype=self.x.dtype, keep=True)
        if cache is not None:
            clean, clean_time = self._clean
            with torch.no_grad():
                self.backbone(clean, clean_time, context, mask=self._clean_mask, cache=cache)
            cache.freeze()
            self.work.nfe += 1
        return cache

    def _embedded(self, t: Float[Tensor, "*B n"]) -> Tensor:
        """The embedded times; those of each example twice with guidance, for its two branches."""
        time = self.backbone.embed_time(t)
        return torch.cat([time, time]) if self.guidance.scale and time.ndim == 3 else time

    def _guided(self, y: Tensor, t: Tensor, span: slice) -> Tensor:
        self.work.nfe += 1
        if self.guidance.scale:
            y, y_null = y.chunk(2)
            y = y + self.guidance.weight(self.position[span], t) * (y - y_null)
        return y.to(self.x.dtype)
