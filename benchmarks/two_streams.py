"""Training with a clean copy beside the noisy windows, to compare with the library's one stream.

Every noisy token sees its own window and the clean copies of all earlier windows: the state that a
decoding meets. Each of them carries a loss. The clean copy sees itself up to the own group. These
are up to 2 N tokens, and N for a single window. Whatever else is drawn is that of the library,
without its clean context. The decoder decodes as any other.

    PYTHONPATH=benchmarks rolldiff train decoder._target_=two_streams.TwoStreams …
    PYTHONPATH=benchmarks rolldiff bench ckpt=RUN trust=two_streams. …
"""

from typing import Any

import torch
from torch import Tensor

from rolldiff import Decoder
from rolldiff.decoder import check_image
from rolldiff.diffusion.process import denoising_loss


class TwoStreams(Decoder):
    """A decoder whose loss shows a clean copy of the image beside the noisy one."""

    def loss(
        self, image: Tensor, cond: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        image = check_image(image, self.layout)
        trained = self.training_distribution
        x = self.layout.tokens(image).to(self.state_dtype)
        given = self.conditioning.validate(cond, len(x), x.device)
        given = self.conditioning.drop(given, trained.drop_cond, generator)
        draw = trained.sample(len(x), self._groups, generator)
        order = self.orders[draw.order]
        x = x.gather(1, order[..., None].expand_as(x))
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x_t = self.noise.add_noise(x, eps, draw.t.to(x))
        single = draw.window.amax(1) == 0  # [M]
        size = len(x) // len(single)
        y = torch.empty_like(x)
        for is_single in (True, False):
            slices = single == is_single
            if not slices.any():
                continue
            rows = slices.repeat_interleave(size)
            part = {
                name: cond._replace(value=cond.value[rows], mask=cond.mask[rows])
                for name, cond in given.items()
            }
            if is_single:
                context = self.backbone.prepare(order[rows], part)
                time = self.backbone.embed_time(draw.t[rows])
                y[rows] = self.backbone(x_t[rows], time, context)
                continue
            n = x.shape[1]
            context = self.backbone.prepare(order[rows].repeat(1, 2), part)
            t = torch.cat([torch.zeros_like(draw.t[rows]), draw.t[rows]], dim=1)
            both = torch.cat([x[rows], x_t[rows]], dim=1)
            mask = two_streams_mask(draw.group[slices], draw.window[slices])
            y[rows] = self.backbone(both, self.backbone.embed_time(t), context, mask=mask)[:, n:]
        return denoising_loss(
            y,
            x,
            eps,
            t=draw.t.to(x),
            moving=torch.ones_like(draw.t, dtype=torch.bool),
            noise=self.noise,
            prediction=self.prediction,
            space=self.loss_space,
        )


def two_streams_mask(group: Tensor, window: Tensor) -> Tensor:
    """`[M, 2N, 2N]`, clean tokens first."""
    clean_to_clean = group[:, :, None] >= group[:, None]
    to_clean = window[:, :, None] > window[:, None]
    to_noisy = window[:, :, None] == window[:, None]
    nothing = torch.zeros_like(to_noisy)
    sees = torch.cat(
        [torch.cat([clean_to_clean, nothing], 2), torch.cat([to_clean, to_noisy], 2)], 1
    )
    return torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
