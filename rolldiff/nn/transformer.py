"""A transformer with a time per token, a mask of who sees whom, and an exact cache.

Each token attends to those that the mask of the call allows, each at its own noise level. A
finished token sees finished tokens alone, so its keys and values, written once while it was clean,
are final: caching is exact. The cache holds `2 depth N width` numbers per example, allocated once.

With a `window` a token sees only tokens at most so many rows and columns away (`window.py`). Places
then enter by differences alone, so the network decodes images of any size, and the cache holds only
what an unfinished token can still see: from top to bottom, `window` rows of tokens and the groups
that move, however high the image is.

The time enters as in PixArt-alpha (Chen et al. 2023, §2.3): one projection shared by all layers,
and a small table per layer. Positions are two-dimensional rotary angles (Su et al. 2021) and,
without a window, a learned table.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rolldiff.conditioning import Condition, ConditionEmbedder, Conditioning, Masked
from rolldiff.diffusion.layout import Layout, check_layout
from rolldiff.diffusion.schedule import Visibility
from rolldiff.errors import UsageError, boolean, finite_number, whole_number
from rolldiff.nn.denoiser import Backbone
from rolldiff.nn.window import Neighbourhood, Tiles, check_grid

__all__ = ["Block", "Context", "KVCache", "KVSlot", "Transformer", "norm"]


MAX_WIDTH, MAX_DEPTH, MAX_SIDE = 2**16, 1000, 2**20


class CrossKV(NamedTuple):
    """Keys and values of the condition's sequence in one layer, and who may attend to them."""

    k: Float[Tensor, "C heads L size"]
    v: Float[Tensor, "C heads L size"]
    mask: Float[Tensor, "C 1 n L"]


