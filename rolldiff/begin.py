"""The start of a decode: settings checked, everything prepared that stays the same."""

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rolldiff.arrivals import Arrivals
from rolldiff.conditioning import joined
from rolldiff.cost import Meter
from rolldiff.decoding import Decoding, Model
from rolldiff.denoiser import Denoiser, Guidance, Guided
from rolldiff.grouping import Grouping, Order, decode_order
from rolldiff.schedule import RollingSchedule
from rolldiff.step import Step
from rolldiff.streams import Streams

__all__ = ["Known", "begin"]


def _computes_in(model: Model, dtype: torch.dtype | None) -> torch.dtype:
    """The type that the network computes in."""
    if dtype is None:
        mixed = model.device.type == "cuda" and model.dtype == torch.float32
        return torch.bfloat16 if mixed else model.dtype
    allowed = {model.dtype}
    if model.dtype == torch.float32:
        allowed |= {torch.bfloat16, torch.float16}
    if dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise ValueError(f"dtype must be {names} with {model.dtype} weights, got {dtype}")
    return dtype


class Known(NamedTuple):
    """Tokens that need no decoding, in raster order.

    Attributes:
        tokens: `[B, N, D]`; only those that are known are looked at.
        where: which ones they are.
    """

    tokens: Float[Tensor, "B N D"]
    where: Bool[Tensor, " N"]


@torch.no_grad()
def begin(
    model: Model,
    cond: Any,
    num_images: int | None,
    num_groups: int,
    overlap: float,
    steps: int,
    order: Order,
    step: Step,
    guidance: float | Guidance,
    seed: int | torch.Generator | None,
    first: int,
    cache: bool,
    dtype: torch.dtype | None,
    known: Known | None = None,
) -> Decoding:
    """Check the settings of a decode and prepare it.

    Tokens that are known are a group before the others, which has arrived from the start.

    Raises:
        ValueError: if one of them is out of range; see `Decoder.decode` for what they mean.
    """
    meter = Meter(model.device)
    computes_in = _computes_in(model, dtype)
    num_tokens, num_known = model.layout.num_tokens, 0 if known is None else int(known.where.sum())
    group = Grouping(num_tokens - num_known, num_groups).group
    schedule = RollingSchedule(num_groups, overlap)
    schedule.stagger(steps)
    for words in model.trained_for.beyond(num_groups, overlap, order):
        warnings.warn(
            f"decoding beyond what this checkpoint was trained for: {words}", stacklevel=4
        )
    if num_images is None:
        num_images = model.condition.count(cond) or 1
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images must be a whole number of 1 or more, got {num_images!r}")
    if isinstance(guidance, int | float):
        guidance = Guidance(float(guidance))
    if not isinstance(guidance, Guidance):
        raise ValueError(f"guidance must be a finite number or a Guidance, got {guidance!r}")
    arrivals = Arrivals(model.condition, cond, num_images, model.device)
    given = arrivals.given
    denoiser = Denoiser(model.backbone, model.noise, model.prediction, meter)
    if guidance.scale != 0:
        if cond is None:
            raise ValueError(
                f"guidance needs a condition, got guidance {guidance.scale} without cond"
            )
        given = joined(given, arrivals.null)
        denoiser = Guided(model.backbone, model.noise, model.prediction, meter, guidance)
    permutation = decode_order(order, model.layout.coords).to(model.device)
    streams = Streams(seed, num_images, first=first)
    # A pixel starts from the same noise whatever the order.
    x_1 = streams.normal(num_tokens, model.layout.token_dim).to(model.device, model.state_dtype)
    if known is not None:
        permutation = _known_first(model, permutation, known.where)
        group = torch.cat([torch.zeros(num_known, dtype=group.dtype), group + (num_known > 0)])
        x_1[:, known.where] = known.tokens[:, known.where].to(x_1)
    context = model.backbone.prepare(
        permutation,
        group.to(model.device),
        given,
        batch=(2 if guidance.scale else 1) * num_images if cache else None,
        dtype=computes_in,
    )
    return Decoding(
        denoiser,
        model.layout,
        context,
        permutation,
        schedule,
        steps,
        step,
        streams,
        arrivals,
        _needs(model, permutation) if arrivals.awaited else {},
        x_1[:, permutation],
        num_known,
        None if computes_in == model.dtype else computes_in,
    )


def _known_first(model: Model, order: Tensor, known: Tensor) -> Tensor:
    """The known tokens, then the others in their order."""
    found = torch.cat([order[known[order]], order[~known[order]]])
    orders = model.trained_for.orders
    random = any(str(name).startswith("random") for name in orders)
    trained = [decode_order(name, model.layout.coords) for name in orders]
    if not random and not any(torch.equal(found.cpu(), other) for other in trained):
        warnings.warn(
            "decoding beyond what this checkpoint was trained for: what is known comes first, and "
            "no random order was among those trained",
            stacklevel=4,
        )
    return found


def _needs(model: Model, order: Tensor) -> dict[str, list[int]]:
    """How much of each condition the first `n` tokens of the decode look at, for every `n`."""
    needs = model.backbone.needs().items()
    return {name: need[order].cummax(0).values.tolist() for name, need in needs}
