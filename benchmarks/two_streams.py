"""Training with a clean copy beside the noisy windows, to compare with the library's one stream.

Every noisy token sees its own window and the clean copies of all earlier windows: the state that a
decoding meets. Each of them carries a loss. The clean copy sees itself up to the own group. These
are up to 2 N tokens, and N for a single window. Whatever else is drawn is that of the library,
without its clean context. The decoder decodes as any other.

    PYTHONPATH=benchmarks rolldiff train decoder._target_=two_streams.TwoStreams …
    PYTHONPATH=benchmarks rolldiff bench ckpt=RUN trust=two_streams. …
"""

import torch
from torch import Tensor

from rolldiff import Decoder
from rolldiff.conditioning import Masked
from rolldiff.diffusion.timesteps import Draw


class TwoStreams(Decoder):
    """A decoder whose training shows a clean copy of the image beside the noisy one."""

    def _predict(
        self, x: Tensor, x_t: Tensor, draw: Draw, *, order: Tensor, given: dict[str, Masked]
    ) -> Tensor:
        single = draw.window.amax(1) == 0  # [M]
        size, n = len(x) // len(single), x.shape[1]
        y = torch.empty_like(x)
        for is_single in (True, False):
            slices = single == is_single
            if not slices.any():
                continue
            rows = slices.repeat_interleave(size)
            shown, t, places, mask = x_t[rows], draw.t[rows], order[rows], None
            if not is_single:
                shown = torch.cat([x[rows], shown], dim=1)
                t = torch.cat([torch.zeros_like(t), t], dim=1)
                places = places.repeat(1, 2)
                mask = two_streams_mask(draw.group[slices], draw.window[slices])
            part = {
                name: cond._replace(value=cond.value[rows], mask=cond.mask[rows])
                for name, cond in given.items()
            }
            context = self.backbone.prepare(places, part)
            time = self.backbone.embed_time(t)
            y[rows] = self.backbone(shown, time, context, mask=mask)[:, -n:]
        return y


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