class KVSlot(NamedTuple):
    """One layer's cache as a span of tokens uses it: where to write, and what to attend to."""

    k: Float[Tensor, "B heads n size"] | None  # None if nothing is written
    v: Float[Tensor, "B heads n size"] | None
    k_all: Float[Tensor, "B heads m size"]  # up to the end of the span, or to its start
    v_all: Float[Tensor, "B heads m size"]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the span; return all that it may attend to."""
        if self.k is None or self.v is None:
            return torch.cat([self.k_all, k], 2), torch.cat([self.v_all, v], 2)
        self.k.copy_(k)
        self.v.copy_(v)
        return self.k_all, self.v_all


class KVCache:
    """Keys and values of every layer; the first `length` tokens are final.

    A call of the network writes the keys and values of its own tokens, which is scratch memory
    until `commit` declares them final.

    Args:
        depth: number of layers.
        shape: `(batch, heads, num_tokens, head_size)`.
        like: a tensor on the device.
        dtype: of the keys and values; None is that of `like`.

    Attributes:
        blocks: copies of the network's blocks for this decoding, see `ColumnLinear`; or None.
    """

    def __init__(
        self, depth: int, shape: tuple[int, ...], like: Tensor, *, dtype: torch.dtype | None = None
    ) -> None:
        self.length = 0
        self.layers = [
            (like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))
            for _ in range(depth)
        ]
        self.blocks: Iterable[nn.Module] | None = None
        self._slots: tuple[slice, list[KVSlot]] | None = None
        self._frozen = False

    def slots(self, span: slice) -> list[KVSlot]:
        """The views of every layer that a span uses."""
        if self._slots is None or self._slots[0] != span:  # decoding stays at a span for many steps
            self._slots = span, self._views(span.start, span.stop)
        return self._slots[1]

    def _views(self, start: int, stop: int) -> list[KVSlot]:
        if self._frozen:
            return [KVSlot(None, None, k[:, :, :start], v[:, :, :start]) for k, v in self.layers]
        return [
            KVSlot(k[:, :, start:stop], v[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
            for k, v in self.layers
        ]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(part.nbytes for layer in self.layers for part in layer)

    def commit(self, length: int) -> None:
        """Declare the first `length` tokens final: they will not be shown again."""
        self.length = length

    def freeze(self) -> None:
        """Write nothing from now on: calls have their own keys and values after those kept."""
        self._frozen, self._slots = True, None


class WindowCache(KVCache):
    """A cache that keeps only the final tokens that a token after them can still see.

    Its memory grows to what the largest call needs, and no further. Orders in which tokens next to
    the first ones come late, such as `random:0`, need most of the image for long.

    Args:
        depth: number of layers.
        shape: `(batch, heads, num_tokens, head_size)`.
        like: a tensor on the device.
        near: who is near whom.
        dtype: of the keys and values; None is that of `like`.
    """

    def __init__(
        self,
        depth: int,
        shape: tuple[int, ...],
        like: Tensor,
        *,
        near: Neighbourhood,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(depth, (*shape[:2], 0, shape[3]), like, dtype=dtype)
        self.near = near
        self.kept = torch.arange(0)  # decode positions, on the CPU

    def _views(self, start: int, stop: int) -> list[KVSlot]:
        before = len(self.kept)
        size = before if self._frozen else before + stop - start
        if size > self.layers[0][0].shape[2]:
            self.layers = [(_longer(k, size), _longer(v, size)) for k, v in self.layers]
        return super()._views(before, size)

    def commit(self, length: int) -> None:
        """See `KVCache.commit`; forget what no later token sees."""
        if length == self.length:
            return
        final = torch.cat([self.kept, torch.arange(self.length, length)])
        needed = self.near.needed(final, length)
        if len(needed) < len(final):
            index = needed.to(self.layers[0][0].device, non_blocking=True)
            for part in (part for layer in self.layers for part in layer):
                part[:, :, : len(needed)] = part[:, :, index]
        self.kept, self.length, self._slots = final[needed], length, None


def _longer(part: Tensor, size: int) -> Tensor:
    longer = part.new_zeros(*part.shape[:2], size, part.shape[3])
    longer[:, :, : part.shape[2]] = part
    return longer


class Context(NamedTuple):
    """What `Transformer.prepare` computes once; tokens are in decode order."""

    pos_embed: Float[Tensor, "*B N width"] | None
    rope: Float[Tensor, "2 ... N size"]  # cosines and signed sines
    modulation: Float[Tensor, "C 1 mods"]
    tokens: Float[Tensor, "C N width"] | None
    cross: list[CrossKV] | None  # per layer
    near: Neighbourhood | None  # with a window


class Transformer(Backbone):
    """A diffusion transformer over the tokens of a layout.

    Args:
        layout: defines the number, width and places of the tokens.
        width: channels; a multiple of `4 heads`, at most 2^16.
        depth: blocks, at most 1000.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP, divided by `width`; at most 64.
        condition: what the network is conditioned on; several by name in a dictionary.
        window: how many rows and columns away a token sees others; None for all.
        causal: whether masks are followed. False lets every token attend to all tokens, in any
            order, and rules out a cache.
        gradient_checkpointing: compute each block again in the backward pass instead of keeping its
            activations: less memory, about a third more time.

    Raises:
        UsageError: if a size is out of range or `width` is not a multiple of `4 heads`.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        condition: Condition | Mapping[str, Condition] | Conditioning | None = None,
        window: int | None = None,
        causal: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout = check_layout(layout)
        width = whole_number(width, "width", maximum=MAX_WIDTH)
        depth = whole_number(depth, "depth", maximum=MAX_DEPTH)
        heads = whole_number(heads, "heads")
        if width % (4 * heads):
            raise UsageError(
                f"width must be a multiple of 4 heads, got width {width} and heads {heads}"
            )
        mlp_ratio = finite_number(mlp_ratio, "mlp_ratio", minimum=1 / width, maximum=64)
        self.causal = causal = boolean(causal, "causal")
        self.gradient_checkpointing = boolean(gradient_checkpointing, "gradient_checkpointing")
        self.conditioning = Conditioning.of(condition)
        self.heads, self.width = heads, width
        self.window = None if window is None else whole_number(window, "window", maximum=MAX_SIDE)
        self.local = window is not None
        if self.local:
            check_grid(layout)
        self.config = {
            "layout": layout,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "condition": self.conditioning,
            "window": self.window,
            "causal": causal,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        self.embed = nn.Linear(layout.token_dim, width)
        self.pos_embed = (
            None if self.local else nn.Parameter(0.02 * torch.randn(layout.num_tokens, width))
        )
        self.time_embed = TimeEmbedding(width, 6 * width)
        self.cond_embedder = ConditionEmbedder(
            self.conditioning, layout, width=width, modulation=6 * width
        )
        cross_attention = self.cond_embedder.null_token is not None
        self.blocks = nn.ModuleList(
            Block(width, heads, max(1, int(mlp_ratio * width)), cross_attention=cross_attention)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, layout.token_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # Not a buffer: the angles stay in float32 whatever type the weights are converted to.
        self._rope = rotary_angles(layout.coords, width // heads)
        self._places = layout.coords[:, 1:].long()

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        cond: dict[str, Masked] | None = None,
        *,
        grouped: bool = True,
    ) -> Context:
        """See `Backbone.prepare`."""
        cond = self.conditioning.null(1, order.device) if cond is None else cond
        embedded = self.cond_embedder(cond)
        # All parts of the modulation but the first are factors, and start from 1.
        ones = F.pad(self.embed.weight.new_ones(5 * self.width), (self.width, 0))
        count = next((len(mask) for _, mask in cond.values()), 1)
        if self._rope.device != order.device:  # once
            self._rope = self._rope.to(order.device, non_blocking=True)
            self._places = self._places.to(order.device, non_blocking=True)
        rope = self._rope[:, order]
        cross = None
        if embedded.sequence is not None and embedded.cross_attn_mask is not None:
            mask = to_decode_order(embedded.cross_attn_mask, order)[:, None]
            cross = [
                CrossKV(*layer.keys_values(embedded.sequence), mask)
                for layer in self.blocks.modules()
                if isinstance(layer, CrossAttention)
            ]
        return Context(
            pos_embed=None if self.pos_embed is None else self.pos_embed[order],
            rope=rope[:, :, None] if order.ndim > 1 else rope,  # an axis for the heads
            modulation=(embedded.modulation + ones).expand(count, -1)[:, None].contiguous(),
            tokens=None if embedded.tokens is None else to_decode_order(embedded.tokens, order),
            cross=cross,
            near=Neighbourhood(self._places[order], self.window) if self.window else None,
        )

    def make_cache(
        self,
        batch: int,
        context: Context,
        *,
        dtype: torch.dtype | None = None,
        keep: bool = False,
    ) -> KVCache | None:
        """See `Backbone.make_cache`."""
        if not self.causal:
            return None
        num_tokens, size = context.rope.shape[-2:]
        depth, like = len(self.blocks), self.embed.weight
        shape = (batch, self.heads, num_tokens, size)
        if context.near is None or keep:
            cache = KVCache(depth, shape, like, dtype=dtype)
        else:
            cache = WindowCache(depth, shape, like, near=context.near, dtype=dtype)
        cache.blocks = column_blocks(
            self.blocks, (Block, Attention, CrossAttention, MLP), like=like, dtype=dtype
        )
        return cache

    def resized(self, layout: Layout) -> Backbone:
        """See `Backbone.resized`; only with a window."""
        if not self.local:
            return super().resized(layout)
        other = copy.copy(self)
        other.layout, other.conditioning = layout, self.conditioning.resized(self.layout, layout)
        other.config = self.config | {"layout": layout, "condition": other.conditioning}
        embedder = self.cond_embedder.resized(other.conditioning, layout)
        other._modules = self._modules | {"cond_embedder": embedder}
        other._rope = rotary_angles(layout.coords, self.width // self.heads)
        other._places = layout.coords[:, 1:].long()
        return other

    def required_prefix(self) -> dict[str, Int[Tensor, " N"]]:
        """See `Backbone.required_prefix`."""
        return self.cond_embedder.required_prefix()

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """See `Backbone.embed_time`."""
        return self.time_embed(t)

    def compile(self, *, mode: str | None = None) -> None:
        """Compile every block in place, as a whole; the names of the weights stay as they are.

        Args:
            mode: see `torch.compile`; `reduce-overhead` replays CUDA graphs.
        """
        compile_blocks(self.blocks, mode=mode)

    def forward(
        self,
        x_t: Float[Tensor, "B n D"],
        time: Float[Tensor, "*B #n E"],
        context: Context,
        *,
        start: int = 0,
        mask: Float[Tensor, "*M n m"] | Visibility | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B2 n D"]:
        """See `Backbone.forward`."""
        span = slice(start, start + x_t.shape[1])
        h = self.embed(x_t.to(self.embed.weight.dtype))
        if context.pos_embed is not None:
            h = h + context.pos_embed[..., span, :]
        branches = max(1, len(context.modulation) // len(x_t))
        if branches > 1:  # guidance: the branches share all that precedes the condition
            h = h.repeat(branches, 1, 1)
        if context.tokens is not None:
            h = h + context.tokens[:, span]
        width = h.shape[-1]
        # [B, n or 1, 6 width]: a shift, the scale of the head, and four factors for the blocks
        shift, scale, modulation = (time + context.modulation).split(
            (width, width, 4 * width), dim=-1
        )
        h, modulation = h + shift, modulation.unflatten(-1, (4, width))
        rope = context.rope[..., span, :]
        seen = self._seen(span, mask if self.causal else None, context.near, cache)
        slots = None if cache is None else cache.slots(span)
        blocks = self.blocks if cache is None or cache.blocks is None else cache.blocks
        for layer, block in enumerate(blocks):
            kv = None if slots is None else slots[layer]
            cross = None
            if context.cross is not None:
                k, v, cross_mask = context.cross[layer]
                cross = CrossKV(k, v, cross_mask[:, :, span])
            inputs: dict[str, Any] = {"attn_mask": seen, "kv": kv, "cross": cross}
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, modulation, rope, use_reentrant=False, **inputs)
            else:
                h = block(h, modulation, rope, **inputs)
        return self.head(norm(h) * scale)

    def _seen(
        self,
        span: slice,
        mask: Float[Tensor, "*M n m"] | Visibility | None,
        near: Neighbourhood | None,
        cache: KVCache | None,
    ) -> Tensor | Tiles | None:
        """What the attention of a call is told about who sees whom."""
        visibility = mask if isinstance(mask, Visibility) else None
        pairs = mask if isinstance(mask, Tensor) else None
        if near is not None:
            # Tiles are for one order that holds each place once.
            each_place_once = near.places.shape[:-1] == (self.layout.num_tokens,)
            if pairs is None and each_place_once:
                kept = cache.kept if isinstance(cache, WindowCache) else torch.arange(span.start)
                return near.tiles(span, kept, visibility)
            pairs = near.mask(span, pairs, stop=span.stop)
        if pairs is not None and pairs.ndim == 3:
            pairs = pairs[:, None]  # an axis for the heads
        return pairs


# Annotations of the block have no shapes: checking them in tests would break `torch.compile`.


class Block(nn.Module):
    """Attention and MLP, each scaled before and gated after by the modulation."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, cross_attention: bool = False
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(4, width))
        self.attn = Attention(width, heads)
        self.cross_attn = CrossAttention(width, heads) if cross_attention else None
        self.mlp = MLP(width, hidden)

    def forward(
        self,
        h: Tensor,  # [B, n, width]
        modulation: Tensor,  # [..., n or 1, 4, width]
        rope: Tensor | None = None,  # [2, ..., n, size]
        *,
        attn_mask: Tensor | Tiles | None = None,  # [n, m] or [M, 1, n, m]
        kv: KVSlot | None = None,
        cross: CrossKV | None = None,
    ) -> Tensor:
        scale_1, gate_1, scale_2, gate_2 = (modulation + self.scale_shift_table).unbind(-2)
        h = torch.addcmul(h, gate_1, self.attn(norm(h) * scale_1, rope, attn_mask=attn_mask, kv=kv))
        if self.cross_attn is not None and cross is not None:
            h = h + self.cross_attn(norm(h), cross)
        return torch.addcmul(h, gate_2, self.mlp(norm(h) * scale_2))


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, rotary positions and a cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        h: Tensor,  # [B, n, width]
        rope: Tensor | None = None,
        *,
        attn_mask: Tensor | Tiles | None = None,
        kv: KVSlot | None = None,
    ) -> Tensor:
        batch, n, _ = h.shape
        qkv = self.qkv(h).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        qk = norm(qkv[:2]) * self.qk_scale.view(2, 1, 1, 1, -1)  # [2, B, heads, n, size]
        if rope is not None:
            # Rotate each pair (a, b) of a head: (a cos - b sin, b cos + a sin).
            qk = torch.addcmul(qk * rope[0], qk.roll(qk.shape[-1] // 2, -1), rope[1])
        (q, k), v = qk.to(qkv.dtype).unbind(0), qkv[2]
        if kv is not None:
            k, v = kv.append(k, v)
        return self.out(attend(q, k, v, attn_mask=attn_mask))


class CrossAttention(nn.Module):
    """Attention to a sequence whose keys and values are computed once."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def keys_values(self, sequence: Float[Tensor, "C L width"]) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, `[C, heads, L, size]` each."""
        kv = self.kv(norm(sequence)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return norm(k).to(v.dtype), v

    def forward(self, h: Tensor, cross: CrossKV) -> Tensor:
        k, v, mask = cross
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(norm(q).to(v.dtype), k, v, attn_mask=mask.to(v.dtype))
        return self.out(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, *, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h), approximate=self.approximate))


class ColumnLinear(nn.Module):
    """A copy of an `nn.Linear` for decoding on a CPU, its weight stored column by column.

    A product with few tokens, as in a small group, mostly reads the weight, and a CPU reads it
    faster in this layout (benchmarks/engine.md). Columns of whole memory pages are set apart by a
    cache line, because they would evict each other from the cache.
    """

    PAGE, LINE = 4096, 64  # bytes

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        columns = linear.weight.detach().t()  # [in, out]
        rows, length = columns.shape
        size = columns.element_size()
        gap = 0 if length * size % self.PAGE else self.LINE // size
        memory = columns.new_empty(rows, length + gap)
        self.weight = memory[:, :length].copy_(columns).t()  # [out, in]
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def replace(cls, module: nn.Module, inside: tuple[type[nn.Module], ...]) -> nn.Module:
        """The module, which shares all but its plain linear layers; those become copies.

        A linear layer of another class (an adapter, a quantised layer) or with hooks stays, and so
        does all in modules of classes that are not `inside`.
        """
        if type(module) is nn.Linear:
            return module if module._forward_hooks or module._forward_pre_hooks else cls(module)
        if type(module) not in inside:
            return module
        module = copy.copy(module)
        module._modules = {
            name: child if child is None else cls.replace(child, inside)
            for name, child in module._modules.items()
        }
        return module


def column_blocks(
    blocks: nn.ModuleList,
    inside: tuple[type[nn.Module], ...],
    *,
    like: Tensor,
    dtype: torch.dtype | None,
) -> list[nn.Module] | None:
    """Copies of a network's blocks for decoding on a CPU; None where they would not be faster.

    Args:
        blocks: of the network.
        inside: the classes of modules whose linear layers are copied.
        like: one of the weights.
        dtype: what the network computes in.
    """
    compiled = any(block._compiled_call_impl is not None for block in blocks)
    if like.is_cpu and dtype == like.dtype and not compiled:
        return [ColumnLinear.replace(block, inside) for block in blocks]
    return None


class TimeEmbedding(nn.Module):
    """Fourier features of the local time, and an MLP on them."""

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


def attend(
    q: Tensor,  # [B, heads, n, size]
    k: Tensor,  # [B, heads, m, size]
    v: Tensor,
    *,
    attn_mask: Tensor | Tiles | None,  # [n, m] or [M, 1, n, m]
) -> Tensor:
    """Attention, and the heads side by side again, `[B, n, heads size]`."""
    batch, heads, n, _ = q.shape
    if isinstance(attn_mask, Tiles):
        return attn_mask.attend(q, k, v).transpose(1, 2).reshape(batch, n, -1)
    mask = None if attn_mask is None else attn_mask.to(q.dtype)
    if mask is not None and mask.ndim == 4 and 1 < len(mask) < batch:
        # Parts of the batch with one mask each: as heads of as many examples.
        q, k, v = (part.reshape(len(mask), -1, *part.shape[2:]) for part in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return h.reshape(batch, heads, n, -1).transpose(1, 2).reshape(batch, n, -1)


def compile_blocks(blocks: nn.ModuleList, *, mode: str | None = None) -> None:
    """Compile every block in place, as a whole; the names of the weights stay as they are."""
    # Calls with and without mask, cache, gradient, …: about a dozen, and torch's limit is 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in blocks:  # the blocks share what is compiled
        block.compile(mode=mode, dynamic=True, fullgraph=True)


def norm(h: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance over the channels."""
    return torch.layer_norm(h, h.shape[-1:], eps=eps)


def rotary_angles(coords: Float[Tensor, "N 3"], size: int) -> Float[Tensor, "2 N size"]:
    """Cosines and signed sines; half of a head rotates with the row, half with the column."""
    frequency = 100.0 ** -torch.linspace(0, 1, size // 4, device=coords.device)
    angle = (coords[:, 1:, None] * frequency).flatten(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def to_decode_order(
    features: Float[Tensor, "C N F"], order: Int[Tensor, "*B N"]
) -> Float[Tensor, "C N F"]:
    """Raster order to decode order; orders that differ between examples go with the condition."""
    if order.ndim == 1:
        return features[:, order]
    features = features.expand(len(order), -1, -1)
    return features.gather(1, order[..., None].expand_as(features))
