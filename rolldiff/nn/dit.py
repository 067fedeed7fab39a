"""`DiT`: the diffusion transformer whose weights people have, with a time per token and a cache.

The block is that of DiT and SiT (Peebles and Xie 2023, §3.2, adaLN-Zero; Ma et al. 2024): layer
norms whose shift, scale and gate are a projection of time and label, attention with biases, an MLP
with the tanh form of GELU, and fixed sines and cosines for the places. In the original all tokens
have one time. Here each has its own, and a mask says who sees whom, so the same weights compute the
same for one group, and can be trained further for several. `integrations.dit` loads weights.

A projection of the time for every token and block costs half as much again as the block itself. All
tokens of a call share one row of it where they have one time, as all moving tokens do without
overlap. On a CPU, tokens in a row share one; on an accelerator, finding them would wait for it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rolldiff.conditioning import Condition, ConditionEmbedder, Conditioning, Masked
from rolldiff.diffusion.layout import Layout, Patches, check_layout
from rolldiff.diffusion.schedule import Visibility
from rolldiff.errors import UsageError, boolean, finite_number, sequence, whole_number
from rolldiff.nn.denoiser import Backbone
from rolldiff.nn.transformer import (
    MAX_DEPTH,
    MAX_WIDTH,
    MLP,
    KVCache,
    KVSlot,
    attend,
    column_blocks,
    compile_blocks,
    norm,
    to_decode_order,
)

__all__ = ["DiT"]

FREQUENCIES = 128  # of the time, half the channels of its features
MAX_PERIOD = 10_000


class Context(NamedTuple):
    """What `DiT.prepare` computes once; tokens are in decode order."""

    pos_embed: Float[Tensor, "*B N width"]
    cond: Float[Tensor, "C 1 E"]  # added to the embedded time
    tokens: Float[Tensor, "C N width"] | None


class DiT(Backbone):
    """A DiT or SiT over the patches of an image.

    Args:
        layout: `Patches`.
        width: channels; a multiple of `heads` and of 4, at most 2^16.
        depth: blocks, at most 1000.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP, divided by `width`; at most 64.
        condition: class labels or grids of tokens, one or several by name in a dictionary. A
            sequence of tokens needs cross-attention, which this network does not have.
        timestep: `(a, b)`: the network is told `a t + b` of a local time. (1000, -1) for DDPM's
            1000 timesteps from 0, with `LinearBeta`; (-1, 1) for SiT, where 1 is data.
        frequency_shift: 0 for frequencies of the time `10000^(-i / 128)` as in DiT, 1 for
            `10000^(-i / 127)` as in diffusers.
        mlp_eps: of the layer norm before the MLP; 1e-6 in DiT, 1e-5 in diffusers.
        separate_embeddings: whether every block has its own embedding of time and label, as
            networks that diffusers has trained do, and the head that of the first block.
        causal: whether masks are followed; see `Transformer`.
        gradient_checkpointing: see `Transformer`.

    Raises:
        UsageError: if a size is out of range or does not fit.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        condition: Condition | Mapping[str, Condition] | Conditioning | None = None,
        timestep: Sequence[float] = (1000.0, -1.0),
        frequency_shift: int = 0,
        mlp_eps: float = 1e-6,
        separate_embeddings: bool = False,
        causal: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(check_layout(layout), Patches):
            raise UsageError(f"layout must be Patches for a DiT, got {type(layout).__name__}")
        self.layout = layout
        width = whole_number(width, "width", maximum=MAX_WIDTH)
        depth = whole_number(depth, "depth", maximum=MAX_DEPTH)
        heads = whole_number(heads, "heads")
        if width % heads or width % 4:
            raise UsageError(
                f"width must be a multiple of heads and of 4, got width {width} and heads {heads}"
            )
        mlp_ratio = finite_number(mlp_ratio, "mlp_ratio", minimum=1 / width, maximum=64)
        line = [
            finite_number(number, "each of timestep")
            for number in sequence(timestep, "timestep", "two numbers")
        ]
        if len(line) != 2 or not line[0]:
            raise UsageError(f"timestep must be two numbers, the first not 0, got {line}")
        self.timestep = line[0], line[1]
        self.frequency_shift = whole_number(
            frequency_shift, "frequency_shift", minimum=0, maximum=1
        )
        mlp_eps = finite_number(mlp_eps, "mlp_eps", minimum=1e-12, maximum=1)
        separate = boolean(separate_embeddings, "separate_embeddings")
        self.causal = causal = boolean(causal, "causal")
        self.gradient_checkpointing = boolean(gradient_checkpointing, "gradient_checkpointing")
        self.conditioning = Conditioning.of(condition)
        self.width, self.heads = width, heads
        self.config = {
            "layout": layout,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "condition": self.conditioning,
            "timestep": self.timestep,
            "frequency_shift": self.frequency_shift,
            "mlp_eps": mlp_eps,
            "separate_embeddings": separate,
            "causal": causal,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        self.embed = nn.Linear(layout.token_dim, width)
        self.copies = depth if separate else 1
        self.time_embed = nn.ModuleList(TimeEmbedding(width) for _ in range(self.copies))
        self.cond_embedder = ConditionEmbedder(
            self.conditioning, layout, width=width, modulation=self.copies * width
        )
        if self.cond_embedder.null_token is not None:
            raise UsageError(
                "condition must be labels or grids for a DiT, which has no cross-attention, got a "
                "sequence of tokens"
            )
        hidden = max(1, int(mlp_ratio * width))
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, mlp_eps=mlp_eps) for _ in range(depth)
        )
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, layout.token_dim)
        self._initialise()
        # Not a buffer: it is no weight, and stays in float32 whatever type the weights are.
        self._pos_embed = sines_of_places(layout.coords, width)

    def _initialise(self) -> None:
        """As in DiT: Xavier, and zeros where a block or the head ends."""
        times: list[nn.Linear] = []
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, TimeEmbedding):
                times += [module.hidden, module.out]
        for layer in times:
            nn.init.normal_(layer.weight, std=0.02)
        zero = [self.head_modulation, self.head]
        zero += [block.modulation for block in self.blocks if isinstance(block, Block)]
        for layer in zero:
            nn.init.zeros_(layer.weight)

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
        count = next((len(mask) for _, mask in cond.values()), 1)
        weight = self.embed.weight
        if self._pos_embed.device != order.device:  # once
            self._pos_embed = self._pos_embed.to(order.device, non_blocking=True)
        nothing = weight.new_zeros(self.copies * self.width)
        return Context(
            pos_embed=self._pos_embed[order].to(weight.dtype),
            cond=(embedded.modulation + nothing).expand(count, -1)[:, None].contiguous(),
            tokens=None if embedded.tokens is None else to_decode_order(embedded.tokens, order),
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
        like = self.embed.weight
        shape = (batch, self.heads, context.pos_embed.shape[-2], self.width // self.heads)
        cache = KVCache(len(self.blocks), shape, like, dtype=dtype)
        cache.blocks = column_blocks(self.blocks, (Block, Attention, MLP), like=like, dtype=dtype)
        return cache

    def required_prefix(self) -> dict[str, Int[Tensor, " N"]]:
        """See `Backbone.required_prefix`."""
        return self.cond_embedder.required_prefix()

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """See `Backbone.embed_time`."""
        scale, offset = self.timestep
        index = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(MAX_PERIOD) * index / (FREQUENCIES - self.frequency_shift))
        # In float32 at any type of the weights, as these networks were trained.
        angle = (scale * t + offset).float()[..., None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.embed.weight.dtype)
        return torch.cat([embed(features) for embed in self.time_embed], dim=-1)

    def compile(self, *, mode: str | None = None) -> None:
        """See `Transformer.compile`."""
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
        h = self.embed(x_t.to(self.embed.weight.dtype)) + context.pos_embed[..., span, :]
        branches = max(1, len(context.cond) // len(x_t))
        if branches > 1:  # guidance: the branches share all that precedes the condition
            h = h.repeat(branches, 1, 1)
        if context.tokens is not None:
            h = h + context.tokens[:, span]
        rows = None
        if time.is_cpu and time.ndim == 2 and len(time) > 1 and not time.requires_grad:
            time, rows = time.unique_consecutive(dim=0, return_inverse=True)
        # Each [B, r, width], r rows for n tokens.
        c = F.silu(time + context.cond).split(self.width, dim=-1)
        seen = None
        if self.causal and isinstance(mask, Tensor):
            seen = mask[:, None] if mask.ndim == 3 else mask  # an axis for the heads
        slots = None if cache is None else cache.slots(span)
        blocks = self.blocks if cache is None or cache.blocks is None else cache.blocks
        for layer, block in enumerate(blocks):
            kv = None if slots is None else slots[layer]
            here = c[layer % self.copies]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, here, rows, attn_mask=seen, kv=kv, use_reentrant=False)
            else:
                h = block(h, here, rows, attn_mask=seen, kv=kv)
        shift, scale = _spread(self.head_modulation(c[0]), rows).chunk(2, dim=-1)
        return self.head(norm(h, 1e-6) * (1 + scale) + shift)


# Annotations of the block have no shapes: checking them in tests would break `torch.compile`.


class Block(nn.Module):
    """Attention and MLP, each shifted and scaled before and gated after by time and label."""

    def __init__(self, width: int, heads: int, hidden: int, *, mlp_eps: float) -> None:
        super().__init__()
        self.mlp_eps = mlp_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden, approximate="tanh")

    def forward(
        self,
        h: Tensor,  # [B, n, width]
        c: Tensor,  # [B, r, width]
        rows: Tensor | None = None,  # [n], which row each token has; None if r is n or 1
        *,
        attn_mask: Tensor | None = None,  # [n, m] or [M, 1, n, m]
        kv: KVSlot | None = None,
    ) -> Tensor:
        modulation = _spread(self.modulation(c), rows)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        attended = self.attn(norm(h, 1e-6) * (1 + scale) + shift, attn_mask=attn_mask, kv=kv)
        h = h + gate * attended
        return h + gate_mlp * self.mlp(norm(h, self.mlp_eps) * (1 + scale_mlp) + shift_mlp)


def _spread(c: Tensor, rows: Tensor | None) -> Tensor:
    return c if rows is None else c[:, rows]


class Attention(nn.Module):
    """Self-attention with biases and a cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, h: Tensor, *, attn_mask: Tensor | None = None, kv: KVSlot | None = None
    ) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if kv is not None:
            k, v = kv.append(k, v)
        return self.out(attend(q, k, v, attn_mask=attn_mask))


class TimeEmbedding(nn.Module):
    """Two layers on the features of a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * FREQUENCIES, width)
        self.out = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(features)))


def sines_of_places(coords: Float[Tensor, "N 3"], width: int) -> Float[Tensor, "N width"]:
    """Sines and cosines of the column in the first half of the channels, of the row in the second.

    The order of DiT's `get_2d_sincos_pos_embed`, whose frequencies are `10000^(-4 i / width)`.
    """
    index = torch.arange(width // 4, dtype=torch.float64, device=coords.device)
    places = coords[:, [2, 1], None].double() * MAX_PERIOD ** (-index / (width // 4))
    return torch.cat([places.sin(), places.cos()], dim=-1).flatten(1).float()
