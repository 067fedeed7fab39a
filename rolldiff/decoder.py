"""`Decoder`: images in, a loss out; noise in, images out, group by group.

This is the only module that uses all of the core. It combines a layout, a noise schedule, a
backbone and a training distribution; it validates what users pass; and it runs the sampler with a
cache. Tokens are kept in decode order and in float32 (float64 if the weights are), whatever type
the network computes in.
"""

import copy
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rolldiff.conditioning import (
    ClassLabels,
    Condition,
    Conditioning,
    Masked,
    StreamedConditions,
    concat,
)
from rolldiff.diffusion.layout import (
    Layout,
    Patches,
    check_layout,
    highest,
    resized,
    same_layout,
    touched,
)
from rolldiff.diffusion.process import (
    MAX_IMAGES,
    Estimate,
    LossSpace,
    NoiseSchedule,
    PerSampleNoise,
    Prediction,
    Rectified,
    Shard,
    denoising_loss,
)
from rolldiff.diffusion.sampler import Euler, NoiseLevel, Solver, State, TimeGrid, sample
from rolldiff.diffusion.schedule import (
    MAX_STEPS,
    Grouping,
    GroupSchedule,
    Order,
    check_grouping,
    check_order,
    decode_order,
    level_groups,
)
from rolldiff.diffusion.timesteps import Draw, TrainingDistribution
from rolldiff.errors import (
    UsageError,
    boolean,
    dense_tensor,
    finite_number,
    instance,
    known_names,
    shown,
    warn_user,
    whole_number,
)
from rolldiff.hub import Pretrained
from rolldiff.likelihood import Likelihood, LikelihoodConfig, Teacher, encode, log_likelihood
from rolldiff.nn.denoiser import Backbone, Denoiser, Guidance
from rolldiff.nn.transformer import Transformer

