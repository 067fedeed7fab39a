"""Conditions: labels, grids and sequences of tokens, and what a network is shown of them.

A condition is one class. It validates what a user passes (`validate`), defines the null condition
(`null`), and makes the module that embeds it (`embedder`). Labels add to the modulation, a grid
adds a vector to each image token that lies on it, and a sequence provides keys and values for
cross-attention.

A validated condition is a value with a mask. Where the mask is False the network sees the null
embedding: because nothing was passed, because training dropped the condition for the sake of
guidance, or because that part of a streamed condition has not arrived yet. Values keep their
gradient, so that an encoder trains through them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.diffusion.layout import MAX_TOKENS, Layout
from rolldiff.diffusion.process import Shard
from rolldiff.errors import (
    FLOATS,
    WHOLE,
    UsageError,
    dense_tensor,
    instance,
    known_names,
    reason,
    sequence,
    shown,
    whole_number,
)

__all__ = [
    "ClassLabels",
    "Condition",
    "ConditionEmbedder",
    "Conditioning",
    "Embedded",
    "Embedder",
    "Masked",
    "StreamedConditions",
    "TokenGrid",
    "TokenSequence",
    "concat",
]

EXPECTED = "a ClassLabels, a TokenGrid, a TokenSequence, or several by name in a dictionary"
MAX_INDICES = 2**24  # classes, codes or channels: more are a mistake
MAX_CONDITIONS = 16


class Masked(NamedTuple):
    """A validated condition.

    Attributes:
        value: `[B, *S]` indices or `[B, *S, C]` numbers, where `S` is the condition's shape.
        mask: `[B, *S]`, False where the value is replaced by null.
    """

    value: Tensor
    mask: Bool[Tensor, "B *S"]


class Embedded(NamedTuple):
    """Conditions as the network sees them, image tokens in raster order.

    Attributes:
        modulation: what labels add to the modulation; 0 without labels.
        tokens: what grids add to each image token; None without grids.
        sequence: all sequences, concatenated; None without sequences.
        cross_attn_mask: 0 where an image token may attend to the sequence, else minus infinity.
    """

    modulation: Float[Tensor, "C mods"] | Float[Tensor, ""]
    tokens: Float[Tensor, "C N width"] | None = None
    sequence: Float[Tensor, "C L width"] | None = None
    cross_attn_mask: Float[Tensor, "C N L"] | None = None


class Embedder(nn.Module, ABC):
    """Embeds one condition."""

    @abstractmethod
    def forward(self, cond: Masked, embedded: Embedded) -> Embedded:
        """Add this condition to what the conditions before it gave."""

    def required_prefix(self) -> Int[Tensor, " N"] | None:
        """How many tokens of the condition, in raster order, each image token depends on.

        None for a condition that cannot be streamed.
        """
        return None

    def resized(self, condition: "Condition", layout: Layout) -> "Embedder":
        """The same weights for images of another size.

        Args:
            condition: for that size.
            layout: of these images.
        """
        return self


class Condition(ABC):
    """The specification of a condition."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`S`: (), (height, width) or (length,)."""

    @abstractmethod
    def validate(
        self,
        value: Any,
        batch: int,
        device: torch.device,
        *,
        name: str,
        check_values: bool = True,
    ) -> Masked:
        """What a user passed, for `batch` examples.

        Args:
            value: what it is.
            batch: number of examples.
            device: where it is needed.
            name: what the user calls it.
            check_values: whether its values are read, for which an accelerator has to be waited.

        Raises:
            UsageError: if its shape, type or range is wrong.
        """

    @abstractmethod
    def null(self, batch: int, device: torch.device) -> Masked:
        """The condition that carries no information."""

    @abstractmethod
    def embedder(self, layout: Layout, *, width: int, modulation: int) -> Embedder:
        """The module that embeds it.

        Args:
            layout: of the image.
            width: channels of the network.
            modulation: channels of the modulation.

        Raises:
            UsageError: if the condition does not fit the layout.
        """

    def resized(self, layout: Layout, other: Layout) -> "Condition":
        """The condition of images of another size.

        Args:
            layout: of the images that it was made for.
            other: of the images that are asked for.

        Raises:
            UsageError: if it does not fit them.
        """
        return self

    def validate_piece(self, piece: Any, batch: int, device: torch.device, *, name: str) -> Tensor:
        """Some tokens of a streamed condition, `[B, k]` or `[B, k, C]`.

        Raises:
            UsageError: if the condition cannot be streamed, or the piece has the wrong shape, type
                or range.
        """
        raise UsageError(
            f"{name} must be passed at once, because it is not a grid or a sequence of tokens; got "
            "an iterator"
        )


