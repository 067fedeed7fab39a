"""`LitModel`: a decoder, a tokenizer or a prior under Lightning's trainer.

The hyperparameters in a checkpoint are plain containers, so it loads with `weights_only=True`. With
`AveragedWeights` among the callbacks, its `state_dict` holds the averaged weights.
`rolldiff.hub.read_checkpoint` reads the model from it.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rolldiff.decoder import Decoder
from rolldiff.device import compile_in_place
from rolldiff.diffusion.process import Shard, seed_sequence
from rolldiff.errors import UsageError, reason, shown, whole_number
from rolldiff.hub import Pretrained
from rolldiff.tokenizer import Prior, Tokenizer
from rolldiff.training.sharding import is_sharded, shard, whole

__all__ = [
    "LitDecoder",
    "LitModel",
    "LitPrior",
    "LitTokenizer",
    "freeze_parameters",
    "images_per_batch",
]


def images_per_batch(batch: Sequence[Tensor]) -> int:
    """The number of images in a batch `(image, label)`."""
    return len(batch[0])


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take parameters out of the training.

    Args:
        model: whose parameters are frozen, in place.
        patterns: names of parameters, or of modules for all that they hold, as in
            `model.named_parameters()`. `*` stands for any text, as in `*.mlp`.

    Raises:
        UsageError: if a pattern names nothing, or no parameter is left; nothing is frozen then.
    """
    if isinstance(patterns, str) or not all(isinstance(each, str) for each in patterns):
        raise UsageError(f"freeze must be a list of names of parameters, got {shown(patterns)}")
    named = dict(model.named_parameters())
    frozen = set()
    for pattern in patterns:
        found = {n for n in named if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not found:
            raise UsageError(
                f"freeze must name parameters such as {next(iter(named))}, or modules of them, got "
                f"{shown(pattern)}"
            )
        frozen |= found
    if frozen and frozen == set(named):
        raise UsageError(f"freeze must leave a parameter to train, got {shown(patterns)}")
    for name in frozen:
        named[name].requires_grad_(False)


class LitModel(L.LightningModule, ABC):
    """Training of a model with an optimizer, warm-up, and a constant or cosine learning rate.

    Args:
        model: the model, or its configuration.
        optimizer: parameters to optimizer; by default AdamW with its defaults.
        warmup_steps: steps in which the learning rate rises from 0.
        seed: of all random draws of the loss. Each batch has its own generator, so a resumed
            training draws what an uninterrupted one draws, and so do several processes together.
        decay: the learning rate after the warm-up, until the trainer's `max_steps` (or `max_time`,
            if that comes first).
        freeze: names of parameters or modules that are not trained, see `freeze_parameters`. What
            else needs no gradient, such as the layers below an adapter, is not trained either.

    Raises:
        UsageError: if an argument is out of range, or the model is of another kind.
        FloatingPointError: in training, if the loss is not finite.
    """

    kind: ClassVar[type[Pretrained]]
    model: Pretrained
    _plain: Pretrained  # a copy from before it was sharded

    def __init__(
        self,
        model: Pretrained | dict[str, Any],
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        warmup_steps: int = 100,
        decay: Literal["constant", "cosine"] = "cosine",
        seed: int = 0,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(model, dict):  # from a checkpoint's hyperparameters
            model = self.kind.from_config(model)
        if not isinstance(model, self.kind):
            raise UsageError(f"model must be a {self.kind.__name__}, got a {type(model).__name__}")
        if decay not in ("constant", "cosine"):
            raise UsageError(f"decay must be constant or cosine, got {decay!r}")
        warmup_steps = whole_number(warmup_steps, "warmup_steps", minimum=0)
        self._last_loss: Tensor | None = None
        # Not to the loggers, which get the whole configuration.
        self.save_hyperparameters(
            {"model": model.to_config(), "warmup_steps": warmup_steps, "decay": decay},
            logger=False,
        )
        freeze_parameters(model, freeze)
        self.model = model
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.seed = whole_number(seed, "seed", minimum=0)

    @abstractmethod
    def loss(self, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """The loss of a batch.

        Args:
            batch: images `[B, C, H, W]` and labels `[B]`.
            generator: a CPU generator for all random draws; the same in all processes.
        """

    def configure_model(self) -> None:
        """Shard the model, if the strategy asks for it."""
        if self.device_mesh is not None and not is_sharded(self.model):
            # Not a submodule: it is what the weights are gathered in.
            object.__setattr__(self, "_plain", copy.deepcopy(self.model))
            shard(self.model, self.device_mesh)

    def whole_model(self) -> Pretrained | None:
        """The model with its present weights; a sharded one as a copy, in the main process."""
        return whole(self.model, self._plain) if is_sharded(self.model) else self.model

    def unsharded(self) -> Pretrained:
        """A model like the sharded one, before its training."""
        return self._plain

    @property
    def shard(self) -> Shard:
        """Which part of the global batch this process holds."""
        return Shard(self.global_rank, self.trainer.world_size)

    def compile_model(self) -> None:
        """Compile the model in place."""
        compile_in_place(self.model)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch, self._batch_generator())
        self._last_loss = loss.detach()
        # Reading a value waits for an accelerator, so it is read where it is free or logged.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss.device.type == "cpu" or (every and self.global_step % every == 0):
            self._refuse_infinite_loss()
        # The mean of all processes, which waits for them, only where it is written.
        logged = bool(every) and (self.global_step + 1) % every == 0
        self.log("loss", loss, prog_bar=True, sync_dist=logged and self.shard.count > 1)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_infinite_loss()

    def _refuse_infinite_loss(self) -> None:
        if self._last_loss is not None and not math.isfinite(loss := float(self._last_loss)):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.global_step}; the last checkpoint is kept"
            )

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        # The same noise and times in every validation, so that they can be compared.
        generator = torch.Generator().manual_seed(batch_idx)
        self.log(
            "val_loss",
            self.loss(batch, generator),
            batch_size=images_per_batch(batch),
            sync_dist=self.shard.count > 1,
        )

    def configure_optimizers(self) -> Any:
        try:
            # All, so that states have the same numbers with sharding; without a gradient, a
            # parameter has no state and no step.
            optimizer = (self.optimizer or AdamW)(self.parameters())
        except (TypeError, ValueError, RuntimeError) as error:  # an argument, or no fused kernel
            raise UsageError(f"optimizer must be one that fits: {reason(error)}") from error
        clipped = self.trainer.gradient_clip_val
        if clipped and _is_fused(optimizer) and self.trainer.precision == "16-mixed":
            raise UsageError(
                "optimizer.fused must be false with trainer.precision=16-mixed and gradient "
                "clipping, because a fused optimizer rescales the gradients by itself, got true"
            )
        # A lambda, because LambdaLR would save a bound method, and with it the whole module.
        schedule = LambdaLR(optimizer, lambda step: self.learning_rate_factor(step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimizer under mixed precision, because that
        # optimizer undoes the scaling of the gradients by itself. In bfloat16 nothing is scaled.
        if not (_is_fused(optimizer) and self.trainer.precision == "bf16-mixed"):
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)

    def learning_rate_factor(self, step: int) -> float:
        """The learning rate at a step, as a fraction of the optimizer's."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant":
            return warmup
        return warmup * (1 + math.cos(math.pi * self._fraction_done(step))) / 2

    def _fraction_done(self, step: int) -> float:
        """The finished fraction of the training, by steps or by the trainer's time limit."""
        done = step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
                spent = callback.time_elapsed()
                done = max(done, spent / max(spent + left, 1e-9))
        return min(done, 1.0)

    def _batch_generator(self) -> torch.Generator:
        """A generator that depends on the seed and the number of the batch."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        sequence = seed_sequence(self.seed, batches)
        state = sequence.generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _is_fused(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class LitDecoder(LitModel):
    """Training of a `Decoder`, given class labels if it has any."""

    kind = Decoder
    model: Decoder

    def loss(self, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        image, label = batch
        cond = label if self.model.conditioning.num_classes else None
        return self.model(image, cond, generator=generator, shard=self.shard)


class LitTokenizer(LitModel):
    """Training of a `Tokenizer` on images alone."""

    kind = Tokenizer
    model: Tokenizer

    def loss(self, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        return self.model(batch[0], generator=generator, shard=self.shard)


class LitPrior(LitModel):
    """Training of a `Prior` over the codes of a frozen tokenizer.

    The tokenizer is not a registered submodule: it is neither trained nor saved.

    Args:
        model: the prior, its configuration, or a function from `num_tokens` and `codebook_size`,
            which the tokenizer determines, to the prior.
        tokenizer: the tokenizer, or the run folder of its training.
        **settings: see `LitModel`.

    Raises:
        UsageError: if the prior and the tokenizer have different codes.
    """

    kind = Prior
    model: Prior
    tokenizer: Tokenizer

    def __init__(
        self,
        model: Prior | dict[str, Any] | Callable[..., Prior],
        *,
        tokenizer: Tokenizer | str | Path,
        **settings: Any,
    ) -> None:
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_pretrained(tokenizer)
        codes = {
            "num_tokens": tokenizer.num_tokens,
            "codebook_size": tokenizer.codebook_size,
        }
        if not isinstance(model, Prior | dict):
            model = model(**codes)
        super().__init__(model, **settings)
        if any(getattr(self.model, name) != value for name, value in codes.items()):
            raise UsageError(
                "prior and tokenizer must have the same codes, got "
                f"{self.model.num_tokens} codes of {self.model.codebook_size} and "
                f"{tokenizer.num_tokens} of {tokenizer.codebook_size}"
            )
        # nn.Module's own __setattr__ would register it.
        object.__setattr__(self, "tokenizer", tokenizer.eval().requires_grad_(False))

    def loss(self, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        image, label = batch
        codes = self.tokenizer.to(image.device).encode(image)
        cond = label if self.model.conditioning.num_classes else None
        return self.model(codes, cond, generator=generator, shard=self.shard)

    def compile_model(self) -> None:
        raise UsageError("compile must be false for a prior, which has no compiled path, got true")