__all__ = [
    "Cost",
    "DecodeConfig",
    "DecodeOutput",
    "DecodeRun",
    "Decoder",
    "Frame",
    "check_image",
    "configured",
]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The settings of a decoding.

    Args:
        num_groups: groups, from 1 to the number of tokens.
        overlap: of successive groups, in [0, 1]: 0 one after another, 1 all together.
        steps: solver steps per group, at most 10,000.
        order: the decode order, see `decode_order`.
        grouping: `equal` for groups of as many tokens, `levels` for groups of whole levels of the
            layout (scales, frequencies), of which there are then at least `num_groups`.
        solver: the solver.
        guidance: 0 for none; otherwise the `w` of `y + w (y - y_null)`, or a `Guidance`.
        context_time: the local time at which finished groups are shown to those after them, as
            `alpha x`. A little of it makes up for what a finished group differs from data, if
            training has shown it (`context_noise`); the cache stays exact.

    Raises:
        UsageError: if a setting is out of range.
    """

    num_groups: int = 1
    overlap: float = 0.0
    steps: int = 16
    order: Order = "top_to_bottom"
    grouping: Grouping = "equal"
    solver: Solver = Euler()
    guidance: float | Guidance = 0.0
    context_time: float = 0.0

    def __post_init__(self) -> None:
        guidance = self.guidance
        if not isinstance(guidance, Guidance):
            guidance = Guidance(finite_number(guidance, "guidance"))
        plain = {
            # The decoder limits the number of groups.
            "num_groups": whole_number(self.num_groups, "num_groups"),
            "overlap": finite_number(self.overlap, "overlap", minimum=0, maximum=1),
            "steps": whole_number(self.steps, "steps", maximum=MAX_STEPS),
            "order": check_order(self.order),
            "grouping": check_grouping(self.grouping),
            "solver": instance(self.solver, Solver, "solver", "a Solver such as Euler()"),
            "guidance": guidance,
            "context_time": finite_number(self.context_time, "context_time", minimum=0, maximum=1),
        }
        if plain["context_time"] == 1:
            raise UsageError("context_time must be below 1, got 1")
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def schedule(
        self, layout: Layout, *, order: Int[Tensor, " N"] | None = None, num_known: int = 0
    ) -> GroupSchedule:
        """When each group of an image moves.

        Args:
            layout: of the image.
            order: the raster index of each token in decode order; None is that of `self.order`.
            num_known: leading tokens that are data from the start.

        Raises:
            UsageError: if there are not so many tokens or levels.
        """
        sizes = None
        if self.grouping == "levels":
            if order is None:
                order = decode_order(self.order, layout.coords)
            sizes = level_groups(layout.coords[order[num_known:].cpu(), 0], self.num_groups)
        return GroupSchedule(
            num_tokens=layout.num_tokens,
            num_groups=self.num_groups,
            overlap=self.overlap,
            steps=self.steps,
            num_known=num_known,
            sizes=sizes,
        )


@dataclass(frozen=True)
class Cost:
    """The measured cost of a decoding.

    Attributes:
        nfe: network calls in series.
        tokens: token evaluations per image; with guidance both branches count.
        seconds: wall-clock time.
        seconds_to_first_group: wall-clock time until the first group was final.
        cached: whether finished tokens were kept in a cache instead of computed again.
    """

    nfe: int
    tokens: int
    seconds: float
    seconds_to_first_group: float
    cached: bool


@dataclass(frozen=True)
class DecodeOutput:
    """A finished decoding.

    Attributes:
        image: `[B, C, H, W]`, values about [-1, 1] (not clipped).
        cost: what it took.
        overlap: the overlap after rounding the stagger to whole steps.
    """

    image: Tensor
    cost: Cost
    overlap: float


@dataclass(frozen=True)
class Frame:
    """A decoding in progress.

    Attributes:
        image: `[B, C, H, W]`: finished tokens as they are, the others as `E[x | x_t]`.
        finished: `[H, W]`, True where pixels are final.
        tau: global time, from 1 to 0.
        nfe: network calls so far, those of previews included.
    """

    image: Tensor
    finished: Tensor
    tau: float
    nfe: int


class Decoder(Pretrained):
    """A grouped diffusion decoder.

    Args:
        layout: cuts images into tokens.
        backbone: the network.
        noise: the noise schedule.
        prediction: what the backbone predicts.
        loss_space: the space of the squared error; `bound` weights it as the variational bound of
            the likelihood does.
        training: the settings that training draws. Decoding outside of them warns.
        latents: whether its images are latents of an autoencoder, which may hold any finite values,
            instead of pictures in [-1, 1].

    Raises:
        UsageError: if a part is something else, or the parts do not fit together.
    """

    orders: Tensor

    def __init__(
        self,
        layout: Layout,
        backbone: Backbone,
        *,
        noise: NoiseSchedule = Rectified(),
        prediction: Prediction = "x",
        loss_space: LossSpace = "velocity",
        training: TrainingDistribution = TrainingDistribution(),
        latents: bool = False,
    ) -> None:
        super().__init__()
        check_layout(layout)
        instance(backbone, Backbone, "backbone", "a Backbone such as a Transformer")
        instance(noise, NoiseSchedule, "noise", "a noise schedule such as Rectified()")
        instance(training, TrainingDistribution, "training", "a TrainingDistribution")
        latents = boolean(latents, "latents")
        spaces = {"prediction": (prediction, Prediction), "loss_space": (loss_space, LossSpace)}
        for name, (space, kinds) in spaces.items():
            if not isinstance(space, str) or space not in get_args(kinds):
                raise UsageError(
                    f"{name} must be one of {', '.join(get_args(kinds))}, got {shown(space)}"
                )
        theirs = getattr(backbone, "layout", layout)
        if not same_layout(theirs, layout):
            raise UsageError(
                f"layout must be that of the backbone, got {layout} and a backbone for {theirs}"
            )
        orders, groups = training.tables(layout.coords)
        self._groups: Tensor | None = groups  # on the CPU; None in a resized decoder
        self._grouped = bool(groups.any())
        self.register_buffer("orders", orders, persistent=False)
        self._values_checked = False
        self.config = {
            "layout": layout,
            "backbone": backbone,
            "noise": noise,
            "prediction": prediction,
            "loss_space": loss_space,
            "training": training,
            "latents": latents,
        }
        self.layout = layout
        self.backbone = backbone
        self.noise = noise
        self.prediction: Prediction = prediction
        self.loss_space: LossSpace = loss_space
        self.training_distribution = training
        self.latents = latents

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
        window: int | None = None,
        causal: bool = True,
        noise: NoiseSchedule = Rectified(),
        prediction: Prediction = "x",
        training: TrainingDistribution = TrainingDistribution(),
        latents: bool = False,
    ) -> "Decoder":
        """A decoder of patches with a transformer.

        Args:
            image_size: height and width in pixels, or one number for a square image.
            channels: channels of the image.
            patch: side of a patch in pixels; a token is a patch, so N = H W / patch^2.
            width: channels of the transformer.
            depth: its blocks.
            heads: its attention heads; by default heads of 32 channels.
            num_classes: class labels; 0 for none. Short for `condition=ClassLabels(num_classes)`.
            condition: what it is conditioned on, one or several by name: `ClassLabels`,
                `TokenGrid`, `TokenSequence`.
            window: how many rows and columns of tokens away a token sees others; None for all. With
                a window the decoder decodes images of any size, in bounded memory.
            causal: False for bidirectional attention, which has no exact cache.
            noise: the noise schedule.
            prediction: what the network predicts; `velocity` learns faster where a token holds few
                numbers, `x` is for large patches (Li and He 2025).
            training: the settings that training draws.
            latents: whether its images are latents of an autoencoder.

        Raises:
            UsageError: if the sizes do not fit together.
        """
        labels = ClassLabels(num_classes)
        if labels.num_classes and condition is not None:
            raise UsageError(f"num_classes must be 0 beside a condition, got {num_classes}")
        layout = Patches(image_size, channels=channels, patch=patch)
        width = whole_number(width, "width")
        backbone = Transformer(
            layout,
            width=width,
            depth=depth,
            heads=max(1, width // 32) if heads is None else heads,
            condition=labels if condition is None else condition,
            window=window,
            causal=causal,
        )
        return cls(
            layout,
            backbone,
            noise=noise,
            prediction=prediction,
            training=training,
            latents=latents,
        )

    @property
    def conditioning(self) -> Conditioning:
        """What it is conditioned on."""
        return self.backbone.conditioning

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of the solver's state: never below float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def loss(
        self,
        image: Tensor,
        cond: Any = None,
        *,
        generator: torch.Generator | None = None,
        shard: Shard = Shard(),
    ) -> Tensor:
        """The mean squared error in the loss space over the moving tokens.

        Group counts, orders and local times are drawn from the training distribution. Tokens that
        are shown as clean context carry no loss.

        Args:
            image: `[B, C, H, W]`, floating point, in [-1, 1]; with `latents` any finite values. On
                an accelerator the values of image and condition are checked in the first call
                alone, because that waits for it.
            cond: the condition, or None; several in a dictionary by name. Its gradient is kept.
            generator: a CPU generator for all random draws; None uses torch's own.
            shard: which part of a global batch this is, if several processes hold equal parts of
                it. With the same `generator` everywhere, the mean of their losses is then the loss
                of the whole batch, and of their gradients its gradient.

        Returns:
            A scalar to call `backward` on.

        Raises:
            UsageError: if an argument has the wrong shape, type or range.
        """
        # On an accelerator values are read once: reading them waits for all that was submitted.
        check_values = self.device.type == "cpu" or not self._values_checked
        if self._groups is None:
            raise UsageError(
                "loss must be that of the decoder itself, got a decoder resized to "
                f"{self.layout.image_shape[1:]}"
            )
        image = check_image(image, self.layout, unbounded=self.latents, check_values=check_values)
        if image.device != self.device:
            raise UsageError(
                f"image must be on the decoder's device {self.device}, got {image.device}"
            )
        check_generator(generator, shard=shard)
        x = self.layout.tokens(image).to(self.state_dtype)
        given = self.conditioning.validate(cond, len(x), x.device, check_values=check_values)
        self._values_checked = True
        rate = self.training_distribution.drop_cond
        given = self.conditioning.drop(given, rate, generator, shard=shard)
        draw = self.training_distribution.sample(len(x), self._groups, generator, shard=shard)
        order = self.orders[draw.order.to(x.device, non_blocking=True)]
        t = draw.t.to(x, non_blocking=True)
        x = x.gather(1, order[..., None].expand_as(x))  # [B, N, D] in decode order
        eps = _randn_like(x, generator, shard=shard)
        y = self._predict(x, self.noise.add_noise(x, eps, t), draw, order=order, given=given)
        return denoising_loss(
            y.to(x.dtype),
            x,
            eps,
            t=t,
            moving=draw.moving(x.device),
            noise=self.noise,
            prediction=self.prediction,
            space=self.loss_space,
            count=draw.num_moving,
        )

    def _predict(
        self,
        x: Float[Tensor, "B N D"],
        x_t: Float[Tensor, "B N D"],
        draw: Draw,
        *,
        order: Int[Tensor, "B N"],
        given: dict[str, Masked],
    ) -> Float[Tensor, "B N D"]:
        """What the backbone predicts in training; a stream beside `x_t` could be shown `x`."""
        t = draw.t.to(x_t, non_blocking=True)
        # An order that all examples share makes one mask of a window for all.
        places = order[0] if len(self.orders) == 1 else order
        context = self.backbone.prepare(places, given, grouped=self._grouped)
        mask = draw.mask(x_t.device) if self.backbone.causal else None
        time = self.backbone.embed_time(t[:, :1] if draw.shared else t)
        return self.backbone(x_t, time, context, mask=mask)

    def resized(self, image_size: int | Sequence[int]) -> "Decoder":
        """The same weights for images of another size, to decode and not to train.

        Conditions on a grid grow with the image. Needs a `Transformer` with a window.

        Args:
            image_size: height and width in pixels, or one number for a square image.

        Raises:
            UsageError: if the network is made for one size, or the patches or the cells of a
                condition do not fit.
        """
        layout = resized(self.layout, image_size)
        if same_layout(layout, self.layout):
            return self
        other = copy.copy(self)
        other._modules = self._modules | {"backbone": self.backbone.resized(layout)}
        other.layout, other._groups = layout, None
        other.config = self.config | {"layout": layout, "backbone": other.backbone}
        return other

    def forward(self, image: Tensor, cond: Any = None, **options: Any) -> Tensor:
        """The loss, for wrappers that call a module, such as `DistributedDataParallel`."""
        return self.loss(image, cond, **options)

    def decode(
        self,
        cond: Any = None,
        config: DecodeConfig | None = None,
        *,
        num_images: int | None = None,
        image_size: int | Sequence[int] | None = None,
        seed: int | torch.Generator | PerSampleNoise | None = None,
        start_index: int = 0,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        cache: bool = True,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> DecodeOutput:
        """Decode images from noise.

        Args:
            cond: the condition, or None; several in a dictionary by name. A grid or a sequence of
                tokens may be an iterator over pieces `[B, k]` or `[B, k, C]` in raster order: a
                group then starts as soon as what its tokens depend on has arrived.
            config: the settings; by default those of `DecodeConfig()`.
            num_images: number of images, at most 2^20 and with fewer than 2^31 pixel values in
                all; by default as many as the other arguments have.
            image_size: height and width in pixels, or one number for a square image, with a
                backbone that has a window; None is the size of the training. See `resized`.
            seed: a seed or a generator; image i gets the same noise alone and in any batch. Or the
                `PerSampleNoise` of the images, for images of several seeds.
            start_index: index of the first image in the seed's sequence of images.
            image: `[B, C, H, W]`, for inpainting, together with `mask`; values about [-1, 1].
            mask: `[H, W]`, True where pixels are decoded; the other pixels are those of `image`,
                bit for bit. A token with a pixel to decode is decoded as a whole. Known tokens come
                first in the decode order, so a checkpoint trained on a random order among others
                suits every mask.
            noise: `[B, C, H, W]`, unit noise to start from, instead of the seed's.
            cache: whether a causal backbone keeps finished tokens in a cache.
            dtype: what the network computes in; by default bfloat16 on CUDA, elsewhere the type of
                the weights. The solver's state stays in float32.
            **overrides: fields of `DecodeConfig` that replace those of `config`, such as
                `num_groups=4`.

        Two ways to the same image agree to rounding, not bit for bit: alone or in a batch, with or
        without the cache. The largest differences seen are 8e-6 in float32, 6e-3 in float16, and
        7e-2 in bfloat16, the default on a GPU. The noise is the same bit for bit.
        docs/conventions.md says how to get images that do not depend on their batch.

        Raises:
            UsageError: if an argument is out of range, or `overrides` holds something other than a
                field of `DecodeConfig`.

        Warns:
            UserWarning: if the settings are outside the training distribution.
        """
        run = self.prepare(
            cond,
            configured(config, overrides, others=_RUN_OPTIONS),
            num_images=num_images,
            image_size=image_size,
            seed=seed,
            start_index=start_index,
            image=image,
            mask=mask,
            noise=noise,
            cache=cache,
            dtype=dtype,
        )
        return run.finish()

    def stream(
        self,
        cond: Any = None,
        config: DecodeConfig | None = None,
        *,
        frames: int | None = None,
        preview: bool = True,
        **arguments: Any,
    ) -> Iterator[Frame]:
        """Decode images from noise, with a frame after every step.

        The last frame's image is what `decode` returns. Tokens that have not started are in no call
        of the sampler, so previewing them takes one more network call per frame.

        Args:
            cond: see `decode`.
            config: see `decode`.
            frames: number of evenly spaced frames, the last step among them; None yields all.
            preview: whether waiting tokens are shown as `E[x | x_t]`; otherwise as 0, grey.
            **arguments: all other arguments of `decode`.

        Yields:
            `Frame`s.

        Raises:
            UsageError: at once, if an argument is out of range.
        """
        options = {name: arguments.pop(name) for name in _RUN_OPTIONS if name in arguments}
        config = configured(config, arguments, others=(*_RUN_OPTIONS, "frames", "preview"))
        run = self.prepare(cond, config, **options)
        return run.frames(frames, preview=preview)

    def log_likelihood(
        self,
        image: Tensor,
        cond: Any = None,
        config: DecodeConfig | None = None,
        *,
        likelihood: LikelihoodConfig | None = None,
        seed: int | torch.Generator | None = 0,
        start_index: int = 0,
        **overrides: Any,
    ) -> Likelihood:
        """The likelihood of images under the distribution that a decoding samples.

        With `method="bound"` the result has a gradient where torch records one, so that
        `-result.nats.mean()` is a loss; the clean groups are then shown in every call.

        Args:
            image: `[B, C, H, W]`, floating point, in [-1, 1]; with `latents` any finite values.
            cond: the condition, see `decode`.
            config: group count, overlap, order and guidance; `steps` is the number of solver steps
                per group to begin with. The solver is a Runge-Kutta method of fourth order.
            likelihood: how it is computed.
            seed: of the noise of dequantisation, probes and bound; see `decode`.
            start_index: see `decode`. An image has the same noise alone and in a batch.
            **overrides: fields of `DecodeConfig` and of `LikelihoodConfig` that replace those
                above, such as `num_groups=4, method="bound"`.

        Returns:
            The bits per dimension of each image, with their errors and cost.

        Raises:
            UsageError: if an argument is out of range, a value of `image` is between the levels, a
                bidirectional backbone is asked for several groups, or `dequantization` is not None
                for latents.

        Warns:
            UserWarning: if the settings are outside the training distribution.
        """
        names = {f.name for f in fields(LikelihoodConfig)}
        how = {name: overrides.pop(name) for name in list(overrides) if name in names}
        config = configured(config, overrides, others=(*names, "likelihood", "seed", "start_index"))
        if likelihood is None:
            likelihood = LikelihoodConfig()
        instance(likelihood, LikelihoodConfig, "likelihood", "a LikelihoodConfig")
        likelihood = replace(likelihood, **how)
        if self.latents and likelihood.dequantization is not None:
            raise UsageError(
                "dequantization must be None for latents, whose values have no levels, got "
                f"{likelihood.dequantization}"
            )
        image = check_image(image, self.layout, unbounded=self.latents)
        image = image.to(self.device, self.state_dtype)
        teacher = self._teacher(image, cond, config)
        return log_likelihood(
            teacher,
            image,
            likelihood,
            tokens=lambda x: self.layout.tokens(x)[:, teacher.order],
            steps=config.steps,
            samples=PerSampleNoise(seed, len(image), start_index=start_index),
        )

    def encode(
        self,
        image: Tensor,
        cond: Any = None,
        config: DecodeConfig | None = None,
        *,
        t_min: float = 1e-4,
        **overrides: Any,
    ) -> Float[Tensor, "B C H W"]:
        """The noise of images by the probability-flow equation, for `decode(noise=…)`.

        Decoding it gives the images up to the errors of both solvers, which fall with `steps`. With
        few steps of Euler's solver, `editing.invert` inverts those very steps.

        Args:
            image: `[B, C, H, W]`, about [-1, 1].
            cond: the condition, see `decode`.
            config: the settings; `steps` of a Runge-Kutta method of fourth order per group.
            t_min: the local time at which the flow leaves the data, in [1e-6, 0.5].
            **overrides: fields of `DecodeConfig`, such as `num_groups=4`.

        Raises:
            UsageError: see `log_likelihood`.

        Warns:
            UserWarning: if the settings are outside the training distribution.
        """
        config = configured(config, overrides, others=("t_min",))
        t_min = finite_number(t_min, "t_min", minimum=1e-6, maximum=0.5)
        image = check_image(image, self.layout, unbounded=True)
        teacher = self._teacher(image.to(self.device, self.state_dtype), cond, config)
        noise = encode(teacher, steps=config.steps, t_min=t_min)
        return self.layout.image(noise[:, teacher.order.argsort()])

    def _teacher(self, image: Tensor, cond: Any, config: DecodeConfig) -> Teacher:
        guidance, given = config.guidance, self.conditioning.split(cond)
        assert isinstance(guidance, Guidance)  # DecodeConfig has turned numbers into one
        if guidance.scale and not given:
            raise UsageError(
                f"guidance needs a condition, got guidance {guidance.scale} without cond"
            )
        for phrase in self.unseen(config, given.keys()):
            warn_user(f"decoding beyond what this checkpoint was trained for: {phrase}")
        values = self.conditioning.validate(cond, len(image), image.device)
        if guidance.scale:
            values = concat(values, self.conditioning.null(len(image), image.device))
        order = decode_order(config.order, self.layout.coords).to(image.device)
        schedule = config.schedule(self.layout, order=order)
        together = config.overlap == 1
        return Teacher(
            backbone=self.backbone,
            noise=self.noise,
            prediction=self.prediction,
            x=self.layout.tokens(image)[:, order],
            order=order,
            group=schedule.group.to(image.device),
            position=schedule.position.to(image),
            num_groups=1 if together else config.num_groups,
            overlap=0.0 if together else config.overlap,
            values=values,
            guidance=guidance,
            context_time=config.context_time,
        )

    @torch.no_grad()
    def prepare(
        self,
        cond: Any = None,
        config: DecodeConfig = DecodeConfig(),
        *,
        num_images: int | None = None,
        image_size: int | Sequence[int] | None = None,
        seed: int | torch.Generator | PerSampleNoise | None = None,
        start_index: int = 0,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        cache: bool = True,
        dtype: torch.dtype | None = None,
    ) -> "DecodeRun":
        """Validate the arguments of `decode` and prepare all that precedes the first step."""
        if image_size is not None:
            self = self.resized(image_size)
        counter = _CostCounter(self.device)
        autocast = self._autocast_dtype(dtype)
        cache = boolean(cache, "cache")
        guidance = config.guidance
        assert isinstance(guidance, Guidance)  # DecodeConfig has turned numbers into one
        known_tokens = None
        if image is not None or mask is not None:
            image, known_tokens = self._known(image, mask)
        num_known = 0 if known_tokens is None else int(known_tokens.sum())
        order = decode_order(config.order, self.layout.coords).to(self.device)
        if known_tokens is not None:
            order = self._known_first(order, known_tokens)
        schedule = config.schedule(self.layout, order=order, num_known=num_known)
        passed = self.conditioning.split(cond).keys()
        if guidance.scale and not passed:
            raise UsageError(
                f"guidance needs a condition, got guidance {guidance.scale} without cond"
            )
        for phrase in self.unseen(config, passed):
            warn_user(f"decoding beyond what this checkpoint was trained for: {phrase}")
        if noise is not None:
            noise = check_image(noise, self.layout, unbounded=True, name="noise")
        seeded = seed if isinstance(seed, PerSampleNoise) else None
        batch = self._num_images(num_images, cond, image, noise, seeded)
        streamed = StreamedConditions(self.conditioning, cond, batch=batch, device=self.device)
        # A pixel starts from the same noise whatever the order.
        if isinstance(seed, PerSampleNoise):
            samples = seed
        else:
            samples = PerSampleNoise(seed, batch, start_index=start_index)
        if noise is None:
            x_1 = samples.normal(self.layout.num_tokens, self.layout.token_dim)
        else:
            x_1 = self.layout.tokens(noise)
        x_1 = x_1.to(self.device, self.state_dtype)
        if image is not None and known_tokens is not None:
            x_1[:, known_tokens] = self.layout.tokens(image)[:, known_tokens]
        grid = TimeGrid(
            schedule,
            self.noise,
            self.prediction,
            embed=self.backbone.embed_time,
            like=x_1,
        )
        position = schedule.position.to(x_1)
        time = torch.full((1,), config.context_time, dtype=torch.float64)
        shown = grid.level(time) if config.context_time else grid.data_end
        run = DecodeRun(
            decoder=self,
            config=config,
            schedule=schedule,
            denoiser=Denoiser(self.backbone, schedule, grid, guidance, position, shown),
            order=order,
            samples=samples,
            streamed=streamed,
            x_1=x_1[:, order],
            autocast=autocast,
            counter=counter,
            inpainted=None if image is None or mask is None else (image, mask.to(self.device)),
        )
        run.update_condition()
        # What all moves together from the start to the end is never read again.
        together = num_known == 0 and schedule.num_steps == schedule.steps
        run.cached = cache and self.backbone.causal
        if run.cached and not together:
            run.cache = self.backbone.make_cache(
                run.denoiser.branches * batch, run.context, dtype=autocast or self.dtype
            )
            run.cached = run.cache is not None
        return run

    def unseen(self, config: DecodeConfig, conditions: Collection[str] | None = None) -> list[str]:
        """The settings of a decoding that training never draws, as phrases for a warning.

        Args:
            config: the settings.
            conditions: the names of the conditions that are passed; None for all.
        """
        trained, phrases = self.training_distribution, []
        names = self.conditioning.names
        guidance = config.guidance
        if names and trained.drop_cond == 0:
            if isinstance(guidance, Guidance) and guidance.scale:
                phrases.append(f"guidance {guidance.scale:g} ({_NO_NULL})")
            if conditions is not None and (absent := [n for n in names if n not in conditions]):
                without = "no cond" if len(names) == 1 else f"no cond for {_list(absent)}"
                phrases.append(f"{without} ({_NO_NULL})")
        if trained.drop_cond == 1 and conditions:
            phrases.append("cond (trained: drop_cond=1, always without)")
        # An image of another size has other counts; what a token sees of them is near it.
        resized = self._groups is None and max(trained.num_groups) > 1
        if config.num_groups not in trained.num_groups and not resized:
            counts = sorted(set(trained.num_groups))
            phrases.append(f"num_groups {config.num_groups} (trained: {_list(counts)})")
        if config.num_groups > 1 and config.order not in trained.orders:
            phrases.append(f"order {config.order} (trained: {_list(trained.orders)})")
        if config.num_groups > 1 and config.grouping not in trained.grouping:
            phrases.append(f"grouping {config.grouping} (trained: {_list(trained.grouping)})")
        if config.num_groups > 1 and not trained.trains_overlap(config.overlap):
            phrases.append(f"overlap {config.overlap:g} (trained: {_list(trained.overlap)})")
        if config.context_time > trained.context_noise:
            context = f"context_noise={trained.context_noise:g}"
            phrases.append(f"context_time {config.context_time:g} (trained: {context})")
        return phrases

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the backbone in place; weights keep their names. See `Transformer.compile`."""
        self.backbone.compile(mode=mode)

    def _autocast_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type that the network computes in, if it is not that of the weights."""
        if dtype is None:
            mixed = self.device.type == "cuda" and self.dtype == torch.float32
            return torch.bfloat16 if mixed else None
        allowed = [self.dtype]
        if self.dtype == torch.float32:
            allowed += [torch.bfloat16, torch.float16]
        if not isinstance(dtype, torch.dtype) or dtype not in allowed:
            names = " or ".join(sorted(map(str, allowed)))
            raise UsageError(f"dtype must be {names} with {self.dtype} weights, got {shown(dtype)}")
        return None if dtype == self.dtype else dtype

    def _known(self, image: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image on this device, and which tokens, in raster order, need no decoding."""
        if image is None or mask is None:
            given = "image" if mask is None else "mask"
            raise UsageError(f"image and mask must be given together, got only {given}")
        image = check_image(image, self.layout, unbounded=True).to(self.device, self.state_dtype)
        dense_tensor(mask, "mask", (torch.bool,))
        if mask.shape != image.shape[2:]:
            raise UsageError(
                f"mask must have shape {tuple(image.shape[2:])}, got {tuple(mask.shape)}"
            )
        if not mask.any():
            raise UsageError("mask must be True somewhere, got False everywhere")
        return image, ~touched(self.layout, mask).to(self.device)

    def _num_images(self, num_images: int | None, cond: Any, *parts: Sized | None) -> int:
        given = {len(part) for part in parts if part is not None}
        if num_images is not None:
            given.add(whole_number(num_images, "num_images", maximum=MAX_IMAGES))
        if len(given) > 1:
            raise UsageError(
                "num_images, image, noise and seed must agree on the number of images, got "
                f"{' and '.join(map(str, sorted(given)))}"
            )
        batch = next(iter(given), None)
        if batch is None:
            batch = self.conditioning.count(cond) or 1
        numbers = self.layout.num_tokens * self.layout.token_dim
        if batch * numbers >= 2**31:
            raise UsageError(
                f"num_images must be at most {(2**31 - 1) // numbers} for images of {numbers} "
                f"values, got {batch}"
            )
        return batch

    def _known_first(self, order: Tensor, known: Tensor) -> Tensor:
        """The known tokens, then the others in their order."""
        order = torch.cat([order[known[order]], order[~known[order]]])
        orders = self.training_distribution.orders
        # A permutation is for one size, which may not be this one.
        fitting = [o for o in orders if isinstance(o, str) or len(o) == len(order)]
        trained = [decode_order(name, self.layout.coords) for name in fitting]
        if not any(str(name).startswith("random") for name in orders) and not any(
            torch.equal(order.cpu(), other) for other in trained
        ):
            warn_user(
                "decoding beyond what this checkpoint was trained for: known tokens come first, "
                "and no random order was among those trained"
            )
        return order


