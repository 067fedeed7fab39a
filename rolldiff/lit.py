"""`LitModel`: a decoder, a tokenizer or a prior under Lightning's trainer.

A checkpoint's hyperparameters are plain containers, so it loads with `weights_only=True`; with
`EMAWeightAveraging` among the callbacks its `state_dict` holds the averaged weights.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rolldiff.conditioning import Conditioning
from rolldiff.decoder import Decoder
from rolldiff.errors import reason
from rolldiff.hub import build

__all__ = ["LitModel", "Trainable", "images_in", "load"]


@runtime_checkable
class Trainable(Protocol):
    """A module that can be trained: it knows its loss and its configuration."""

    @property
    def conditioning(self) -> Conditioning: ...

    def loss(
        self, image: Tensor, cond: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor: ...

    def to_config(self) -> dict[str, Any]: ...

    def save_pretrained(self, folder: str | Path) -> None: ...

    def compile(self) -> None: ...


def images_in(batch: Sequence[Tensor]) -> int:
    """How many images a batch has."""
    return len(batch[0])


class LitModel(L.LightningModule):
    """Training of a model: its loss, an optimizer, warm-up, then a constant or a cosine.

    Args:
        model: what is trained, or its configuration.
        optimizer: parameters to optimizer; AdamW with its defaults if there is none.
        warmup_steps: steps in which the learning rate rises from 0.
        seed: of all that the loss draws; a batch draws the same whether the training ran through
            or was resumed.
        decay: what follows until the trainer's `max_steps` (or `max_time`, where that ends first).

    Raises:
        FloatingPointError: while training, if the loss is not finite.
    """

    def __init__(
        self,
        model: Trainable | dict[str, Any],
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        warmup_steps: int = 100,
        decay: Literal["constant", "cosine"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(model, dict):
            model = _built(model)
        if decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be constant or cosine, got {decay!r}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
        self.flops_per_batch = None  # for Lightning's monitor: its peak rates are not measured ones
        self.save_hyperparameters(
            {"model": model.to_config(), "warmup_steps": warmup_steps, "decay": decay}
        )
        self.model = model
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.seed = seed

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch, self._drawn_for_batch())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} at step {self.global_step}; "
                "the last checkpoint is kept"
            )
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        # The same noise and times each time, so that two validations can be compared.
        generator = torch.Generator().manual_seed(batch_idx)
        self.log("val_loss", self._loss(batch, generator), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = (self.optimizer or AdamW)(self.parameters())
        schedule = LambdaLR(optimizer, lambda step: self._rate(step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _drawn_for_batch(self) -> torch.Generator:
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        entropy = (self.seed, batches, self.global_rank)
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _loss(self, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        image, label = batch
        cond = label if self.model.conditioning.num_classes else None
        return self.model.loss(image, cond, generator=generator)

    def _rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant":
            return rising
        return rising * (1 + math.cos(math.pi * self._progress(step))) / 2

    def _progress(self, step: int) -> float:
        """How much of the training is over, by steps or by the trainer's time limit."""
        done = step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
                spent = callback.time_elapsed()
                done = max(done, spent / max(spent + left, 1e-9))
        return min(done, 1.0)


def _built(config: dict[str, Any]) -> Trainable:
    model = build(config)
    if not isinstance(model, Trainable):
        raise ValueError(f"config must describe a model, got {config.get('_target_')}")
    return model


def load(path: str | Path) -> Decoder:
    """A decoder from a run folder, or from a checkpoint of `LitModel`.

    Raises:
        ValueError: if there is nothing there, or it is damaged or not one of ours.
    """
    path = Path(path)
    if path.is_dir():
        return Decoder.from_pretrained(path)
    if not path.is_file():
        raise ValueError(
            f"ckpt must be a run folder or a checkpoint, got {path}, which does not exist"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage provokes
        raise ValueError(f"ckpt {path} is damaged or no checkpoint: {reason(error)}") from error
    try:
        config = checkpoint["hyper_parameters"]["model"]
        weights = checkpoint["state_dict"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"ckpt {path} is not a checkpoint of this library") from error
    decoder = Decoder.from_config(config)
    try:
        LitModel(decoder).load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"ckpt {path}: weights and configuration disagree") from error
    return decoder.eval()
