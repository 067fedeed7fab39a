"""Conditions that are still arriving while the image is decoded.

Pieces come from an iterator, in raster order. Before a group is decoded, as many are taken as its
tokens look at, and no more: the first rows are there before the last token exists.
"""

from collections.abc import Iterator
from typing import Any

import torch

from rolldiff.conditioning import Conditions
from rolldiff.conditions import Given, TokenGrid, TokenSequence, piece_of

__all__ = ["Arrivals"]


class Arrivals:
    """The conditions of a decode, some of them iterators.

    Args:
        conditions: what there is.
        cond: what the user gave. An iterator yields pieces `[B, k]` or `[B, k, C]` of a grid or a
            sequence, `k` tokens each.
        batch: examples.
        device: where they go.

    Raises:
        ValueError: at once for what is there already, later for a piece of the wrong shape, type or
            range, and for an iterator that ends before all that is looked at has come.
    """

    def __init__(self, conditions: Conditions, cond: Any, batch: int, device: torch.device) -> None:
        split = conditions.split(cond)
        self._arriving = {n: value for n, value in split.items() if isinstance(value, Iterator)}
        here = {name: value for name, value in split.items() if name not in self._arriving}
        self._parts = dict(zip(conditions.names, conditions.parts, strict=True))
        single = len(self._parts) == 1
        self._called = {n: "cond" if single else f"cond[{n!r}]" for n in self._parts}
        for name in self._arriving:
            if not isinstance(self._parts[name], TokenGrid | TokenSequence):
                raise ValueError(
                    f"{self._called[name]} must be given at once, for it is no grid or sequence "
                    "of tokens; got an iterator"
                )
        self.null = conditions.null(batch, device)
        self.given = conditions.check(here or None, batch, device)
        self._count = dict.fromkeys(self._arriving, 0)
        self._batch = batch

    @property
    def awaited(self) -> bool:
        """Whether there is any iterator among the conditions."""
        return bool(self._arriving)

    def wait(self, needs: dict[str, int]) -> bool:
        """Take pieces until so many tokens are there; whether there was something new.

        Args:
            needs: how many tokens of each condition are looked at.
        """
        news = False
        for name in self._arriving:
            while self._count[name] < needs[name] and self._next(name, needs[name]):
                news = True
        return news

    def _next(self, name: str, wanted: int) -> bool:
        part, called, count = self._parts[name], self._called[name], self._count[name]
        assert isinstance(part, TokenGrid | TokenSequence)
        # What runs in there is not ours: its tensors may be kept, and trained on later.
        with torch.inference_mode(False), torch.no_grad():
            piece = next(self._arriving[name], None)
        if piece is None:
            # A sequence that all tokens look at may end where it likes.
            if isinstance(part, TokenSequence) and part.ahead is None and count:
                self._count[name] = part.length
                return False
            raise ValueError(f"{called} must go on to {wanted} tokens, got an end after {count}")
        value, there = self.given[name]
        tokens = piece_of(part, piece, self._batch, value.device, name=called)
        total = there[0].numel()
        after = count + tokens.shape[1]
        if after > total:
            raise ValueError(f"{called} must have {total} tokens at most, got {after}")
        if tokens.is_floating_point() and tokens.dtype != value.dtype:
            value = value.to(tokens.dtype)
            self.given[name] = Given(value, there)
        value.flatten(1, there.ndim - 1)[:, count:after] = tokens
        there.flatten(1)[:, count:after] = True
        self._count[name] = after
        return True
