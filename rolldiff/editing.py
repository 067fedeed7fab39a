"""Parts of an image drawn anew, with the weights that draw whole images.

What is kept comes first in the decode order, whatever its place, and is data from the start: the
network sees it as it sees any finished group. A token is kept if all of its pixels are; of a token
that is drawn anew only the pixels asked for are changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rolldiff.begin import Known, begin
from rolldiff.decoding import Decoded, Model
from rolldiff.denoiser import Guidance
from rolldiff.grouping import Grouping, Order
from rolldiff.layout import check_image
from rolldiff.step import Euler, Step

__all__ = ["Editing"]


class Editing(Model):
    """What a decoder can do with an image that is there."""

    def inpaint(
        self,
        image: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "H W"],
        cond: Any = None,
        *,
        num_groups: int = 1,
        overlap: float = 0.0,
        steps: int = 16,
        order: Order = "top_to_bottom",
        step: Step = Euler(),
        guidance: float | Guidance = 0.0,
        seed: int | torch.Generator | None = None,
    ) -> Decoded:
        """Draw the pixels of a mask anew; the others come back as they are, bit by bit.

        Args:
            image: in about [-1, 1]; what a decode gave may go beyond.
            mask: `[H, W]`, True where to draw; the same for all images.
            cond: the condition, see `decode`.
            num_groups: groups of the tokens that are drawn, at most as many as there are.
            overlap: see `decode`, as all that follow.
            steps: solver steps a group.
            order: of the tokens that are drawn.
            step: the solver step.
            guidance: towards the condition.
            seed: of the noise.

        Warns:
            UserWarning: if training never showed this order; a checkpoint that was trained with a
                random order among others knows them all.

        Raises:
            ValueError: if the image or the mask has the wrong shape or type, or the mask is empty.
        """
        image = check_image(image, self.layout, decoded=True).to(self.device, self.state_dtype)
        if mask.shape != image.shape[2:] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must have shape {tuple(image.shape[2:])} and type torch.bool, got "
                f"{tuple(mask.shape)} and {mask.dtype}"
            )
        if not mask.any():
            raise ValueError("mask must be True somewhere, got False everywhere")
        drawn = mask.to(self.device).expand(image.shape)
        known = ~(self.layout.tokens(drawn[:1].to(image.dtype))[0] > 0).any(-1)
        count = len(image)
        asked = count, num_groups, overlap, steps, order, step, guidance, seed, 0, True, None
        with torch.no_grad():
            run = begin(self, cond, *asked, Known(self.layout.tokens(image), known))
            decoded = run.decoded()
        return Decoded(torch.where(drawn, decoded.image, image), decoded.cost, decoded.overlap)

    def regenerate(
        self,
        image: Float[Tensor, "B C H W"],
        rows: tuple[int, int],
        cond: Any = None,
        *,
        num_groups: int = 1,
        overlap: float = 0.0,
        steps: int = 16,
        order: Order = "top_to_bottom",
        step: Step = Euler(),
        guidance: float | Guidance = 0.0,
        seed: int | torch.Generator | None = None,
    ) -> Decoded:
        """Draw the rows `first … stop - 1` anew; takes what `inpaint` takes.

        Args:
            rows: `(first, stop)`, in pixels.

        Raises:
            ValueError: if there are no such rows.
        """
        _, height, width = self.layout.image_shape
        first, stop = rows
        if not 0 <= first < stop <= height:
            raise ValueError(f"rows must be (first, stop) within 0 … {height}, got {rows}")
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[first:stop] = True
        return self.inpaint(
            image,
            mask,
            cond,
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            order=order,
            step=step,
            guidance=guidance,
            seed=seed,
        )

    def variations(
        self,
        image: Float[Tensor, "B C H W"],
        groups: Sequence[int],
        cond: Any = None,
        *,
        num_groups: int,
        steps: int = 16,
        order: Order = "top_to_bottom",
        guidance: float | Guidance = 0.0,
        seed: int | torch.Generator | None = None,
        iterations: int = 8,
    ) -> Decoded:
        """Draw some groups from new noise and all others from their own.

        The noise of a group is found by taking the Euler steps of its decode back, among the
        finished groups before it. Groups before the first that is new come back nearly as they
        were; those behind it are drawn from their own noise, and follow what is new before them.

        Args:
            image: in about [-1, 1].
            groups: the groups that get new noise, from 0.
            cond: the condition, see `decode`.
            num_groups: groups of the decode, one after another.
            steps: solver steps a group.
            order: the decode order.
            guidance: towards the condition.
            seed: of the new noise.
            iterations: network calls for each step that is taken back. More come nearer.

        Raises:
            ValueError: if there is no such group, or the image has the wrong shape.
        """
        image = check_image(image, self.layout, decoded=True).to(self.device, self.state_dtype)
        if any(not 0 <= group < num_groups for group in groups):
            raise ValueError(f"groups must be in 0 … {num_groups - 1}, got {list(groups)}")
        if iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {iterations}")
        count = len(image)
        asked = count, num_groups, 0.0, steps, order, Euler(), guidance, seed, 0, True, None
        with torch.no_grad():
            back, run = begin(self, cond, *asked), begin(self, cond, *asked)
            tokens = self.layout.tokens(image)[:, run.order]
            noise = back.noise(tokens, iterations=iterations)
            ends = Grouping(self.layout.num_tokens, num_groups).ends
            for group in groups:
                new = slice(ends[group], ends[group + 1])
                noise[:, new] = run.x_1[:, new]
            # The meter that counted the way back goes on.
            return replace(run, x_1=noise, denoiser=back.denoiser).decoded()
