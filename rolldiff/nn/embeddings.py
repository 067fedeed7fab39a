"""What a network is shown of its conditions.

Labels become a part of the modulation, grids a vector for each image token that lies on them,
sequences keys and values to attend to. Null has an embedding of its own in each.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.conditioning import Conditions
from rolldiff.conditions import ClassLabels, Given, LowResolution, TokenGrid, TokenSequence
from rolldiff.layout import Layout

__all__ = ["Embedded", "Embeddings"]


class Embedded(NamedTuple):
    """Conditions as the network sees them, image tokens in raster order.

    Attributes:
        modulation: what labels add to it; 0 without labels.
        tokens: what grids add to each image token; None without grids.
        sequence: all sequences, one behind the other, behind a token that is always there; None
            without sequences.
        hidden: where an image token may not look: 0 or minus infinity.
    """

    modulation: Float[Tensor, "C mods"] | Float[Tensor, ""]
    tokens: Float[Tensor, "C N width"] | None
    sequence: Float[Tensor, "C L width"] | None
    hidden: Float[Tensor, "C N L"] | None


class Embeddings(nn.Module):
    """Embeds conditions.

    Args:
        conditions: what there is.
        layout: of the image tokens.
        width: channels of the network.
        modulation: numbers of the modulation.

    Raises:
        ValueError: if a grid does not fit the image tokens.
    """

    def __init__(
        self, conditions: Conditions, *, layout: Layout, width: int, modulation: int
    ) -> None:
        super().__init__()
        self.conditions = conditions
        parts: dict[str, nn.Module] = {}
        for name, part in zip(conditions.names, conditions.parts, strict=True):
            if isinstance(part, ClassLabels):
                parts[name] = _Labels(part, modulation)
            elif isinstance(part, TokenGrid | LowResolution):
                parts[name] = _Cells(part, layout, width)
            elif isinstance(part, TokenSequence):
                parts[name] = _Sequence(part, layout, width)
            else:
                raise ValueError(f"condition must be one of rolldiff's, got {type(part).__name__}")
        # A name may hold what a module's may not, such as a dot.
        self.parts = nn.ModuleList(parts.values())
        sequences = any(isinstance(part, _Sequence) for part in self.parts)
        self.start = nn.Parameter(0.02 * torch.randn(width)) if sequences else None

    def forward(self, given: dict[str, Given]) -> Embedded:
        modulation = torch.zeros((), device=self._device(given))
        tokens: Tensor | None = None
        sequence, hidden = [], []
        for part, (value, there) in zip(self.parts, given.values(), strict=True):
            found = part(value, there)
            if isinstance(part, _Labels):
                modulation = modulation + found
            elif isinstance(part, _Cells):
                tokens = found if tokens is None else tokens + found
            elif isinstance(part, _Sequence):
                sequence.append(found)
                hidden.append(part.hidden(there))
        if not isinstance(self.start, Tensor):
            return Embedded(modulation, tokens, None, None)
        count, num_tokens = hidden[0].shape[:2]
        start = self.start.expand(count, 1, -1)
        seen = hidden[0].new_zeros(count, num_tokens, 1)
        return Embedded(
            modulation,
            tokens,
            torch.cat([start, *sequence], dim=1),
            torch.cat([seen, *hidden], dim=2),
        )

    def needs(self) -> dict[str, Int[Tensor, " N"]]:
        """How much of each grid and sequence, in raster order, each image token looks at."""
        return {
            name: part.needs
            for name, part in zip(self.conditions.names, self.parts, strict=True)
            if isinstance(part, _Cells | _Sequence)
        }

    def _device(self, given: dict[str, Given]) -> torch.device | None:
        return next((value.device for value, _ in given.values()), None)


class _Labels(nn.Module):
    """A vector for each label, one more for null."""

    def __init__(self, condition: ClassLabels, modulation: int) -> None:
        super().__init__()
        self.table = nn.Embedding(condition.num_classes + 1, modulation)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, value: Tensor, there: Tensor) -> Tensor:
        return self.table(value.where(there, self.table.num_embeddings - 1))


class _Tokens(nn.Module):
    """Indices or numbers to vectors; what is not there becomes the null vector."""

    def __init__(self, codes: int, channels: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes, width) if codes else nn.Linear(channels, width)
        self.null = nn.Parameter(0.02 * torch.randn(width))
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, value: Tensor, there: Tensor) -> Tensor:
        if value.is_floating_point():
            value = value.to(self.embed.weight.dtype)
        return self.embed(value).where(there[..., None], self.null)


class _Cells(nn.Module):
    """For each image token, the cells that it lies on."""

    index: Tensor

    def __init__(self, grid: TokenGrid | LowResolution, layout: Layout, width: int) -> None:
        super().__init__()
        codes = grid.codes if isinstance(grid, TokenGrid) else 0
        row, column = layout.coords[:, 1].long(), layout.coords[:, 2].long()
        rows = _cells(grid.height, row, "height")
        columns = _cells(grid.width, column, "width")
        # [N, cells a token]: every cell of its rows and columns.
        index = (rows[:, :, None] * grid.width + columns[:, None, :]).flatten(1)
        self.register_buffer("index", index, persistent=False)
        self.tokens = _Tokens(codes, grid.channels, width)
        self.join = nn.Linear(index.shape[1] * width, width) if index.shape[1] > 1 else None

    @property
    def needs(self) -> Int[Tensor, " N"]:
        return self.index.amax(1) + 1

    def forward(self, value: Tensor, there: Tensor) -> Tensor:
        h = self.tokens(value, there).flatten(1, 2)[:, self.index]
        return h.squeeze(2) if self.join is None else self.join(h.flatten(2))


class _Sequence(nn.Module):
    """A sequence with its places."""

    reach: Tensor

    def __init__(self, sequence: TokenSequence, layout: Layout, width: int) -> None:
        super().__init__()
        length = sequence.length
        self.tokens = _Tokens(sequence.codes, sequence.channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        row = layout.coords[:, 1].long()
        reach = torch.full_like(row, length)
        if sequence.ahead is not None:
            rows = int(row.max()) + 1
            reach = (-(-length * (row + 1 + sequence.ahead) // rows)).clamp(max=length)
        self.register_buffer("reach", reach, persistent=False)

    @property
    def needs(self) -> Int[Tensor, " N"]:
        return self.reach

    def forward(self, value: Tensor, there: Tensor) -> Tensor:
        return self.tokens(value, there) + self.place

    def hidden(self, there: Tensor) -> Float[Tensor, "C N L"]:
        """Minus infinity where a token is not there, or too far ahead for an image token."""
        number = torch.arange(there.shape[1], device=there.device)
        seen = there[:, None] & (number < self.reach[:, None])
        return torch.zeros(seen.shape, device=there.device).masked_fill(~seen, -torch.inf)


def _cells(size: int, place: Tensor, name: str) -> Int[Tensor, "N cells"]:
    """The rows (or columns) of a grid that each image token lies on."""
    tokens = int(place.max()) + 1
    if tokens % size and size % tokens:
        raise ValueError(
            f"{name} of a grid must divide the image's in tokens or be a multiple of it "
            f"({tokens}), got {size}"
        )
    each = max(1, size // tokens)
    return (place * size // tokens)[:, None] + torch.arange(each)
