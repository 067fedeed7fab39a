"""Which tokens move together, and in which order the groups come.

A grouping is a decode order (a permutation of the raster tokens) dealt into `num_groups` runs whose
sizes differ by one at most. Everything downstream works in decode order, so a group is a contiguous
span, and at any moment an image is three spans: finished | moving | waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ORDERS", "Grouping", "Order", "decode_order"]

Order = str | Sequence[int]

ORDERS = (
    "top_to_bottom",
    "bottom_to_top",
    "left_to_right",
    "right_to_left",
    "centre_out",
    "cells:K",
    "random:SEED",
)


def _parameter(order: str, value: str, least: int) -> int:
    if not value.isdigit() or int(value) < least:
        raise ValueError(
            f"order {order.partition(':')[0]!r} takes a whole number of {least} or more after a "
            f"colon, got {order!r}"
        )
    return int(value)


def decode_order(order: Order, coords: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
    """The permutation that lists raster tokens in the order in which they are decoded.

    Coarser levels always come first. Within a level the named orders sort by row and column;
    `cells:K` takes blocks of K x K tokens in raster order, `centre_out` goes by the distance from
    the centre, and `random:SEED` is a shuffle fixed by its seed.

    Args:
        order: one of `ORDERS`, or the permutation itself.
        coords: level, row and column of each token, in raster order.

    Raises:
        ValueError: if the name is unknown or the sequence is not a permutation.
    """
    num_tokens = len(coords)
    if not isinstance(order, str):
        permutation = torch.as_tensor(list(order), dtype=torch.long)
        if sorted(permutation.tolist()) != list(range(num_tokens)):
            raise ValueError(
                f"order must be a permutation of 0 … {num_tokens - 1}, got {len(permutation)} "
                "numbers that are not one"
            )
        return permutation
    level, row, column = coords.double().numpy().T
    name, _, parameter = order.partition(":")
    keys: tuple[np.ndarray, ...]
    match name:
        case "top_to_bottom":
            keys = (row, column)
        case "bottom_to_top":
            keys = (-row, column)
        case "left_to_right":
            keys = (column, row)
        case "right_to_left":
            keys = (-column, row)
        case "centre_out":
            keys = ((row - row.mean()) ** 2 + (column - column.mean()) ** 2, row, column)
        case "cells":
            k = _parameter(order, parameter, least=1)
            keys = (row // k, column // k, row, column)
        case "random":
            seed = _parameter(order, parameter, least=0)
            keys = (np.random.default_rng(seed).permutation(num_tokens),)
        case _:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    # lexsort takes the most significant key last.
    return torch.from_numpy(np.lexsort((*reversed(keys), level)))


@dataclass(frozen=True)
class Grouping:
    """`num_tokens` tokens in decode order, dealt to `num_groups` groups.

    Sizes are those of `numpy.array_split`: the first `N mod G` groups hold one token more. With the
    order `top_to_bottom` the groups are bands of rows where the count divides them, and runs of the
    raster beyond that.

    Raises:
        ValueError: if `num_groups` is not in 1 … `num_tokens`.
    """

    num_tokens: int
    num_groups: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_groups, int) or not 1 <= self.num_groups <= self.num_tokens:
            raise ValueError(
                f"num_groups must be a whole number in 1 … {self.num_tokens} (the tokens), "
                f"got {self.num_groups!r}"
            )

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """`G + 1` boundaries: group `g` is the span `ends[g] … ends[g + 1]` of the decode order."""
        size, larger = divmod(self.num_tokens, self.num_groups)
        return tuple(g * size + min(g, larger) for g in range(self.num_groups + 1))

    @cached_property
    def group(self) -> Int[Tensor, " N"]:
        """The group of each token in decode order: non-decreasing, from 0 to `num_groups - 1`."""
        sizes = torch.tensor(self.ends).diff()
        return torch.repeat_interleave(torch.arange(self.num_groups), sizes)
