"""Callbacks of a training run."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from rolldiff.decoder import Decoder
from rolldiff.evaluation.images import labelled_rows
from rolldiff.lit import LitModel

__all__ = ["SampleGrid"]


class SampleGrid(Callback):
    """Draws a row of samples for each `num_groups` at every validation, from the same noise.

    With averaged weights, put it before the callback that averages: that one puts them in place
    when the validation begins and takes them out when it ends, callback after callback.

    Args:
        folder: where `step-000000.png` goes.
        num_groups: the group counts to show.
        steps: solver steps a group.
        count: images in a row; labels, if there are any, go round.
    """

    def __init__(
        self, folder: str, *, num_groups: Sequence[int], steps: int = 8, count: int = 10
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.num_groups = tuple(num_groups)
        self.steps = steps
        self.count = count

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LitModel)
        decoder = pl_module.model
        assert isinstance(decoder, Decoder)
        classes = decoder.conditioning.num_classes
        cond = torch.arange(self.count) % classes if classes else None
        page = {
            f"num_groups {groups}": decoder.decode(
                cond, num_images=self.count, num_groups=groups, steps=self.steps, seed=0
            ).image
            for groups in self.num_groups
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        labelled_rows(page).save(self.folder / f"step-{trainer.global_step:06d}.png")
