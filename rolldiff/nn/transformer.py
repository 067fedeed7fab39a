"""A transformer with a time per token, block-causal over groups, with an exact cache.

Token of group g sees the tokens of groups <= g, each at its own noise level. A finished group never
changes again, so its keys and values, once written while it was clean, are final: caching is exact.
The cache is two tensors `[B, heads, N, width / heads]` a layer, `2 depth N width` numbers an
example, allocated once; a single group needs none. On a CPU there are copies of some weights beside
it, see `blocks.apart`.

The time enters as in PixArt-alpha (Chen et al. 2023, §2.3): one projection shared by all layers,
and a small table for each. Places are a learned table and two-dimensional rotary angles (Su et al.
2021).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rolldiff.conditioning import Conditions
from rolldiff.conditions import Condition, Given
from rolldiff.layout import Layout
from rolldiff.nn.blocks import Block, Cross, Memory, apart, norm
from rolldiff.nn.context import Context
from rolldiff.nn.embeddings import Embeddings
from rolldiff.nn.places import causal_bias, in_order, rotation

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """A diffusion transformer over the tokens of a layout.

    Args:
        layout: gives the number, width and places of the tokens.
        width: channels inside; a multiple of `4 heads`.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the feed-forward part, over `width`.
        condition: what it is conditioned on; several by name, see `rolldiff.conditions`.
        causal: block-causal attention; False lets every token see all of them, in any order, and
            rules out a cache.
        recompute: whether training computes each block again in the backward pass instead of
            keeping what is inside (gradient checkpointing): less memory, a third more time.

    Raises:
        ValueError: if a size is below 1 or `width` is not a multiple of `4 heads`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        condition: Condition | Mapping[str, Condition] | Conditions | None = None,
        causal: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % (4 * heads):
            raise ValueError(
                "width must be a multiple of 4 heads, and depth and heads 1 or more, got "
                f"width {width}, depth {depth}, heads {heads}"
            )
        self.causal = causal
        self.recompute = recompute
        self.condition = Conditions.of(condition)
        self.heads = heads
        self.config = {
            "layout": layout,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "condition": self.condition,
            "causal": causal,
            "recompute": recompute,
        }
        self.embed = nn.Linear(layout.token_dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(layout.num_tokens, width))
        self.time = _Time(width, 6 * width)
        self.given = Embeddings(self.condition, layout=layout, width=width, modulation=6 * width)
        self.blocks = nn.ModuleList(
            Block(width, heads, int(mlp_ratio * width), cross=self.given.start is not None)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, layout.token_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._fixed_shapes = False
        # No buffer: rotations stay in float32 whatever the weights are turned into.
        self._rotation = rotation(layout.coords, width // heads)

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        group: Int[Tensor, "*B N"],
        cond: dict[str, Given] | None = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Context:
        """See `Backbone.prepare`."""
        width = self.place.shape[1]
        cos, sin = self._rotation.to(order.device)[:, order]
        context = Context(
            place=self.place[order],
            order=order,
            cos=cos,
            sin=sin,
            group=group,
            causal=self.causal,
            depth=len(self.blocks),
        )
        self.arrive(context, self.condition.null(1, order.device) if cond is None else cond)
        if group.ndim == 1:
            context.groups = group.tolist()
        elif self.causal:
            context.bias = causal_bias(group, group)[:, None]
            context.cos, context.sin = context.cos[:, None], context.sin[:, None]
        if batch is not None and self._fixed_shapes:
            context.start = torch.zeros((), dtype=torch.long, device=order.device)
        if batch is not None and self.causal:
            context.cached = 0
            if context.groups[-1] > 0:  # a single group is never read again
                shape = (batch, self.heads, len(order), width // self.heads)

                def buffer() -> Tensor:
                    return torch.zeros(shape, device=order.device, dtype=dtype)

                context.memory = [(buffer(), buffer()) for _ in self.blocks]
                if dtype == self.place.dtype and not self._fixed_shapes:
                    context.up = [apart(block.get_parameter("up.weight")) for block in self.blocks]
        return context

    def arrive(self, context: Context, cond: dict[str, Given]) -> None:
        """See `Backbone.arrive`."""
        given = self.given(cond)
        width = self.place.shape[1]
        # All but the first part of the modulation are factors, and start from 1.
        ones = F.pad(self.place.new_ones(5 * width), (width, 0))
        count = next((len(there) for _, there in cond.values()), 1)
        modulation = (given.modulation + ones).expand(count, -1)[:, None].contiguous()
        context.modulation = _kept(context.modulation, modulation)
        order = context.order
        if given.tokens is not None:
            context.tokens = _kept(context.tokens, in_order(given.tokens, order))
        if given.sequence is not None and given.hidden is not None:
            context.hidden = _kept(context.hidden, in_order(given.hidden, order)[:, None])
            crosses = [block.cross for block in self.blocks if isinstance(block.cross, Cross)]
            found = [cross.remember(given.sequence) for cross in crosses]
            before = context.sequence or found
            context.sequence = [
                (_kept(k, new_k), _kept(v, new_v))
                for (k, v), (new_k, new_v) in zip(before, found, strict=True)
            ]

    def needs(self) -> dict[str, Int[Tensor, " N"]]:
        """See `Backbone.needs`."""
        return self.given.needs()

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the block, in place; names of weights stay as they are.

        From then on a decode addresses the cache by tensors, not by numbers, so shapes depend on
        the size of the span alone and the functions serve every place; on CUDA the calls of a
        decode are replayed as CUDA graphs. The price is that attention reads the whole cache.

        Args:
            mode: see `torch.compile`.
        """
        self._fixed_shapes = True
        for block in self.blocks:  # one after another: they share what is compiled
            block.compile(mode=mode, dynamic=True)

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """See `Backbone.embed_time`."""
        return self.time(t)

    def forward(
        self,
        x_t: Float[Tensor, "B n D"],
        time: Float[Tensor, "*B #n E"],
        context: Context,
        start: int = 0,
    ) -> Float[Tensor, "B2 n D"]:
        """See `Backbone.__call__`."""
        if (first := context.start) is None:
            return self._span(context, slice(start, start + x_t.shape[1]), x_t, time)
        first.fill_(start)

        def anywhere(x_t: Tensor, time: Tensor) -> Tensor:
            span = first + torch.arange(x_t.shape[1], device=x_t.device)
            return self._span(context, span, x_t, time)

        return context.graphs(anywhere, x_t, time)

    def _span(self, context: Context, span: slice | Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        here, modulation = context.here(span), context.modulation
        assert modulation is not None  # `prepare` sees to it
        h = self.embed(x_t.to(self.embed.weight.dtype)) + here.place
        copies = max(1, len(modulation) // len(x_t))
        if copies > 1:  # guidance: the branches share all that comes before the condition
            h = h.repeat(copies, 1, 1)
        if here.tokens is not None:
            h = h + here.tokens
        width = h.shape[-1]
        added, scale, inner = (time + modulation).split((width, width, 4 * width), dim=-1)
        h, inner = h + added, inner.view(*inner.shape[:-1], 4, width)
        sequence: Sequence[Memory | None] = context.sequence or [None] * len(self.blocks)
        ups = context.up or [None] * len(self.blocks)
        for block, memory, kept, up in zip(self.blocks, here.memory, sequence, ups, strict=True):
            seen = (h, inner, here.cos, here.sin, here.bias, memory, kept, here.hidden, up)
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, *seen, use_reentrant=False)
            else:
                h = block(*seen)
        return self.head(norm(h) * scale)


class _Time(nn.Module):
    """Fourier features of the local time, and a small network on them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.out = nn.Linear(width, out)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        octave = torch.linspace(-1, 6, 32, device=t.device, dtype=t.dtype)
        angle = t[..., None] * (torch.pi * 2.0**octave)
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features)))


def _kept(old: Tensor | None, new: Tensor) -> Tensor:
    """The new values, in the memory of the old ones: a CUDA graph goes on reading there."""
    return new if old is None or old is new else old.copy_(new)
