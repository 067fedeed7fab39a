"""All that a decoder is conditioned on: no condition, one, or several by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rolldiff.conditions import ClassLabels, Condition, Given

__all__ = ["Conditions", "joined"]


@dataclass(frozen=True)
class Conditions:
    """No condition, one, or several by name.

    One condition is given as it is, several as a dictionary with any of the names.

    Args:
        names: of the conditions; a single one is called `cond`.
        parts: the conditions.
    """

    names: tuple[str, ...] = ()
    parts: tuple[Condition, ...] = ()

    @classmethod
    def of(
        cls, condition: "Condition | Mapping[str, Condition] | Conditions | None"
    ) -> "Conditions":
        """The conditions that a user asked for; labels of no class are none."""
        if isinstance(condition, Conditions):
            return condition
        if condition is None:
            return cls()
        named = condition if isinstance(condition, Mapping) else {"cond": condition}
        kept = {name: part for name, part in named.items() if part != ClassLabels(0)}
        return cls(tuple(kept), tuple(kept.values()))

    @property
    def num_classes(self) -> int:
        """Classes of the labels among them, or 0."""
        return sum(part.num_classes for part in self.parts if isinstance(part, ClassLabels))

    def split(self, cond: Any) -> dict[str, Any]:
        """What was given for each condition; nothing is checked but the names.

        Raises:
            ValueError: if something was given that there is no condition for.
        """
        if cond is None:
            return {}
        if not self.parts:
            raise ValueError("cond must be None: this decoder was built without a condition")
        if isinstance(cond, Mapping):
            if unknown := [name for name in cond if name not in self.names]:
                raise ValueError(f"cond must be among {', '.join(self.names)}, got {unknown}")
            return {name: value for name, value in cond.items() if value is not None}
        if len(self.parts) > 1:
            raise ValueError(f"cond must be a dictionary of {', '.join(self.names)}, got {cond}")
        return {self.names[0]: cond}

    def count(self, cond: Any) -> int | None:
        """The examples that a condition is given for; None if it does not tell."""
        for name, value in self.split(cond).items():
            part = self.parts[self.names.index(name)]
            ndim = value.ndim if isinstance(value, Tensor) else torch.as_tensor(value).ndim
            if ndim > 0 or part.shape:
                return len(value)
        return None

    def check(self, cond: Any, batch: int, device: torch.device) -> dict[str, Given]:
        """What was given, for each condition; null for those that were not."""
        given = self.split(cond)
        found = {}
        for name, part in zip(self.names, self.parts, strict=True):
            called = f"cond[{name!r}]" if len(self.parts) > 1 else "cond"
            found[name] = (
                part.check(given[name], batch, device, name=called)
                if name in given
                else part.null(batch, device)
            )
        return found

    def null(self, batch: int, device: torch.device) -> dict[str, Given]:
        """All null."""
        return self.check(None, batch, device)

    def drop(
        self, given: dict[str, Given], rate: float, generator: torch.Generator | None = None
    ) -> dict[str, Given]:
        """Drop all conditions of an example with probability `rate`; of several, each alone too."""
        if not given:
            return given
        batch = len(next(iter(given.values())).there)
        alone = len(given) > 1
        draws = torch.rand(batch, 1 + len(given) * alone, generator=generator) < rate
        found = {}
        for number, (name, (value, there)) in enumerate(given.items(), start=1):
            dropped = draws[:, 0] | draws[:, number * alone]
            kept = ~dropped.to(there.device).view(-1, *[1] * (there.ndim - 1))
            found[name] = Given(value, there & kept)
        return found


def joined(a: dict[str, Given], b: dict[str, Given]) -> dict[str, Given]:
    """Two batches of conditions, one behind the other."""
    return {
        name: Given(*(torch.cat(pair) for pair in zip(a[name], b[name], strict=True))) for name in a
    }