# ---------------------------------------------------------------------------------------------
# Class labels


@dataclass(frozen=True)
class ClassLabels(Condition):
    """Labels in 0 … `num_classes - 1`, `[B]`, or one for all; as numbers or, with names, as texts.

    Args:
        num_classes: number of labels.
        names: of the labels, in their order; empty or None if they have none.

    Raises:
        UsageError: if an argument is out of range, or names are missing or repeated.
    """

    num_classes: int
    names: Sequence[str] | None = ()

    def __post_init__(self) -> None:
        num_classes = whole_number(self.num_classes, "num_classes", minimum=0, maximum=MAX_INDICES)
        object.__setattr__(self, "num_classes", num_classes)
        names = () if self.names is None else tuple(sequence(self.names, "names", "texts"))
        for name in names:
            instance(name, str, "each of names", "a text")
        if names and len(set(names)) != num_classes:
            raise UsageError(
                f"names must be {num_classes} different texts, one per class, got {len(names)}"
            )
        object.__setattr__(self, "names", names)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def validate(
        self,
        value: Tensor | Sequence[int] | int,
        batch: int,
        device: torch.device,
        *,
        name: str = "cond",
        check_values: bool = True,
    ) -> Masked:
        value = _as_tensor(self._numbers(value, name), device, name)
        label = _indices(value, self.num_classes, name, check_values=check_values)
        return _present(label.expand(batch) if label.ndim == 0 else label, (batch,), name=name)

    def null(self, batch: int, device: torch.device) -> Masked:
        return _absent((batch,), 0, device)

    def embedder(self, layout: Layout, *, width: int, modulation: int) -> Embedder:
        return LabelEmbedder(self.num_classes, modulation)

    def _numbers(self, value: Any, name: str) -> Any:
        """Labels that are texts as their numbers; everything else as it is."""
        if isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
            return [self._numbers(item, name) for item in value]
        if not isinstance(value, str) or not self.names:
            return value
        if value not in self.names:
            known = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
            raise UsageError(f"{name} must be one of {known}, got {value!r}")
        return self.names.index(value)


class LabelEmbedder(Embedder):
    """A vector per label and one for null, added to the modulation."""

    def __init__(self, num_classes: int, modulation: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, modulation)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, cond: Masked, embedded: Embedded) -> Embedded:
        label = cond.value.where(cond.mask, self.embedding.num_embeddings - 1)
        return embedded._replace(modulation=embedded.modulation + self.embedding(label))


# ---------------------------------------------------------------------------------------------
# Token grids


