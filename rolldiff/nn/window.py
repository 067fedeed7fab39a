"""Local attention: a token sees only tokens at most `w` rows and `w` columns away.

Tokens are sorted into square tiles of their places, whatever the decode order. The queries of a
tile see keys of a square around it alone, so the cost of a call grows with its tokens, not with
their square, and no mask of all pairs is ever made. Who may see whom among finished, moving and
waiting tokens is followed as well.

A cache keeps only the finished tokens that an unfinished one can still see.
"""

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.schedule import Visibility
from rolldiff.errors import UsageError

__all__ = ["Neighbourhood", "Tiles", "check_grid", "near"]


class Tiles(NamedTuple):
    """Which keys each tile of queries sees.

    Attributes:
        query: of each tile, indices into the queries; short tiles are filled up with 0.
        key: of each tile, indices into the keys.
        mask: 0 where a query sees a key, minus infinity elsewhere; None if all see all.
        place: of each query, where it lies in the tiles.
    """

    query: Int[Tensor, "T q"]
    key: Int[Tensor, "T k"]
    mask: Float[Tensor, "T q k"] | None
    place: Int[Tensor, " n"]

    def to(self, device: torch.device) -> "Tiles":
        """The same on a device."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        query, key, place = (
            part.to(device, non_blocking=True) for part in (self.query, self.key, self.place)
        )
        return Tiles(query, key, mask, place)

    def attend(
        self,
        q: Float[Tensor, "B heads n size"],
        k: Float[Tensor, "B heads m size"],
        v: Float[Tensor, "B heads m size"],
    ) -> Float[Tensor, "B heads n size"]:
        """Attention of each query to the keys that it sees."""
        shape = q.shape
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        mask = None if self.mask is None else self.mask.to(q.dtype)
        h = F.scaled_dot_product_attention(
            q[:, self.query], k[:, self.key], v[:, self.key], attn_mask=mask
        )  # [B heads, T, q, size]
        return h.flatten(1, 2)[:, self.place].view(shape)


KEPT_TILES = 8  # a decoding alternates between a few


class Neighbourhood:
    """The places of tokens in decode order, and how far they see.

    Args:
        places: row and column of each token.
        window: `w`.
    """

    def __init__(self, places: Int[Tensor, "*B N 2"], window: int) -> None:
        self.places, self.window = places, window
        self._tiles: dict[tuple[object, ...], Tiles] = {}

    @cached_property
    def on_cpu(self) -> Int[Tensor, "N 2"]:
        """The places, where tiles are made."""
        return self.places.cpu()

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        rows, columns = (int(side) + 1 for side in self.on_cpu.amax(0))
        return rows, columns

    @cached_property
    def last(self) -> Int[Tensor, " N"]:
        """The last token, in decode order, that sees each of them."""
        w, (row, column) = self.window, self.on_cpu.unbind(1)
        rank = torch.full(self.sides, -1.0, dtype=torch.float64)
        rank[row, column] = torch.arange(len(row), dtype=torch.float64)
        last = rank[None, None]
        for kernel, padding in (((2 * w + 1, 1), (w, 0)), ((1, 2 * w + 1), (0, w))):
            last = F.max_pool2d(last, kernel, stride=1, padding=padding)
        return last[0, 0].long()[row, column]

    def mask(
        self, query: slice, mask: Float[Tensor, "*M n m"] | None, *, stop: int
    ) -> Float[Tensor, "*B n m"]:
        """A mask of all pairs that follows the window too, for few tokens.

        Args:
            query: the tokens of the call.
            mask: who may see whom; None if all see all.
            stop: the first `stop` tokens are the keys.
        """
        sees = near(self.places[..., query, :], self.places[..., :stop, :], self.window)
        if mask is None:
            mask = torch.zeros(sees.shape[-2:], device=sees.device)
        if mask.ndim == 3 and sees.ndim == 3:  # a mask for each part of the batch
            mask = mask.repeat_interleave(len(sees) // len(mask), dim=0)
        return mask.where(sees, -torch.inf)

    def needed(self, kept: Int[Tensor, " k"], length: int) -> Int[Tensor, " j"]:
        """Which of some finished tokens a token from position `length` on can still see.

        Args:
            kept: decode positions.
            length: finished tokens.

        Returns:
            Indices into `kept`.
        """
        return torch.nonzero(self.last[kept] >= length)[:, 0]

    def tiles(self, query: slice, kept: Int[Tensor, " k"], visibility: Visibility | None) -> Tiles:
        """The tiles of a call.

        Args:
            query: the tokens of the call.
            kept: decode positions of the tokens before them that they may attend to.
            visibility: who may see whom; None if all see all.
        """
        # What is kept follows from the first of the queries and how many there are.
        call = (query.start, query.stop, len(kept), visibility)
        if call not in self._tiles:
            if len(self._tiles) == KEPT_TILES:
                self._tiles.clear()
            key = torch.cat([kept, torch.arange(query.start, query.stop)])
            tiles, device = self._make_tiles(query, key, visibility), self.places.device
            self._tiles[call] = tiles.to(device)
        return self._tiles[call]

    def _make_tiles(
        self, query: slice, key: Int[Tensor, " m"], visibility: Visibility | None
    ) -> Tiles:
        w, side = self.window, max(self.window, 4)
        here = self.on_cpu[query]
        rows, columns = self.sides
        tile = here[:, 0] // side * (columns // side + 1) + here[:, 1] // side
        _, tile, count = tile.unique(return_inverse=True, return_counts=True)
        # Queries by tile: the i-th of a tile goes to its column i.
        by_tile = tile.argsort(stable=True)
        start = count.cumsum(0) - count
        column = torch.empty_like(tile)
        column[by_tile] = torch.arange(len(tile)) - start[tile[by_tile]]
        place = tile * int(count.max()) + column
        queries = torch.zeros(len(count), int(count.max()), dtype=torch.long)
        queries.view(-1)[place] = torch.arange(len(tile))
        filled = torch.zeros(queries.shape, dtype=torch.bool)
        filled.view(-1)[place] = True

        # The keys around each tile, through a map from places to keys.
        at = torch.full((rows + 2 * w + side, columns + 2 * w + side), -1)
        where = self.on_cpu[key] + w
        at[where[:, 0], where[:, 1]] = torch.arange(len(key))
        corner = here[queries[:, 0]] // side * side  # [T, 2], shifted by w in the map
        reach = torch.arange(side + 2 * w)
        keys = at[(corner[:, :1] + reach)[:, :, None], (corner[:, 1:] + reach)[:, None, :]].flatten(
            1
        )
        keys = keys.sort(dim=1, descending=True).values
        keys = keys[:, : max(1, int((keys >= 0).sum(1).max()))]

        known, keys = keys >= 0, keys.clamp(min=0)
        sees = near(here[queries], self.on_cpu[key[keys]], w) & known[:, None]
        if visibility is not None:
            block = visibility.blocks
            sees &= block[query][queries][:, :, None] >= block[key[keys]][:, None]
        sees |= ~filled[:, :, None]  # some kernels give NaN for a row without keys
        mask = None
        if not bool(sees.all()):
            mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
        return Tiles(queries, keys, mask, place)


def near(
    query: Int[Tensor, "*B n 2"], key: Int[Tensor, "*B m 2"], window: int
) -> Bool[Tensor, "*B n m"]:
    """Whether two places are at most so many rows and columns apart."""
    away = (query[..., :, None, :] - key[..., None, :, :]).abs().amax(-1)
    return away <= window


def check_grid(layout: Layout) -> None:
    """Refuse a layout in which rows and columns do not say who is near whom.

    Raises:
        UsageError: if it has levels, or two tokens at a place.
    """
    level, places = layout.coords[:, 0], layout.coords[:, 1:].long()
    if (level != level[0]).any() or len(places.unique(dim=0)) < len(places):
        raise UsageError(f"window must be None for a layout with levels, got {layout}")
