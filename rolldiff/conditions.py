"""What a decoder is conditioned on: labels, grids or sequences of tokens, small images.

A condition checks what a user gives and turns it into `Given`: a value, and where it is there. What
is not there, because nobody gave it, because training dropped it for the sake of guidance, or
because it has not arrived yet, is shown to the network as null. Checked values keep their gradient:
an encoder trains through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = [
    "ClassLabels",
    "Condition",
    "Given",
    "LowResolution",
    "TokenGrid",
    "TokenSequence",
    "piece_of",
]


class Given(NamedTuple):
    """A checked condition.

    Attributes:
        value: `[B, *S]` indices or `[B, *S, C]` numbers; `S` is the shape of the condition.
        there: `[B, *S]`, False where the value is to be taken for null.
    """

    value: Tensor
    there: Bool[Tensor, "B *S"]


@runtime_checkable
class Condition(Protocol):
    """What every condition offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`S`: (), (height, width) or (length,)."""
        ...

    def check(self, cond: Any, batch: int, device: torch.device, *, name: str) -> Given:
        """What a user gave, for `batch` examples.

        Raises:
            ValueError: if its shape, type or range is wrong.
        """
        ...

    def null(self, batch: int, device: torch.device) -> Given:
        """The condition that says nothing."""
        ...


@dataclass(frozen=True)
class ClassLabels:
    """Labels in 0 … `num_classes - 1`, `[B]`, or one number for all."""

    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes}")

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def check(
        self,
        cond: Tensor | Sequence[int] | int | None,
        batch: int,
        device: torch.device,
        *,
        name: str = "cond",
    ) -> Given:
        value = _indices(torch.as_tensor(cond, device=device), self.num_classes, name)
        if value.ndim == 0:
            value = value.expand(batch)
        return _given(value, (batch,), (), name)

    def null(self, batch: int, device: torch.device) -> Given:
        return _null((batch,), None, device)


@dataclass(frozen=True)
class TokenGrid:
    """A grid of visual tokens or latents that lies on the image, `[B, h, w]` or `[B, h, w, C]`.

    An image token reads the cells that it lies on, and no other: so a group needs no more than the
    cells down to its own lowest row, and can be decoded before the others are known.

    Args:
        height: `h`, of which the image's height in tokens is a multiple, or a divisor.
        width: `w`, likewise.
        codes: the size of the codebook, for indices; 0 for latents.
        channels: `C`, for latents; 0 for indices.
    """

    height: int
    width: int
    codes: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        _check_kind(self.codes, self.channels)
        if min(self.height, self.width) < 1:
            raise ValueError(f"height and width must be 1 or more, got {self.height, self.width}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width)

    def check(self, cond: Any, batch: int, device: torch.device, *, name: str = "cond") -> Given:
        value = _tokens(torch.as_tensor(cond, device=device), self.codes, name)
        return _given(value, (batch, *self.shape), _ends(self.channels), name)

    def null(self, batch: int, device: torch.device) -> Given:
        return _null((batch, *self.shape), self.channels or None, device)


@dataclass(frozen=True)
class LowResolution:
    """A small version of the image, `[B, C, h, w]` in [-1, 1], that lies on it like a grid.

    Args:
        height: `h`, see `TokenGrid`.
        width: `w`.
        channels: `C`.
    """

    height: int
    width: int
    channels: int = 3

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width)

    def check(self, cond: Any, batch: int, device: torch.device, *, name: str = "cond") -> Given:
        value = _tokens(torch.as_tensor(cond, device=device), 0, name)
        if value.ndim != 4 or value.shape[1] != self.channels:
            wanted = (batch, self.channels, *self.shape)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        if value.numel() and value.detach().abs().amax() > 1 + 1e-3:
            raise ValueError(
                f"{name} must be in [-1, 1], got up to {float(value.detach().abs().amax()):.4g}"
            )
        value = value.movedim(1, -1)
        return _given(value, (batch, *self.shape), (self.channels,), name)

    def null(self, batch: int, device: torch.device) -> Given:
        return _null((batch, *self.shape), self.channels, device)


@dataclass(frozen=True)
class TokenSequence:
    """A sequence that image tokens attend to, `[B, L]` indices or `[B, L, C]` numbers.

    Text embeddings, or one-dimensional visual tokens. A sequence may be shorter than `length`.

    Args:
        length: the most tokens, `L`.
        codes: the size of the codebook, for indices; 0 for numbers.
        channels: `C`, for numbers; 0 for indices.
        ahead: None lets every image token see the whole sequence. A number lets a token in row `r`
            of `H` rows see the first `length (r + 1 + ahead) / H` of it, rounded up, in training
            and in decoding, so that a group can be decoded before the sequence has ended.
    """

    length: int
    codes: int = 0
    channels: int = 0
    ahead: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.codes, self.channels)
        if self.length < 1 or (self.ahead is not None and self.ahead < 0):
            raise ValueError(
                f"length must be 1 or more and ahead 0 or more, got {self.length} and {self.ahead}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def check(self, cond: Any, batch: int, device: torch.device, *, name: str = "cond") -> Given:
        value = _tokens(torch.as_tensor(cond, device=device), self.codes, name)
        ends = _ends(self.channels)
        found = value.shape[1] if value.ndim > 1 else 0
        if not 1 <= found <= self.length:
            wanted = (batch, f"1 … {self.length}", *ends)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        given = _given(value, (batch, found), ends, name)
        missing = self.length - found
        padding = value.new_zeros(batch, missing, *ends)
        there = torch.arange(self.length, device=device) < found
        return Given(torch.cat([given.value, padding], dim=1), there.expand(batch, -1))

    def null(self, batch: int, device: torch.device) -> Given:
        return _null((batch, self.length), self.channels or None, device)


def piece_of(
    part: TokenGrid | TokenSequence, piece: Any, batch: int, device: torch.device, *, name: str
) -> Tensor:
    """Some tokens of a grid or a sequence, `[B, k]` or `[B, k, C]`.

    Raises:
        ValueError: if their shape, type or range is wrong.
    """
    value = _tokens(torch.as_tensor(piece, device=device), part.codes, name)
    found = value.shape[1] if value.ndim > 1 else 0
    if not found or value.shape != (batch, found, *_ends(part.channels)):
        wanted = ", ".join(map(str, (batch, "k", *_ends(part.channels))))
        raise ValueError(f"{name} must come in pieces ({wanted}), got {tuple(value.shape)}")
    return value


def _check_kind(codes: int, channels: int) -> None:
    if (codes > 0) == (channels > 0) or min(codes, channels) < 0:
        raise ValueError(f"either codes or channels must be above 0, got {codes} and {channels}")


def _ends(channels: int) -> tuple[int, ...]:
    return (channels,) if channels else ()


def _tokens(value: Tensor, codes: int, name: str) -> Tensor:
    if codes:
        return _indices(value, codes, name)
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    return value


def _indices(value: Tensor, codes: int, name: str) -> Tensor:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must hold whole numbers, got {value.dtype}")
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < codes:
        raise ValueError(
            f"{name} must be in 0 … {codes - 1}, got {int(value.min())} … {int(value.max())}"
        )
    return value.long()


def _given(value: Tensor, shape: tuple[int, ...], ends: tuple[int, ...], name: str) -> Given:
    if value.shape != shape + ends:
        raise ValueError(f"{name} must have shape {shape + ends}, got {tuple(value.shape)}")
    return Given(value, torch.ones(shape, dtype=torch.bool, device=value.device))


def _null(shape: tuple[int, ...], channels: int | None, device: torch.device) -> Given:
    there = torch.zeros(shape, dtype=torch.bool, device=device)
    value = there.long() if channels is None else torch.zeros(*shape, channels, device=device)
    return Given(value, there)
