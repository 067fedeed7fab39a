"""What training draws, and so what a checkpoint was trained for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.grouping import Grouping, Order, decode_order
from rolldiff.noise import NoiseSchedule
from rolldiff.times import CleanContext, Independent, Mixture, OnSchedule, Shared, Times

__all__ = ["Drawn", "Shown", "Training"]

MIXTURE = Mixture((Independent(), CleanContext(), Shared(), OnSchedule()), (0.3, 0.4, 0.2, 0.1))


class Drawn(NamedTuple):
    """The settings of a batch: rows of the tables of `Training.tables`, and a time per group."""

    order: Int[Tensor, " B"]
    num_groups: Int[Tensor, " B"]
    t: Float[Tensor, "B G"]


class Shown(NamedTuple):
    """A batch as the network sees it, its tokens in decode order."""

    order: Int[Tensor, "B N"]
    group: Int[Tensor, "B N"]
    t: Float[Tensor, "B N"]
    x: Float[Tensor, "B N D"]
    eps: Float[Tensor, "B N D"]
    x_t: Float[Tensor, "B N D"]


@dataclass(frozen=True)
class Training:
    """The settings that one set of weights is trained for. Each example draws its own.

    Args:
        num_groups: the group counts to draw from, evenly.
        orders: the decode orders to draw from, evenly.
        times: the law of the local times.
        drop_cond: how often the condition is dropped, for guidance; in [0, 1].

    Raises:
        ValueError: if a set is empty or a number is out of range.
    """

    num_groups: Sequence[int] = (1,)
    orders: Sequence[Order] = ("top_to_bottom",)
    times: Times = MIXTURE
    drop_cond: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_groups", tuple(self.num_groups))
        orders = (o if isinstance(o, str) else tuple(o) for o in self.orders)
        object.__setattr__(self, "orders", tuple(orders))
        if not self.num_groups or min(self.num_groups) < 1:
            raise ValueError(f"num_groups must hold numbers of 1 or more, got {self.num_groups}")
        if not self.orders:
            raise ValueError("orders must hold an order at least, got none")
        if not 0 <= self.drop_cond <= 1:
            raise ValueError(f"drop_cond must be in [0, 1], got {self.drop_cond}")

    def tables(
        self, coords: Float[Tensor, "N 3"]
    ) -> tuple[Int[Tensor, "orders N"], Int[Tensor, "counts N"]]:
        """Every decode order, and for every group count the group of each token in decode order.

        Raises:
            ValueError: if an order or a group count does not fit the tokens.
        """
        orders = [decode_order(order, coords) for order in self.orders]
        groups = [Grouping(len(coords), num_groups).group for num_groups in self.num_groups]
        return torch.stack(orders), torch.stack(groups)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Drawn:
        """Draw the settings of `batch` examples, on the CPU."""
        which = torch.randint(len(self.num_groups), (batch,), generator=generator)
        order = torch.randint(len(self.orders), (batch,), generator=generator)
        num_groups = torch.tensor(self.num_groups)[which]
        return Drawn(order, which, self.times(num_groups, max(self.num_groups), generator))

    def show(
        self,
        x: Float[Tensor, "B N D"],
        orders: Int[Tensor, "orders N"],
        groups: Int[Tensor, "counts N"],
        noise: NoiseSchedule,
        generator: torch.Generator | None = None,
    ) -> Shown:
        """Tokens in raster order, each example in a drawn order and at drawn times.

        `orders` and `groups` are the tables, on the device of the tokens.
        """
        drawn = self.draw(len(x), generator)
        order = orders[drawn.order.to(x.device)]
        group = groups[drawn.num_groups.to(x.device)]
        t = drawn.t.to(x).gather(1, group)
        x = x.gather(1, order[..., None].expand_as(x))
        if generator is not None and x.device.type != "cpu":  # drawn there, not carried there
            number = int(torch.randint(2**62, (1,), generator=generator))
            generator = torch.Generator(x.device).manual_seed(number)
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return Shown(order, group, t, x, eps, noise.perturb(x, eps, t))

    def beyond(self, num_groups: int, overlap: float, order: Order) -> list[str]:
        """The settings of a decode that training never showed, in words."""
        words = []
        if num_groups not in self.num_groups:
            words.append(f"num_groups {num_groups} (trained: {_list(self.num_groups)})")
        order = order if isinstance(order, str) else tuple(order)
        if num_groups > 1 and order not in self.orders:
            words.append(f"order {order} (trained: {_list(self.orders)})")
        least, most = self.times.overlaps
        if num_groups > 1 and not least <= overlap <= most:
            words.append(f"overlap {overlap:g} (trained: {least:g} to {most:g})")
        return words


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
