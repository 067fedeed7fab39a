"""What the transformer keeps between its calls, and what one call takes of it.

A context is made once for a decode, or for a training batch. A call is for a span of tokens; what
lies there is views, which see what arrives later too. A decode asks for the same span many times in
a row, so the last one is kept.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.nn.blocks import Kept, Memory
from rolldiff.nn.graphs import Graphs
from rolldiff.nn.places import causal_bias

__all__ = ["Context", "Here"]


class Here(NamedTuple):
    """What a call for a span of `n` tokens takes of the context."""

    place: Float[Tensor, "*B n width"]
    cos: Float[Tensor, "*B n size"]
    sin: Float[Tensor, "*B n size"]
    tokens: Float[Tensor, "C n width"] | None
    hidden: Float[Tensor, "C 1 n L"] | None
    bias: Float[Tensor, "*B n m"] | None
    memory: list[tuple[Kept, Kept] | None]


@dataclass
class Context:
    """What `Transformer.prepare` computes once; shapes with N are in decode order."""

    place: Float[Tensor, "*B N width"]
    order: Int[Tensor, "*B N"]
    cos: Float[Tensor, "*B N size"]
    sin: Float[Tensor, "*B N size"]
    group: Int[Tensor, "*B N"]
    causal: bool
    depth: int
    modulation: Float[Tensor, "C 1 mods"] | None = None
    tokens: Float[Tensor, "C N width"] | None = None
    sequence: list[Memory] | None = None
    hidden: Float[Tensor, "C 1 N L"] | None = None
    bias: Float[Tensor, "B 1 N N"] | None = None  # of groups that differ between examples
    memory: list[Memory] | None = None
    up: list[Tensor | None] | None = None  # the blocks' weights as few rows like them
    cached: int | None = None
    groups: list[int] = field(default_factory=list)
    start: Int[Tensor, ""] | None = None  # of the span, where shapes are to stay the same
    graphs: Graphs = field(default_factory=Graphs)
    _last: tuple[slice, Here] | None = None

    def here(self, span: slice | Tensor) -> Here:
        """What lies in a span, given by a slice or by a tensor of places.

        A slice reads no more of the memory than it must; a tensor keeps all shapes the same
        wherever the span is.
        """
        if isinstance(span, Tensor):
            return self._found(span)
        if self._last is None or self._last[0] != span:
            self._last = span, self._found(span)
        return self._last[1]

    def _found(self, span: slice | Tensor) -> Here:
        memory: list[tuple[Kept, Kept] | None] = [None] * self.depth
        if self.memory is not None:
            memory = [(Kept.at(k, span), Kept.at(v, span)) for k, v in self.memory]
        return Here(
            place=self.place[..., span, :],
            cos=self.cos[..., span, :],
            sin=self.sin[..., span, :],
            tokens=None if self.tokens is None else self.tokens[:, span],
            hidden=None if self.hidden is None else self.hidden[:, :, span],
            bias=self._mask(span),
            memory=memory,
        )

    def _mask(self, span: slice | Tensor) -> Tensor | None:
        if not self.causal or self.bias is not None:
            return self.bias
        if isinstance(span, Tensor):
            several = self.groups[-1] > 0
            return causal_bias(self.group[span], self.group) if several else None
        if self.groups[span.start] == self.groups[span.stop - 1]:
            return None  # one group: it sees all that is there
        return causal_bias(self.group[span], self.group[: span.stop])