_NO_NULL = "trained: drop_cond=0, always with a condition"

_RUN_OPTIONS = (
    "num_images",
    "image_size",
    "seed",
    "start_index",
    "image",
    "mask",
    "noise",
    "cache",
    "dtype",
)


@dataclass
class DecodeRun:
    """One decoding, prepared by `Decoder.prepare` and run once.

    What changes while it runs is the cache, the cost, and the context if a condition is streamed.
    """

    decoder: Decoder
    config: DecodeConfig
    schedule: GroupSchedule
    denoiser: Denoiser
    order: Int[Tensor, " N"]
    samples: PerSampleNoise
    streamed: StreamedConditions
    x_1: Float[Tensor, "B N D"]  # in decode order, known tokens first
    autocast: torch.dtype | None
    counter: "_CostCounter"
    inpainted: tuple[Tensor, Tensor] | None = None
    context: Any = None
    cache: Any = None
    cached: bool = False
    required: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        # How much of each streamed condition the first n tokens depend on, for every n.
        prefixes = self.denoiser.backbone.required_prefix() if self.streamed.pending else {}
        self.required = {
            name: prefix.to(self.order.device)[self.order].cummax(0).values.tolist()
            for name, prefix in prefixes.items()
        }

    def finish(self) -> DecodeOutput:
        """Run to the end."""
        with self._mode():
            states = self.states()
            with self.autocast_context():  # around all calls, so that casts of the weights are kept
                state = next(state for state in states if state.finished > self.x_known)
                first = self.counter.seconds()
                state = deque(chain([state], states), maxlen=1).pop()
        cost = self.counter.cost(seconds_to_first_group=first, cached=self.cached)
        return DecodeOutput(self.image(state.x_t), cost, self.schedule.realised_overlap)

    def frames(self, count: int | None = None, *, preview: bool = True) -> Iterator[Frame]:
        """Run, and yield `count` evenly spaced frames, the last step among them.

        Raises:
            UsageError: at once, if there are fewer steps.
        """
        steps = self.schedule.num_steps
        if count is not None:
            count = whole_number(count, "frames", maximum=steps)
        return self._frames(count or steps, boolean(preview, "preview"))

    def _frames(self, count: int, preview: bool) -> Iterator[Frame]:
        for state in self.steps():
            if self.shows(state, count):
                yield self.frame(state, preview=preview)

    def shows(self, state: State, count: int) -> bool:
        """Whether one of `count` evenly spaced frames shows a state.

        Frame number n shows the first step at which n / count of the decoding is done.
        """
        i, steps = state.step, self.schedule.num_steps
        return i > 0 and i * count // steps > (i - 1) * count // steps

    def steps(self) -> Iterator[State]:
        """Run step by step, the initial state first; a caller may stop after any of them."""
        with self._mode():
            states = self.states()
        for _ in range(self.schedule.num_steps + 1):
            with self._mode(), self.autocast_context():
                state = next(states)
            yield state

    def frame(self, state: State, *, preview: bool = True) -> Frame:
        """What is seen of a state of `steps`, before the next step is made.

        Args:
            state: the last state.
            preview: whether waiting tokens are shown as `E[x | x_t]`, for one more network call;
                otherwise as 0, grey.
        """
        with torch.no_grad():  # tensors of the inference mode could not go into a loss
            image, finished = self.preview(state, waiting=preview), self.finished(state)
        return Frame(image, finished, 1 - state.step / self.schedule.num_steps, self.counter.nfe)

    @property
    def x_known(self) -> int:
        """Leading tokens that are known from the start."""
        return self.schedule.num_known

    def states(self) -> Iterator[State]:
        """The states of the sampler."""
        dim = self.x_1.shape[-1]
        return sample(
            self.denoise,
            self.x_1,
            self.schedule,
            grid=self.denoiser.grid,
            solver=self.config.solver,
            randn=lambda n: self.samples.normal(n, dim).to(self.x_1, non_blocking=True),
        )

    def denoise(self, x_t: Float[Tensor, "B N D"], level: NoiseLevel, span: slice) -> Estimate:
        """The estimate of the moving tokens; all tokens before them become final in the cache."""
        if self.required:
            self._await(span.stop if self.denoiser.backbone.causal else len(self.order))
        estimate = self._evaluate(x_t, level, span)
        if self.cache is not None:
            self.cache.commit(span.start)
        return estimate

    def _evaluate(
        self, x_t: Tensor, level: NoiseLevel, span: slice, *, started: int | None = None
    ) -> Estimate:
        cache = self.cache
        if cache is not None and started is not None:  # a preview, of which nothing is kept
            cache = copy.copy(cache)
            cache.freeze()
        shown = self.denoiser.shown(span, 0 if cache is None else cache.length)
        self.counter.add((shown.stop - shown.start) * self.denoiser.branches)
        return self.denoiser(x_t, level, span, context=self.context, cache=cache, started=started)

    def _await(self, count: int) -> None:
        """Wait for what the first `count` tokens depend on."""
        required = {name: prefix[count - 1] for name, prefix in self.required.items()}
        if self.streamed.advance(required):
            self.update_condition()

    def update_condition(self) -> None:
        """Prepare the backbone for what has arrived of the conditions."""
        values = self.streamed.values
        if self.denoiser.branches == 2:
            values = concat(values, self.streamed.null)
        with torch.no_grad(), torch.autocast(self.order.device.type, enabled=False):
            grouped = self.schedule.num_groups > 1 or self.schedule.num_known > 0
            self.context = self.denoiser.backbone.prepare(self.order, values, grouped=grouped)

    def preview(self, state: State, *, waiting: bool) -> Float[Tensor, "B C H W"]:
        """Finished tokens as they are, the others as `E[x | x_t]`.

        Showing the waiting tokens takes one more call. It does not commit to the cache, so that the
        decoding continues as if the call had not been made. What has not arrived of a streamed
        condition is null in it.
        """
        x, done, num_tokens = state.x, state.finished, len(self.order)
        if waiting and state.started < num_tokens:
            schedule = self.schedule
            groups = range(schedule.moving(state.step).start, schedule.num_groups)
            level = self.denoiser.grid.at(groups, schedule.steps_done(state.step, groups))
            x = x.clone()
            with self.autocast_context():
                span = slice(done, num_tokens)
                x[:, done:] = self._evaluate(state.x_t, level, span, started=state.started).x
        return self.image(torch.cat([state.x_t[:, :done], x[:, done:]], dim=1))

    def image(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Tokens in decode order as images, with the known pixels of an inpainted image."""
        # A copy of all pixels for every frame would be the larger part of a tall image's first row.
        raster = tokens if self._in_order else tokens[:, self._raster]
        image = self.decoder.layout.image(raster)
        if self.inpainted is not None:
            known, mask = self.inpainted
            image = torch.where(mask, image, known)
        return image

    @cached_property
    def _raster(self) -> Int[Tensor, " N"]:
        """For each raster token, its place in the decode order."""
        return self.order.argsort()

    @cached_property
    def _in_order(self) -> bool:
        """Whether tokens are decoded in raster order."""
        return torch.equal(self._raster, torch.arange(len(self.order), device=self.order.device))

    @cached_property
    def last(self) -> Int[Tensor, "H W"]:
        """For each pixel, the last of the tokens that it depends on."""
        return highest(self.decoder.layout, self._raster)

    def finished(self, state: State) -> Bool[Tensor, "H W"]:
        """Where pixels are final."""
        finished = self.last < state.finished
        return finished if self.inpainted is None else finished | ~self.inpainted[1]

    def _mode(self) -> AbstractContextManager[Any]:
        """Inference mode makes small CPU calls faster, but keeps autocast from caching casts."""
        cast = self.autocast or torch.is_autocast_enabled(self.order.device.type)
        return torch.no_grad() if cast else torch.inference_mode()

    def autocast_context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.order.device.type, self.autocast)


class _CostCounter:
    """Counts the calls and tokens of a decoding as they happen, and measures its time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nfe = 0
        self.tokens = 0
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count a call that evaluates so many tokens per image."""
        self.nfe += 1
        self.tokens += tokens

    def seconds(self) -> float:
        """Since the start; on CUDA, after all submitted work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self._start

    def cost(self, *, seconds_to_first_group: float, cached: bool) -> Cost:
        """The cost so far."""
        return Cost(self.nfe, self.tokens, self.seconds(), seconds_to_first_group, cached)


def configured(
    config: DecodeConfig | None, overrides: Mapping[str, Any], *, others: Collection[str] = ()
) -> DecodeConfig:
    """The settings of a decoding.

    Args:
        config: what a user passed; None is `DecodeConfig()`.
        overrides: fields that replace those of `config`.
        others: what else the caller takes, for the error.

    Raises:
        UsageError: if an override is not a field, or a setting is out of range.
    """
    known_names(overrides, [*(f.name for f in fields(DecodeConfig)), *others], "arguments")
    if config is None:
        return DecodeConfig(**overrides)
    instance(config, DecodeConfig, "config", "a DecodeConfig")
    return replace(config, **overrides) if overrides else config


def check_image(
    image: Tensor,
    layout: Layout,
    *,
    unbounded: bool = False,
    check_values: bool = True,
    name: str = "image",
) -> Tensor:
    """The image itself.

    Args:
        image: what a user passed.
        layout: defines the shape.
        unbounded: accept any finite values, such as those of a decoded image or of noise.
        check_values: whether the values are read, for which an accelerator has to be waited.
        name: what the user calls it.

    Raises:
        UsageError: if it is not `[B, C, H, W]` as in the layout, floating point, and in [-1, 1].
    """
    dense_tensor(image, name)
    shape = layout.image_shape
    if image.ndim != 4 or image.shape[1:] != shape or not len(image):
        raise UsageError(
            f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(image.shape)}"
        )
    if not check_values:
        return image
    low, high = (float(end) for end in image.aminmax())
    bound = torch.finfo(torch.float32).max if unbounded else 1.001
    if not -bound <= low <= high <= bound:
        allowed = "finite" if unbounded else "in [-1, 1]"
        raise UsageError(f"{name} must be {allowed}, got {low:.4g} … {high:.4g}")
    return image


def check_generator(generator: Any, *, shard: Shard) -> None:
    """Refuse what is not a generator of the CPU, or none where processes must draw the same.

    Raises:
        UsageError: if it is something else.
    """
    instance(shard, Shard, "shard", "a Shard")
    if generator is None:
        if shard.count > 1:
            raise UsageError(
                "generator must be given beside shard, seeded alike in every process, got None"
            )
        return
    instance(generator, torch.Generator, "generator", "a torch.Generator")
    if generator.device.type != "cpu":
        raise UsageError(f"generator must be one of the CPU, got one of {generator.device}")


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _randn_like(
    x: Float[Tensor, "B N D"], generator: torch.Generator | None, *, shard: Shard
) -> Float[Tensor, "B N D"]:
    """Unit noise; with a generator the same for an example whichever process holds it."""
    if generator is None:
        return torch.randn_like(x)
    seeds = shard.rows(torch.randint(2**62, (len(x) * shard.count,), generator=generator))
    own, eps = torch.Generator(x.device), torch.empty_like(x)
    for row, seed in zip(eps, seeds.tolist(), strict=True):
        row.normal_(generator=own.manual_seed(seed))
    return eps
