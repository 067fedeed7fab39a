"""Where tokens are: their order, who may see whom, and by how much a head turns."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["causal_bias", "in_order", "rotation"]


def in_order(rows: Float[Tensor, "C N F"], order: Int[Tensor, "*B N"]) -> Float[Tensor, "C N F"]:
    """Raster order to decode order; an order for each example goes with its condition."""
    if order.ndim == 1:
        return rows[:, order]
    rows = rows.expand(len(order), -1, -1)
    return rows.gather(1, order[..., None].expand_as(rows))


def causal_bias(query: Int[Tensor, "*B n"], key: Int[Tensor, "*B m"]) -> Float[Tensor, "*B n m"]:
    """0 where a query of a group may see a key of another, minus infinity elsewhere."""
    hidden = query[..., :, None] < key[..., None, :]
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


def rotation(coords: Float[Tensor, "N 3"], size: int) -> Float[Tensor, "2 N size"]:
    """Cosines and signed sines: half of a head's pairs turn with the row, half with the column."""
    frequency = 100.0 ** -torch.linspace(0, 1, size // 4)
    angle = (coords[:, 1:, None] * frequency).flatten(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
