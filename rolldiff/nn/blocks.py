"""The block of the transformer: attention with a memory of what is finished, and feed-forward."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "Cross", "Kept", "Memory", "apart", "norm"]

# Up to so many numbers torch's own gelu on a CPU is done before oneDNN's has started.
FEW = 2**14

# Bytes of a page, and of the line that a cache reads at once.
PAGE, LINE = 4096, 64

Memory = tuple[Tensor, Tensor]  # keys and values of a layer, each [B, heads, N, size]


class Kept(NamedTuple):
    """The keys or the values of a layer, `[B, heads, N, size]`, as a span of tokens meets them.

    `here` is where the span's own go and `seen` what it may see; with `places` both are the whole.
    """

    here: Tensor
    seen: Tensor
    places: Tensor | None = None

    @classmethod
    def at(cls, memory: Tensor, span: slice | Tensor) -> "Kept":
        """A memory as it is met by a span, given by a slice or by a tensor of places."""
        if isinstance(span, Tensor):
            return cls(memory, memory, span)
        return cls(memory[:, :, span], memory[:, :, : span.stop])

    def add(self, new: Tensor) -> Tensor:
        """Write what the span adds; what it may see."""
        if self.places is not None:
            return self.here.index_copy_(2, self.places, new)
        self.here.copy_(new)
        return self.seen


class Block(nn.Module):
    """Attention and feed-forward, each scaled before and gated after by the modulation."""

    def __init__(self, width: int, heads: int, hidden: int, *, cross: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(4, width))
        self.qkv = Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads))
        self.out = Linear(width, width)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        self.cross = Cross(width, heads) if cross else None
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(
        self,
        h: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        memory: tuple[Kept, Kept] | None = None,
        sequence: Memory | None = None,
        hidden: Tensor | None = None,
        up: Tensor | None = None,
    ) -> Tensor:
        """`up` takes the place of that weight, see `apart`."""
        scale_1, gate_1, scale_2, gate_2 = (modulation + self.table).unbind(-2)
        batch, n, width = h.shape
        rows = (norm(h) * scale_1).view(-1, width)
        qkv = self.qkv.forward(rows).view(batch, n, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, heads, n, size]
        qk = norm(qkv[:2]) * self.qk_scale.view(2, 1, 1, 1, -1)
        # Turn each pair (a, b) of a head: (a cos - b sin, b cos + a sin).
        qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        q, k = qk.to(qkv.dtype).unbind(0)
        v = qkv[2]
        if memory is not None:
            k, v = memory[0].add(k), memory[1].add(v)
        bias = bias if bias is None else bias.to(q.dtype)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        rows = self.out.forward(seen.transpose(1, 2).reshape(-1, width))
        h = torch.addcmul(h, gate_1, rows.view(h.shape))
        if self.cross is not None and sequence is not None:
            h = h + self.cross(h, sequence, hidden)
        rows = (norm(h) * scale_2).view(-1, width)
        rows = self.down.forward(gelu(self.up.forward(rows, up)))
        return torch.addcmul(h, gate_2, rows.view(h.shape))


class Cross(nn.Module):
    """Attention to a sequence whose keys and values are computed once."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(width, 2 * width, bias=False)
        self.out = Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def remember(self, sequence: Tensor) -> Memory:
        """Keys and values of a sequence `[C, L, width]`."""
        examples, length, width = sequence.shape
        kv = self.kv.forward(norm(sequence).view(-1, width))
        kv = kv.view(examples, length, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return norm(k).to(v.dtype), v

    def forward(self, h: Tensor, sequence: Memory, hidden: Tensor | None) -> Tensor:
        batch, n, width = h.shape
        q = self.q.forward(norm(h).view(-1, width))
        q = q.view(batch, n, self.heads, width // self.heads).transpose(1, 2)
        k, v = sequence
        hidden = hidden if hidden is None else hidden.to(v.dtype)
        seen = F.scaled_dot_product_attention(norm(q).to(v.dtype), k, v, attn_mask=hidden)
        return self.out.forward(seen.transpose(1, 2).reshape(-1, width)).view(h.shape)


class Linear(nn.Module):
    """`x W + b` for rows `x`, the weight stored as `[in, out]`.

    With few rows, as in a small group, a CPU reads it faster so than the other way round. The
    product takes the weight itself, not a view of it, whose cast autocast would not keep. Blocks
    call `forward` itself: looking for hooks takes a CPU as long as a small product.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        edge = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(inputs, outputs).uniform_(-edge, edge))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-edge, edge)) if bias else None

    def forward(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        if self.bias is None:
            return rows @ weight
        return torch.addmm(self.bias, rows, weight)


def apart(weight: Tensor) -> Tensor | None:
    """A copy with a cache line between its rows, if they are whole pages long; for a CPU.

    All of a column of such a matrix falls into the same few places of a cache and pushes itself
    out. Products with few rows, which mostly read the matrix, feel it.
    """
    if not weight.is_cpu or weight.ndim != 2 or weight.stride(0) * weight.itemsize % PAGE:
        return None
    rows, length = weight.shape
    copy = weight.new_empty(rows, length + LINE // weight.itemsize)[:, :length]
    return copy.copy_(weight)


def norm(h: Tensor) -> Tensor:
    """Zero mean, unit variance over the channels."""
    return torch.layer_norm(h, h.shape[-1:])


def gelu(rows: Tensor) -> Tensor:
    """Gelu of rows; of few, on a CPU, by way of a transposed view, which oneDNN does not take."""
    if rows.numel() > FEW or not rows.is_cpu or torch.compiler.is_compiling():
        return F.gelu(rows)
    return F.gelu(rows.t()).t()
