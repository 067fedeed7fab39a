"""Editing: from an image to its noise, and masks of what to decode again.

decoder.decode(cond, image=image, mask=row_mask(image, 8, 16))        # regenerate rows 8 … 15

noise = invert(decoder, image, cond, num_groups=4)                    # DDIM inversion
fresh = torch.randn_like(noise)
mask = group_mask(decoder, [2], num_groups=4)
decoder.decode(cond, num_groups=4, noise=torch.where(mask, fresh, noise))   # a variation
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rolldiff.decoder import DecodeConfig, Decoder, check_image, configured
from rolldiff.diffusion.layout import highest
from rolldiff.diffusion.sampler import Euler
from rolldiff.diffusion.schedule import MAX_STEPS, decode_order
from rolldiff.errors import UsageError, dense_tensor, instance, whole_number, whole_numbers

__all__ = ["group_mask", "invert", "row_mask"]


def row_mask(image: Float[Tensor, "B C H W"], start: int, stop: int) -> Bool[Tensor, "H W"]:
    """True in the pixel rows `start … stop - 1` of an image, for `decode(image=, mask=)`.

    Raises:
        UsageError: if there are no such rows.
    """
    if dense_tensor(image, "image").ndim != 4:
        raise UsageError(f"image must have shape (B, C, H, W), got {tuple(image.shape)}")
    height, width = image.shape[2:]
    start = whole_number(start, "start", minimum=0)
    stop = whole_number(stop, "stop", minimum=0)
    if not start < stop <= height:
        raise UsageError(f"rows must be start … stop within 0 … {height}, got {start} … {stop}")
    mask = torch.zeros(height, width, dtype=torch.bool, device=image.device)
    mask[start:stop] = True
    return mask


def group_mask(
    decoder: Decoder,
    groups: Sequence[int],
    config: DecodeConfig | None = None,
    **overrides: Any,
) -> Bool[Tensor, "H W"]:
    """True in the pixels that depend on some groups.

    Args:
        decoder: the decoder.
        groups: indices of the groups, from 0.
        config: the settings of the decoding.
        **overrides: fields of `DecodeConfig`, such as `num_groups=4`.

    Raises:
        UsageError: if there is no such group.
    """
    instance(decoder, Decoder, "decoder", "a Decoder")
    config = configured(config, overrides)
    chosen = whole_numbers(groups, "groups", minimum=0)
    if any(group >= config.num_groups for group in chosen):
        raise UsageError(f"groups must be in 0 … {config.num_groups - 1}, got {list(chosen)}")
    layout = decoder.layout
    schedule = config.schedule(layout)
    moved = torch.isin(schedule.group, torch.tensor(chosen, dtype=torch.long, device="cpu"))
    raster = moved[decode_order(config.order, layout.coords).argsort()]
    return highest(layout, raster.long()).bool().to(decoder.device)


@torch.no_grad()
def invert(
    decoder: Decoder,
    image: Float[Tensor, "B C H W"],
    cond: Any = None,
    *,
    config: DecodeConfig | None = None,
    iterations: int = 8,
    **overrides: Any,
) -> Float[Tensor, "B C H W"]:
    """The noise from which `decode(cond, config, noise=…)` gives this image: DDIM inversion.

    Group by group, each given the finished groups before it, the Euler steps are reversed. The
    point from which a step leads to `x_s` is found by the fixed-point iteration
    `x_t <- x_t + x_s - step(x_t)`, which is at rest where `step(x_t) = x_s`.

    Args:
        decoder: the decoder.
        image: values about [-1, 1].
        cond: the condition, see `Decoder.decode`.
        config: the settings of the decoding, with overlap 0 and the solver `Euler()`.
        iterations: network calls per step, at most 10,000; more are more exact.
        **overrides: fields of `DecodeConfig`, such as `num_groups=4`.

    Raises:
        UsageError: if the image has the wrong shape, or a setting is out of range.
    """
    instance(decoder, Decoder, "decoder", "a Decoder")
    config = configured(config, overrides, others=("iterations",))
    if config.overlap != 0 or config.solver != Euler():
        raise UsageError(
            "config must have overlap 0 and the solver Euler() to be inverted, got overlap "
            f"{config.overlap} and {config.solver}"
        )
    iterations = whole_number(iterations, "iterations", maximum=MAX_STEPS)
    image = check_image(image, decoder.layout, unbounded=True)
    image = image.to(decoder.device, decoder.state_dtype)
    run = decoder.prepare(cond, config, num_images=len(image), seed=0)
    schedule, grid = run.schedule, run.denoiser.grid
    x_t = decoder.layout.tokens(image)[:, run.order]
    noise = x_t.clone()
    for g in range(schedule.num_groups):
        groups, span = range(g, g + 1), schedule.span(range(g, g + 1))
        here, x_s = x_t[:, span], noise[:, span]
        clean = x_s.clone()
        for done in range(schedule.steps - 1, -1, -1):
            t, s = grid.at(groups, (done,)), grid.at(groups, (done + 1,))
            for _ in range(iterations):
                with run.autocast_context():
                    estimate = run.denoise(x_t, t, span)
                here += x_s - s.point(estimate)
            x_s = here.clone()
        noise[:, span] = x_s
        here.copy_(clean)  # the next groups are given it as finished
    return decoder.layout.image(noise[:, run.order.argsort()])
