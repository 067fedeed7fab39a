"""`Decoder`: images in, a loss out; noise in, images out, group by group.

The front door. It joins a layout, a noise schedule, a backbone and what training draws, checks what
users hand in, and leaves the work to the rooms below.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rolldiff.begin import begin
from rolldiff.conditioning import Conditions
from rolldiff.conditions import ClassLabels, Condition
from rolldiff.decoding import Decoded, Frame
from rolldiff.denoiser import Backbone, Guidance
from rolldiff.editing import Editing
from rolldiff.grouping import Order
from rolldiff.hub import Pretrained
from rolldiff.layout import Layout, Patches, check_image
from rolldiff.nn import Transformer
from rolldiff.noise import NoiseSchedule, Rectified
from rolldiff.prediction import Prediction, coefficients, squared_error
from rolldiff.step import Euler, Step
from rolldiff.training import Training

__all__ = ["Decoded", "Decoder", "Frame"]


class Decoder(Pretrained, Editing):
    """A grouped diffusion decoder.

    Args:
        layout: cuts images into tokens.
        backbone: the raw network.
        noise: the noise schedule.
        prediction: what the backbone predicts.
        loss_space: the space in which the squared error is taken.
        training: what training draws; decoding outside of it warns.
    """

    orders: Tensor
    groups: Tensor

    def __init__(
        self,
        layout: Layout,
        backbone: Backbone,
        *,
        noise: NoiseSchedule = Rectified(),
        prediction: Prediction = "x",
        loss_space: Prediction = "velocity",
        training: Training = Training(),
    ) -> None:
        super().__init__()
        # Refuse what could only fail later.
        coefficients(prediction, noise, torch.ones(1))
        coefficients(loss_space, noise, torch.ones(1))
        orders, groups = training.tables(layout.coords)
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        self.config = {
            "layout": layout,
            "backbone": backbone,
            "noise": noise,
            "prediction": prediction,
            "loss_space": loss_space,
            "training": training,
        }
        self.layout = layout
        self.backbone = backbone
        self.noise = noise
        self.prediction: Prediction = prediction
        self.loss_space: Prediction = loss_space
        self.trained_for = training

    @classmethod
    def build(
        cls,
        *,
        image_size: int | Sequence[int],
        channels: int = 3,
        patch: int = 2,
        width: int = 96,
        depth: int = 4,
        heads: int | None = None,
        num_classes: int = 0,
        condition: Condition | Mapping[str, Condition] | None = None,
        causal: bool = True,
        noise: NoiseSchedule = Rectified(),
        prediction: Prediction = "x",
        training: Training = Training(),
    ) -> "Decoder":
        """A decoder of patches, with a transformer: the usual choices.

        Args:
            image_size: height and width in pixels, or one number for a square image.
            channels: channels of the image.
            patch: side of a patch in pixels; a token is a patch, so N = H W / patch^2.
            width: channels of the transformer.
            depth: its blocks.
            heads: its attention heads; by default heads of 32 channels.
            num_classes: class labels; 0 for none. Short for `condition=ClassLabels(num_classes)`.
            condition: what it is conditioned on, one or several by name: `ClassLabels`,
                `TokenGrid`, `TokenSequence`, `LowResolution`.
            causal: False for bidirectional attention, which has no exact cache.
            noise: the noise schedule.
            prediction: what the network predicts; `velocity` learns faster where a token holds
                few numbers, `x` is for large patches (Li and He 2025).
            training: what training draws.

        Raises:
            ValueError: if the sizes do not fit together.
        """
        if num_classes and condition is not None:
            raise ValueError(f"num_classes must be 0 beside a condition, got {num_classes}")
        layout = Patches(image_size, channels=channels, patch=patch)
        backbone = Transformer(
            layout,
            width=width,
            depth=depth,
            heads=heads or max(1, width // 32),
            condition=ClassLabels(num_classes) if condition is None else condition,
            causal=causal,
        )
        return cls(
            layout,
            backbone,
            noise=noise,
            prediction=prediction,
            training=training,
        )

    @property
    def condition(self) -> Conditions:
        """What it is conditioned on."""
        return self.backbone.condition

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def loss(
        self, image: Tensor, cond: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean squared error in the loss space, over the tokens that move.

        Each example draws a group count, an order and local times; a token that is clean (t = 0) or
        waits (t = 1) is context and carries no loss.

        Args:
            image: `[B, C, H, W]`, floating point, in [-1, 1].
            cond: the condition, or None; several in a dictionary by name. Its gradient is kept.
            generator: a CPU generator for all that is drawn; None takes torch's own.

        Returns:
            A scalar to call `backward` on.

        Raises:
            ValueError: if an argument has the wrong shape, type or range.
        """
        x = self.layout.tokens(check_image(image, self.layout)).to(self.state_dtype)
        given = self.condition.check(cond, len(x), x.device)
        given = self.condition.drop(given, self.trained_for.drop_cond, generator)
        shown = self.trained_for.show(x, self.orders, self.groups, self.noise, generator)
        context = self.backbone.prepare(shown.order, shown.group, given)
        y = self.backbone(shown.x_t, self.backbone.embed_time(shown.t), context)
        return squared_error(
            y.to(x.dtype),
            shown.x,
            shown.eps,
            shown.t,
            prediction=self.prediction,
            loss=self.loss_space,
            noise=self.noise,
        )

    def forward(
        self, image: Tensor, cond: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss, for wrappers that call a module, such as `DistributedDataParallel`."""
        return self.loss(image, cond, generator=generator)

    def decode(
        self,
        cond: Any = None,
        *,
        num_images: int | None = None,
        num_groups: int = 1,
        overlap: float = 0.0,
        steps: int = 16,
        order: Order = "top_to_bottom",
        step: Step = Euler(),
        guidance: float | Guidance = 0.0,
        seed: int | torch.Generator | None = None,
        first: int = 0,
        cache: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Decoded:
        """Decode images from noise.

        Args:
            cond: the condition, or None; several in a dictionary by name. In place of a grid or a
                sequence of tokens an iterator over pieces of it, `[B, k]` or `[B, k, C]` in raster
                order: a group then starts as soon as there is what its tokens look at.
            num_images: how many images; by default as many as `cond` has.
            num_groups: groups, from 1 to the number of tokens.
            overlap: in [0, 1], see `RollingSchedule`.
            steps: solver steps a group.
            order: the decode order, see `decode_order`.
            step: the solver step.
            guidance: 0 for none; otherwise the `w` of `y + w (y - y_null)`, see `Guidance`.
            seed: a seed or a generator; image i has the same noise alone and in any batch.
            first: the index of the first image in the seed's stream.
            cache: whether a causal backbone keeps what is finished.
            dtype: what the network computes in; by default bfloat16 on CUDA, elsewhere the type of
                its weights. The state of the solver stays in float32.

        Raises:
            ValueError: if an argument is out of range.
        """
        asked = num_images, num_groups, overlap, steps, order, step, guidance, seed, first, cache
        with torch.no_grad():
            return begin(self, cond, *asked, dtype).decoded()

    def stream(
        self,
        cond: Any = None,
        *,
        num_images: int | None = None,
        num_groups: int = 1,
        overlap: float = 0.0,
        steps: int = 16,
        order: Order = "top_to_bottom",
        step: Step = Euler(),
        guidance: float | Guidance = 0.0,
        seed: int | torch.Generator | None = None,
        first: int = 0,
        cache: bool = True,
        dtype: torch.dtype | None = None,
        frames: int | None = None,
        preview: bool = True,
    ) -> Iterator[Frame]:
        """Decode images from noise, a frame after every step.

        Takes what `decode` takes; the last frame's image is what `decode` returns. The preview of
        the tokens that wait takes one more network call for each frame shown.

        Args:
            frames: evenly spaced frames to show instead of all, the last one among them.
            preview: whether waiting tokens are shown as `E[x | x_t]`; otherwise they are 0, grey.

        Yields:
            `Frame`s.
        """
        asked = num_images, num_groups, overlap, steps, order, step, guidance, seed, first, cache
        run = begin(self, cond, *asked, dtype)
        return run.frames(frames, preview=preview)

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the backbone, in place; weights keep their names. See `Transformer.compile`."""
        self.backbone.compile(mode=mode)

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the solver's state: never below float32."""
        return torch.promote_types(self.dtype, torch.float32)
