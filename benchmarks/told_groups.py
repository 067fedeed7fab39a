"""Training and decoding with a network that is told num_groups, to see whether that helps.

export PYTHONPATH=benchmarks
rolldiff train decoder._target_=told_groups.Told nn._target_=told_groups.ToldTransformer …
rolldiff bench ckpt=RUN trust=told_groups. …
"""

from typing import Any

import torch
from torch import Tensor, nn

from rolldiff import DecodeConfig, Decoder
from rolldiff.conditioning import Masked
from rolldiff.decoder import DecodeRun
from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.timesteps import Draw
from rolldiff.nn.transformer import Transformer


class ToldTransformer(Transformer):
    """Its time embedding depends on the number of groups, which its decoder sets."""

    def __init__(self, layout: Layout, **sizes: Any) -> None:
        super().__init__(layout, **sizes)
        self.groups_embed = nn.Embedding(layout.num_tokens + 1, self.time_embed.out.out_features)
        nn.init.zeros_(self.groups_embed.weight)
        self.num_groups: Tensor | None = None

    def embed_time(self, t: Tensor) -> Tensor:
        return super().embed_time(t) + self.groups_embed(self.num_groups)  # [] or [B, 1]


class Told(Decoder):
    """A decoder that tells its network the number of groups."""

    def _predict(
        self, x: Tensor, x_t: Tensor, draw: Draw, *, order: Tensor, given: dict[str, Masked]
    ) -> Tensor:
        count = draw.group.amax(1) + 1  # [M]
        rows = count.repeat_interleave(len(x) // len(count)).to(x.device)
        self.backbone.num_groups = rows[:, None]
        return super()._predict(x, x_t, draw, order=order, given=given)

    def prepare(self, cond: Any, config: DecodeConfig, **options: Any) -> DecodeRun:
        self.backbone.num_groups = torch.tensor(config.num_groups)
        return super().prepare(cond, config, **options)