@dataclass(frozen=True)
class TokenGrid(Condition):
    """A grid of visual tokens, latents or pixels aligned with the image.

    It is passed as `[B, h, w]` indices or `[B, h, w, C]` numbers; a low-resolution image
    `[B, C, h, w]` is passed as `image.movedim(1, -1)`. An image token depends only on the cells
    under it: of a coarse token, the mean over all that it covers. A group therefore needs the cells
    down to its own lowest row and no others, and can be decoded before the rest of the grid is
    known.

    Args:
        height: `h`, a multiple or a divisor of the image's height in tokens.
        width: `w`, likewise.
        codebook_size: number of indices, for discrete tokens; 0 for numbers.
        channels: `C`, for numbers; 0 for discrete tokens.

    Raises:
        UsageError: if a size is below 1, or not exactly one of the last two is above 0.
    """

    height: int
    width: int
    codebook_size: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        _check_kind(self)
        object.__setattr__(self, "height", whole_number(self.height, "height"))
        object.__setattr__(self, "width", whole_number(self.width, "width"))
        if self.height * self.width > MAX_TOKENS:
            raise UsageError(
                f"height and width must give at most {MAX_TOKENS} cells, got {self.height} and "
                f"{self.width}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width)

    def validate(
        self,
        value: Any,
        batch: int,
        device: torch.device,
        *,
        name: str = "cond",
        check_values: bool = True,
    ) -> Masked:
        tokens = _tokens(self, value, device, name=name, check_values=check_values)
        return _present(tokens, (batch, *self.shape), channels=self.channels, name=name)

    def validate_piece(self, piece: Any, batch: int, device: torch.device, *, name: str) -> Tensor:
        return _piece(self, piece, batch, device=device, name=name)

    def null(self, batch: int, device: torch.device) -> Masked:
        return _absent((batch, *self.shape), self.channels, device)

    def resized(self, layout: Layout, other: Layout) -> "TokenGrid":
        """A grid of as many cells per token."""
        sides = []
        for cells, axis in ((self.height, 1), (self.width, 2)):
            before, after = (int(each.coords[:, axis].max()) + 1 for each in (layout, other))
            if cells * after % before:
                raise UsageError(
                    f"image_size must give whole cells of the grid: {cells} cells for {before} "
                    f"tokens give none for {after}, got {other.image_shape[1:]}"
                )
            sides.append(cells * after // before)
        return replace(self, height=sides[0], width=sides[1])

    def embedder(self, layout: Layout, *, width: int, modulation: int) -> Embedder:
        return GridEmbedder(self, layout, width)


class GridEmbedder(Embedder):
    """For each image token, a vector of the cells under it.

    The cells under each place of the finest tokens become a vector. A token of one place has that
    of its place, and a coarse token the mean over the places that it covers.
    """

    index: Tensor
    pooled: Tensor
    last: Tensor

    def __init__(self, grid: TokenGrid, layout: Layout, width: int) -> None:
        super().__init__()
        self._place(grid, layout, device=None)
        self.tokens = _TokenEmbedding(grid.codebook_size, grid.channels, width)
        cells = self.index.shape[1]
        self.join = nn.Linear(cells * width, width) if cells > 1 else None

    def _place(self, grid: TokenGrid, layout: Layout, *, device: torch.device | None) -> None:
        """Which cells lie under which tokens.

        `index` holds the cells under each place of the finest tokens. Tokens cover rectangles of
        `extents` places; averages over these follow each other, those of the first extent first,
        and `pooled` is where each token finds its own. `last` is the last cell under a token.
        """
        level, row, column = layout.coords.long().unbind(1)
        sides = int(row.max()) + 1, int(column.max()) + 1
        places = torch.arange(sides[0] * sides[1], device="cpu")
        rows = _cells_under(grid.height, places // sides[1], "height")
        columns = _cells_under(grid.width, places % sides[1], "width")
        # [P, cells per place]: all cells of its rows and columns.
        if len(places) * rows.shape[1] * columns.shape[1] > 4 * MAX_TOKENS:
            raise UsageError(
                f"a grid must not be much larger than the image in tokens in one direction only, "
                f"got {grid}"
            )
        index = (rows[:, :, None] * grid.width + columns[:, None, :]).flatten(1)
        pooled, last = torch.empty_like(row), torch.empty_like(row)
        extents: dict[tuple[int, int], int] = {}  # and where their averages begin
        count = 0
        for here in (level == each for each in level.unique()):
            down, right = (
                _extent(start[here], side) for start, side in zip((row, column), sides, strict=True)
            )
            if (down, right) not in extents:
                extents[down, right] = count
                count += (sides[0] // down) * (sides[1] // right)
            coarse = row[here] // down * (sides[1] // right) + column[here] // right
            pooled[here] = extents[down, right] + coarse
            corner = (row[here] + down - 1) * sides[1] + column[here] + right - 1
            last[here] = index[corner].amax(1)
        self.sides, self.extents = sides, tuple(extents)
        self.in_order = torch.equal(pooled, places)
        for name, value in (("index", index), ("pooled", pooled), ("last", last)):
            self.register_buffer(
                name, value if device is None else value.to(device), persistent=False
            )

    def resized(self, condition: Condition, layout: Layout) -> "GridEmbedder":
        assert isinstance(condition, TokenGrid)
        other = _with_own_buffers(self)
        other._place(condition, layout, device=self.index.device)
        return other

    def forward(self, cond: Masked, embedded: Embedded) -> Embedded:
        h = self.tokens(cond).flatten(1, 2)[:, self.index]  # [C, P, cells, width]
        h = h.squeeze(2) if self.join is None else self.join(h.flatten(2))
        if not self.in_order:
            h = h.mT.unflatten(2, self.sides)  # [C, width, rows, columns]
            means = [F.avg_pool2d(h, extent).flatten(2) for extent in self.extents]
            h = torch.cat(means, dim=2).mT[:, self.pooled]
        return embedded._replace(tokens=h if embedded.tokens is None else embedded.tokens + h)

    def required_prefix(self) -> Int[Tensor, " N"]:
        return self.last + 1


def _extent(start: Int[Tensor, " n"], side: int) -> int:
    """How many places the tokens of a level cover, if they tile all `side` of them; otherwise 1."""
    starts = start.unique()
    extent = side // len(starts)
    return extent if torch.equal(starts, torch.arange(0, side, extent, device="cpu")) else 1


def _cells_under(size: int, place: Int[Tensor, " N"], name: str) -> Int[Tensor, "N cells"]:
    """The rows (or columns) of a grid under each image token."""
    num_tokens = int(place.max()) + 1
    if num_tokens % size and size % num_tokens:
        raise UsageError(
            f"{name} of a grid must be a divisor or a multiple of the image's in tokens "
            f"({num_tokens}), got {size}"
        )
    return (place * size // num_tokens)[:, None] + torch.arange(
        max(1, size // num_tokens), device=place.device
    )


# ---------------------------------------------------------------------------------------------
# Token sequences


@dataclass(frozen=True)
class TokenSequence(Condition):
    """A sequence that image tokens attend to, `[B, L]` indices or `[B, L, C]` numbers.

    Text embeddings, or one-dimensional visual tokens. A sequence may be shorter than `length`.

    Args:
        length: `L`, the largest number of tokens.
        codebook_size: number of indices, for discrete tokens; 0 for numbers.
        channels: `C`, for numbers; 0 for discrete tokens.
        ahead: None lets every image token attend to the whole sequence. A number lets a token in
            row `r` of `H` rows attend to the first `length (r + 1 + ahead) / H` tokens, rounded up,
            in training and in decoding, so that a group can be decoded before the sequence ends.
        everywhere: beside `ahead`, how many tokens at the beginning every image token attends to,
            such as a text before visual tokens. The rest is shared among the rows: row `r` attends
            to the first `k + (length - k) (r + 1 + ahead) / H` tokens.

    Raises:
        UsageError: if a size is out of range, or `everywhere` is given without `ahead`.
    """

    length: int
    codebook_size: int = 0
    channels: int = 0
    ahead: int | None = None
    everywhere: int = 0

    def __post_init__(self) -> None:
        _check_kind(self)
        length = whole_number(self.length, "length", maximum=MAX_TOKENS)
        object.__setattr__(self, "length", length)
        if self.ahead is not None:
            ahead = whole_number(self.ahead, "ahead", minimum=0, maximum=MAX_TOKENS)
            object.__setattr__(self, "ahead", ahead)
        everywhere = whole_number(self.everywhere, "everywhere", minimum=0, maximum=length)
        object.__setattr__(self, "everywhere", everywhere)
        if everywhere and self.ahead is None:
            raise UsageError(
                "everywhere must be 0 without ahead, where every image token attends to the whole "
                f"sequence, got {everywhere}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def validate(
        self,
        value: Any,
        batch: int,
        device: torch.device,
        *,
        name: str = "cond",
        check_values: bool = True,
    ) -> Masked:
        tokens = _tokens(self, value, device, name=name, check_values=check_values)
        length = tokens.shape[1] if tokens.ndim > 1 else 0
        if not 1 <= length <= self.length:
            expected = (batch, f"1 … {self.length}", *_trailing(self.channels))
            raise UsageError(f"{name} must have shape {expected}, got {tuple(tokens.shape)}")
        _present(tokens, (batch, length), channels=self.channels, name=name)
        padding = tokens.new_zeros(batch, self.length - length, *_trailing(self.channels))
        mask = torch.arange(self.length, device=device) < length
        return Masked(torch.cat([tokens, padding], dim=1), mask.expand(batch, -1))

    def validate_piece(self, piece: Any, batch: int, device: torch.device, *, name: str) -> Tensor:
        return _piece(self, piece, batch, device=device, name=name)

    def null(self, batch: int, device: torch.device) -> Masked:
        return _absent((batch, self.length), self.channels, device)

    def embedder(self, layout: Layout, *, width: int, modulation: int) -> Embedder:
        return SequenceEmbedder(self, layout, width)


class SequenceEmbedder(Embedder):
    """A sequence with learned positions, and the mask of what each image token attends to."""

    prefix: Tensor

    def __init__(self, sequence: TokenSequence, layout: Layout, width: int) -> None:
        super().__init__()
        length = sequence.length
        self.tokens = _TokenEmbedding(sequence.codebook_size, sequence.channels, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(length, width))
        self.register_buffer("prefix", self._prefix(sequence, layout), persistent=False)

    @staticmethod
    def _prefix(sequence: TokenSequence, layout: Layout) -> Int[Tensor, " N"]:
        length, row = sequence.length, layout.coords[:, 1].long()
        if sequence.ahead is None:
            return torch.full_like(row, length)
        rows, k = int(row.max()) + 1, sequence.everywhere
        by_row = -(-(length - k) * (row + 1 + sequence.ahead) // rows)
        return (k + by_row).clamp(max=length)

    def resized(self, condition: Condition, layout: Layout) -> "SequenceEmbedder":
        assert isinstance(condition, TokenSequence)
        prefix = self._prefix(condition, layout).to(self.prefix.device)
        other = _with_own_buffers(self)
        other.register_buffer("prefix", prefix, persistent=False)
        return other

    def forward(self, cond: Masked, embedded: Embedded) -> Embedded:
        sequence = self.tokens(cond) + self.pos_embed
        index = torch.arange(cond.mask.shape[1], device=cond.mask.device)
        visible = cond.mask[:, None] & (index < self.prefix[:, None])  # [C, N, L]
        mask = torch.zeros(visible.shape, device=visible.device)
        mask = mask.masked_fill(~visible, -torch.inf)
        if embedded.sequence is not None and embedded.cross_attn_mask is not None:
            sequence = torch.cat([embedded.sequence, sequence], dim=1)
            mask = torch.cat([embedded.cross_attn_mask, mask], dim=2)
        return embedded._replace(sequence=sequence, cross_attn_mask=mask)

    def required_prefix(self) -> Int[Tensor, " N"]:
        return self.prefix


# ---------------------------------------------------------------------------------------------
# Parts of the three


_E = TypeVar("_E", bound=Embedder)


def _with_own_buffers(embedder: _E) -> _E:
    """An embedder with the same weights, whose buffers can be replaced."""
    other = copy.copy(embedder)
    other._buffers = dict(embedder._buffers)
    return other


class _TokenEmbedding(nn.Module):
    """Indices or numbers to vectors; what is masked becomes the null vector."""

    def __init__(self, codebook_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.embed = (
            nn.Embedding(codebook_size, width) if codebook_size else nn.Linear(channels, width)
        )
        self.null = nn.Parameter(0.02 * torch.randn(width))
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, cond: Masked) -> Tensor:
        value, mask = cond
        if value.is_floating_point():
            value = value.to(self.embed.weight.dtype)
        return self.embed(value).where(mask[..., None], self.null)


def _check_kind(spec: "TokenGrid | TokenSequence") -> None:
    for name in ("codebook_size", "channels"):
        size = whole_number(getattr(spec, name), name, minimum=0, maximum=MAX_INDICES)
        object.__setattr__(spec, name, size)
    if (spec.codebook_size > 0) == (spec.channels > 0):
        raise UsageError(
            "either codebook_size or channels must be above 0, got "
            f"{spec.codebook_size} and {spec.channels}"
        )


def _trailing(channels: int) -> tuple[int, ...]:
    return (channels,) if channels else ()


def _as_tensor(value: Any, device: torch.device, name: str) -> Tensor:
    """What a user passes as numbers: a tensor, an array, or lists of numbers."""
    if _holds_boolean(value):
        raise UsageError(f"{name} must hold numbers, got booleans")
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"{name} must be a tensor, an array or numbers, got a {type(value).__name__}: "
            f"{reason(error)}"
        ) from error


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_boolean(item) for item in value)
    return isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool


def _tokens(
    spec: "TokenGrid | TokenSequence",
    value: Any,
    device: torch.device,
    *,
    name: str,
    check_values: bool = True,
) -> Tensor:
    value = _as_tensor(value, device, name)
    if spec.codebook_size:
        return _indices(value, spec.codebook_size, name, check_values=check_values)
    dense_tensor(value, name, FLOATS)
    if check_values and not value.isfinite().all():
        raise UsageError(f"{name} must be finite, got NaN or infinity")
    return value


def _indices(value: Tensor, size: int, name: str, *, check_values: bool = True) -> Tensor:
    value = dense_tensor(value, name, WHOLE).long()
    if check_values and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < size:
        raise UsageError(
            f"{name} must be in 0 … {size - 1}, got {int(value.min())} … {int(value.max())}"
        )
    return value


def _present(value: Tensor, shape: tuple[int, ...], *, channels: int = 0, name: str) -> Masked:
    expected = shape + _trailing(channels)
    if value.shape != expected:
        raise UsageError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    return Masked(value, torch.ones(shape, dtype=torch.bool, device=value.device))


def _absent(shape: tuple[int, ...], channels: int, device: torch.device) -> Masked:
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    value = torch.zeros(*shape, channels, device=device) if channels else mask.long()
    return Masked(value, mask)


def _piece(
    spec: TokenGrid | TokenSequence, piece: Any, batch: int, *, device: torch.device, name: str
) -> Tensor:
    value = _tokens(spec, piece, device, name=name)
    length = value.shape[1] if value.ndim > 1 else 0
    if not length or value.shape != (batch, length, *_trailing(spec.channels)):
        expected = ", ".join(map(str, (batch, "k", *_trailing(spec.channels))))
        raise UsageError(f"{name} must come in pieces ({expected}), got {tuple(value.shape)}")
    return value


# ---------------------------------------------------------------------------------------------
# All conditions of a decoder


@dataclass(frozen=True)
class Conditioning:
    """All that a decoder is conditioned on: nothing, one condition, or several by name.

    A single condition is passed as it is, several as a dictionary with any of the names.

    Args:
        names: of the conditions; a single one is called `cond`.
        parts: the conditions.

    Raises:
        UsageError: if they are something else, or names are missing or repeated.
    """

    names: tuple[str, ...] = ()
    parts: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(sequence(self.names, "names", "names"))
        parts = tuple(sequence(self.parts, "parts", "conditions"))
        for name in names:
            instance(name, str, "each of names", "text")
        for part in parts:
            instance(part, Condition, "condition", EXPECTED)
        if len(names) > MAX_CONDITIONS:
            raise UsageError(
                f"conditions must be at most {MAX_CONDITIONS} for one decoder, got {len(names)}"
            )
        if len(names) != len(parts) or len(set(names)) != len(names):
            raise UsageError(
                f"names must hold a name of its own for each of {len(parts)} conditions, got "
                f"{shown(names)}"
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "parts", parts)

    @classmethod
    def of(
        cls, condition: "Condition | Mapping[str, Condition] | Conditioning | None"
    ) -> "Conditioning":
        """From what a user passes to a constructor; labels of no class are no condition.

        Raises:
            UsageError: if it is something else.
        """
        if isinstance(condition, Conditioning):
            return condition
        if condition is None:
            return cls()
        named = condition if isinstance(condition, Mapping) else {"cond": condition}
        for part in named.values():
            instance(part, Condition, "condition", EXPECTED)
        kept = {name: part for name, part in named.items() if part != ClassLabels(0)}
        return cls(tuple(kept), tuple(kept.values()))

    @property
    def num_classes(self) -> int:
        """Classes of the first label condition, or 0."""
        return next((p.num_classes for p in self.parts if isinstance(p, ClassLabels)), 0)

    def label_of(self, name: str) -> str:
        """What error messages call a condition."""
        return f"cond[{name!r}]" if len(self.parts) > 1 else "cond"

    def resized(self, layout: Layout, other: Layout) -> "Conditioning":
        """The conditions of images of another size; see `Condition.resized`."""
        return replace(self, parts=tuple(part.resized(layout, other) for part in self.parts))

    def split(self, cond: Any) -> dict[str, Any]:
        """What was passed for each condition; only the names are checked.

        Raises:
            UsageError: if something was passed that is not a condition.
        """
        if cond is None:
            return {}
        if not self.parts:
            raise UsageError("cond must be None: this decoder was built without a condition")
        if isinstance(cond, Mapping):
            known_names(cond, self.names, "cond")
            return {name: value for name, value in cond.items() if value is not None}
        if len(self.parts) > 1:
            raise UsageError(
                f"cond must be a dictionary of {', '.join(self.names)}, got a {type(cond).__name__}"
            )
        return {self.names[0]: cond}

    def count(self, cond: Any) -> int | None:
        """The number of examples that a condition is passed for; None if it does not say.

        Raises:
            UsageError: if only an iterator is passed, or what cannot be a condition.
        """
        split = self.split(cond)
        for name, value in split.items():
            if isinstance(value, Iterator | str):
                continue
            if isinstance(value, list | tuple) and value and isinstance(value[0], str):
                return len(value)
            device = value.device if isinstance(value, Tensor) else torch.device("cpu")
            tensor = _as_tensor(value, device, self.label_of(name))
            if tensor.ndim > 0:
                return len(tensor)
        for name, value in split.items():
            if isinstance(value, Iterator):
                raise UsageError(
                    "num_images must be given with a condition that arrives piece by piece, got "
                    f"an iterator for {self.label_of(name)} and no num_images"
                )
        return None

    def validate(
        self, cond: Any, batch: int, device: torch.device, *, check_values: bool = True
    ) -> dict[str, Masked]:
        """Every condition as it was passed, or null; see `Condition.validate`.

        Raises:
            UsageError: if one of them has the wrong name, shape, type or range.
        """
        values = self.split(cond)
        return {
            name: part.validate(
                values[name], batch, device, name=self.label_of(name), check_values=check_values
            )
            if name in values
            else part.null(batch, device)
            for name, part in zip(self.names, self.parts, strict=True)
        }

    def null(self, batch: int, device: torch.device) -> dict[str, Masked]:
        """Every condition null."""
        return self.validate(None, batch, device)

    def drop(
        self,
        cond: dict[str, Masked],
        rate: float,
        generator: torch.Generator | None = None,
        *,
        shard: Shard = Shard(),
    ) -> dict[str, Masked]:
        """Drop all conditions of an example with probability `rate`; of several, each alone too.

        The examples are a part of a global batch, for which all is drawn.
        """
        if not cond:
            return cond
        batch = len(next(iter(cond.values())).mask) * shard.count
        each = len(cond) > 1
        draws = shard.rows(torch.rand(batch, 1 + len(cond) * each, generator=generator)) < rate
        result = {}
        for number, (name, (value, mask)) in enumerate(cond.items(), start=1):
            kept = ~(draws[:, 0] | draws[:, number * each]).to(mask.device, non_blocking=True)
            result[name] = Masked(value, mask & kept.view(-1, *[1] * (mask.ndim - 1)))
        return result


def concat(a: dict[str, Masked], b: dict[str, Masked]) -> dict[str, Masked]:
    """Two batches of the same conditions, concatenated."""
    return {
        name: Masked(*(torch.cat(pair) for pair in zip(a[name], b[name], strict=True)))
        for name in a
    }


class ConditionEmbedder(nn.Module):
    """The embedders of all conditions.

    Args:
        conditioning: the conditions.
        layout: of the image.
        width: channels of the network.
        modulation: channels of the modulation.

    Raises:
        UsageError: if a condition does not fit the layout.
    """

    def __init__(
        self, conditioning: Conditioning, layout: Layout, *, width: int, modulation: int
    ) -> None:
        super().__init__()
        self.names = conditioning.names
        # A list, because the name of a condition may hold what the name of a module may not.
        self.parts = nn.ModuleList(
            part.embedder(layout, width=width, modulation=modulation) for part in conditioning.parts
        )
        has_sequence = any(isinstance(part, SequenceEmbedder) for part in self.parts)
        # Always visible, so that no row of the cross-attention is masked out entirely.
        self.null_token = nn.Parameter(0.02 * torch.randn(width)) if has_sequence else None
        self.num_tokens = layout.num_tokens

    def forward(self, cond: dict[str, Masked]) -> Embedded:
        device = next((value.device for value, _ in cond.values()), None)
        embedded = Embedded(torch.zeros((), device=device))
        if self.null_token is not None:
            count = next(len(mask) for _, mask in cond.values())
            embedded = embedded._replace(
                sequence=self.null_token.expand(count, 1, -1),
                cross_attn_mask=torch.zeros(count, self.num_tokens, 1, device=device),
            )
        for part, masked in zip(self.parts, cond.values(), strict=True):
            embedded = part(masked, embedded)
        return embedded

    def resized(self, conditioning: Conditioning, layout: Layout) -> "ConditionEmbedder":
        """The same weights for images of another size."""
        other = copy.copy(self)
        parts = zip(self.parts, conditioning.parts, strict=True)
        other._modules = self._modules | {
            "parts": nn.ModuleList(
                part.resized(spec, layout) if isinstance(part, Embedder) else part
                for part, spec in parts
            )
        }
        other.num_tokens = layout.num_tokens
        return other

    def required_prefix(self) -> dict[str, Int[Tensor, " N"]]:
        """How much of each grid and sequence, in raster order, each image token depends on."""
        prefixes = {}
        for name, part in zip(self.names, self.parts, strict=True):
            if isinstance(part, Embedder) and (prefix := part.required_prefix()) is not None:
                prefixes[name] = prefix
        return prefixes


class StreamedConditions:
    """The conditions of one decoding, some of which are still arriving from iterators.

    An iterator yields pieces `[B, k]` or `[B, k, C]` of a grid or a sequence, in raster order, `k`
    tokens each. `advance` takes as many pieces as the next tokens depend on, and no more.

    Args:
        conditioning: the conditions.
        cond: what the user passed.
        batch: number of examples.
        device: where the values go.

    Attributes:
        values: every condition, with a mask of what has arrived.
        null: every condition null.

    Raises:
        UsageError: at once for a complete condition; from `advance` for a piece of the wrong shape,
            type or range, and for an iterator that ends too early.
    """

    def __init__(
        self, conditioning: Conditioning, cond: Any, *, batch: int, device: torch.device
    ) -> None:
        split = conditioning.split(cond)
        self._iterators = {n: value for n, value in split.items() if isinstance(value, Iterator)}
        complete = {name: v for name, v in split.items() if name not in self._iterators}
        self._parts = dict(zip(conditioning.names, conditioning.parts, strict=True))
        self._label_of = conditioning.label_of
        for name in self._iterators:
            if not isinstance(self._parts[name], TokenGrid | TokenSequence):
                self._parts[name].validate_piece(None, batch, device, name=self._label_of(name))
        self.null = conditioning.null(batch, device)
        self.values = conditioning.validate(complete or None, batch, device)
        self._arrived = dict.fromkeys(self._iterators, 0)
        self._batch = batch

    @property
    def pending(self) -> bool:
        """Whether any condition is an iterator."""
        return bool(self._iterators)

    def advance(self, required: dict[str, int]) -> bool:
        """Take pieces until `required` tokens of each condition have arrived.

        Returns:
            Whether anything new has arrived.
        """
        changed = False
        for name in self._iterators:
            while self._arrived[name] < required[name] and self._next(name, required[name]):
                changed = True
        return changed

    def _next(self, name: str, required: int) -> bool:
        part, label, arrived = self._parts[name], self._label_of(name), self._arrived[name]
        # The user's code runs here: its tensors may be kept, and trained on later.
        with torch.inference_mode(False), torch.no_grad():
            piece = next(self._iterators[name], None)
        if piece is None:
            # A sequence that every image token sees entirely may be shorter than its length.
            if isinstance(part, TokenSequence) and part.ahead is None and arrived:
                self._arrived[name] = part.length
                return False
            raise UsageError(f"{label} must go on to {required} tokens, got an end after {arrived}")
        value, mask = self.values[name]
        tokens = part.validate_piece(piece, self._batch, value.device, name=label)
        total, stop = mask[0].numel(), arrived + tokens.shape[1]
        if stop > total:
            raise UsageError(f"{label} must have at most {total} tokens, got {stop}")
        if tokens.is_floating_point() and tokens.dtype != value.dtype:
            value = value.to(tokens.dtype)
            self.values[name] = Masked(value, mask)
        value.flatten(1, mask.ndim - 1)[:, arrived:stop] = tokens
        mask.flatten(1)[:, arrived:stop] = True
        self._arrived[name] = stop
        return True
