"""A transformer with a time per token, block-causal over groups, with an exact cache.

Token of group g sees the tokens of groups <= g, each at its own noise level. A finished group never
changes again, so its keys and values, once written while it was clean, are final: caching is exact.
A cache is two tensors `[depth, B, heads, N, width / heads]`, `2 depth N width` numbers an example,
allocated once.

The time enters as in PixArt-alpha (Chen et al. 2023, §2.3): one projection shared by all layers,
and a small table for each. Places are a learned table and two-dimensional rotary angles (Su et al.
2021).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.layout import Layout

__all__ = ["Transformer"]


@dataclass
class _Context:
    """What `Transformer.prepare` computes once; shapes with N are in decode order."""

    place: Float[Tensor, "*B N width"]
    rotary: Float[Tensor, "*B N 2 half"]
    group: Int[Tensor, "*B N"]
    modulation: Float[Tensor, "C 1 mods"]
    bias: Float[Tensor, "B 1 N N"] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    cached: int | None = None
    groups: list[int] = field(default_factory=list)


class Transformer(nn.Module):
    """A diffusion transformer over the tokens of a layout.

    Args:
        layout: gives the number, width and places of the tokens.
        width: channels inside; a multiple of `4 heads`.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the feed-forward part, over `width`.
        num_classes: class labels; 0 for none. The index `num_classes` is the null label.
        causal: block-causal attention; False lets every token see all of them, in any order, and
            rules out a cache.

    Raises:
        ValueError: if a size is below 1 or `width` is not a multiple of `4 heads`.
    """

    rotary: Tensor

    def __init__(
        self,
        layout: Layout,
        *,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % (4 * heads):
            raise ValueError(
                "width must be a multiple of 4 heads, and depth and heads 1 or more, got "
                f"width {width}, depth {depth}, heads {heads}"
            )
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        self.causal = causal
        self.heads = heads
        self.config = {
            "layout": layout,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "causal": causal,
        }
        self.embed = nn.Linear(layout.token_dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(layout.num_tokens, width))
        self.time = _Time(width, 6 * width)
        self.label = nn.Embedding(num_classes + 1, 6 * width)
        self.blocks = nn.ModuleList(
            _Block(width, heads, int(mlp_ratio * width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, layout.token_dim)
        nn.init.normal_(self.label.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("rotary", _rotary(layout.coords, width // heads), persistent=False)

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        group: Int[Tensor, "*B N"],
        cond: Int[Tensor, " C"] | None = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Context:
        """See `Backbone.prepare`. `cond` are class labels, the null label among them."""
        null = self.label.num_embeddings - 1
        cond = torch.tensor([null], device=order.device) if cond is None else cond
        context = _Context(
            place=self.place[order],
            rotary=self.rotary[order],
            group=group,
            modulation=self.label(cond)[:, None],
        )
        if group.ndim == 1:
            context.groups = group.tolist()
        elif self.causal:
            context.bias = _bias(group, group)[:, None]
        if batch is not None and self.causal:
            size = self.place.shape[1] // self.heads
            shape = (len(self.blocks), batch, self.heads, group.shape[-1], size)
            context.keys = torch.empty(shape, device=order.device, dtype=dtype)
            context.values = torch.empty_like(context.keys)
            context.cached = 0
        return context

    def forward(
        self,
        x_t: Float[Tensor, "B n D"],
        t: Float[Tensor, "*B n"],
        context: _Context,
        start: int = 0,
    ) -> Float[Tensor, "B2 n D"]:
        """See `Backbone.__call__`."""
        stop = start + x_t.shape[1]
        h = self.embed(x_t) + context.place[..., start:stop, :]
        copies = max(1, len(context.modulation) // len(x_t))
        if copies > 1:  # guidance: the branches share all that comes before the condition
            h = h.repeat(copies, 1, 1)
        modulation = self.time(t) + context.modulation
        added, scale, *inner = modulation.chunk(6, dim=-1)
        h = h + added
        rotary = context.rotary[..., start:stop, None, :, :]
        bias = self._mask(context, start, stop)
        for layer, block in enumerate(self.blocks):
            memory = None
            if context.keys is not None and context.values is not None:
                memory = (context.keys[layer], context.values[layer])
            h = block(h, inner, rotary, bias, memory, start)
        return self.head(_norm(h) * (1 + scale))

    def _mask(self, context: _Context, start: int, stop: int) -> Tensor | None:
        if not self.causal or context.bias is not None:
            return context.bias
        if context.groups[start] == context.groups[stop - 1]:
            return None  # one group: it sees all that is there
        return _bias(context.group[start:stop], context.group[:stop])


class _Time(nn.Module):
    """Fourier features of the local time, and a small network on them."""

    frequency: Tensor

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.pi * 2.0 ** torch.linspace(-1, 6, 32))
        self.hidden = nn.Linear(64, width)
        self.out = nn.Linear(width, out)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[..., None] * self.frequency
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.out(F.silu(self.hidden(features)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(4, width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads))
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(
        self,
        h: Tensor,
        modulation: list[Tensor],
        rotary: Tensor,
        bias: Tensor | None,
        memory: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        scale_1, gate_1, scale_2, gate_2 = (
            m + row for m, row in zip(modulation, 1 + self.table, strict=True)
        )
        qkv = self.qkv(_norm(h) * scale_1)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        qk = _rotate(_norm(qkv[..., :2, :, :]) * self.qk_scale, rotary).to(qkv.dtype)
        q, k = (part.transpose(1, 2) for part in qk.unbind(-3))
        v = qkv[..., 2, :, :].transpose(1, 2)
        if memory is not None:
            stop = start + k.shape[2]
            for kept, new in zip(memory, (k, v), strict=True):
                kept[:, :, start:stop] = new
            k, v = (kept[:, :, :stop] for kept in memory)
        bias = bias if bias is None else bias.to(q.dtype)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = h + gate_1 * self.out(seen.transpose(1, 2).flatten(-2))
        return h + gate_2 * self.down(F.gelu(self.up(_norm(h) * scale_2)))


def _norm(h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:])


def _bias(query: Int[Tensor, "*B n"], key: Int[Tensor, "*B m"]) -> Float[Tensor, "*B n m"]:
    """0 where a query may see a key, minus infinity elsewhere."""
    hidden = query[..., :, None] < key[..., None, :]
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


def _rotary(coords: Float[Tensor, "N 3"], size: int) -> Float[Tensor, "N 2 half"]:
    """Cosines and sines: half of a head's pairs turn with the row, half with the column."""
    frequency = 100.0 ** -torch.linspace(0, 1, size // 4)
    angle = (coords[:, 1:, None] * frequency).flatten(1)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(h: Tensor, rotary: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    cos, sin = rotary[..., None, 0, :], rotary[..., None, 1, :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
