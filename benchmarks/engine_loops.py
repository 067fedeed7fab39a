"""The networks and loops that the results of the engine times."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rolldiff import DecodeConfig, Decoder, Patches, Training, Transformer
from rolldiff.conditioning import Conditioning
from rolldiff.diffusion.process import Estimate, to_x_eps
from rolldiff.diffusion.sampler import NoiseLevel, TimeGrid, sample
from rolldiff.diffusion.schedule import Visibility, attention_mask
from rolldiff.nn.denoiser import Backbone
from rolldiff.nn.transformer import ColumnLinear


def decoder(side: int, width: int, depth: int, heads: int, device: torch.device) -> Decoder:
    """Random weights that let every token matter to every other."""
    torch.manual_seed(0)
    layout = Patches(side, channels=3, patch=1)
    model = Decoder(
        layout,
        Transformer(layout, width=width, depth=depth, heads=heads),
        prediction="velocity",
        training=Training(num_groups=[g for g in (1, 4, 16, 64, 256, 1024) if g <= side**2]),
    )
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model.to(device).eval()


def bare_loop(model: Decoder, batch: int, steps: int) -> Callable[[], Tensor]:
    """Euler's rule around the network of a velocity, and nothing else."""
    backbone, layout, device = model.backbone, model.layout, model.device
    noise = torch.randn(batch, layout.num_tokens, layout.token_dim, device=device)
    order = torch.arange(layout.num_tokens, device=device)
    times = torch.linspace(1, 0, steps + 1, device=device)

    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else None

    @torch.inference_mode()
    @torch.autocast(device.type, dtype, enabled=cuda)
    def loop() -> Tensor:
        x_t, time = noise, backbone.embed_time(times)
        context = backbone.prepare(order)
        for i in range(steps):
            x_t = x_t - backbone(x_t, time[i : i + 1], context) / steps
        return x_t

    return loop


def products(model: Decoder, num_groups: int, steps: int) -> Callable[[], None]:
    """The matmuls with the blocks' weights in the calls of decoding one image, and nothing else.

    No decoding that makes these calls is faster.
    """
    calls: list[int] = []  # tokens per call
    hook = model.backbone.register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[1]))
    model.decode(num_groups=num_groups, steps=steps, seed=0)
    hook.remove()
    weights = []  # [in, out]
    for block in model.backbone.blocks:
        layers = [block.attn.qkv, block.attn.out, block.mlp.up, block.mlp.down]
        if num_groups > 1:
            weights += [ColumnLinear(layer).weight.t() for layer in layers]
        else:
            weights += [layer.weight.t() for layer in layers]
    rows = {(n, len(w)): torch.randn(n, len(w)) for n in set(calls) for w in weights}

    @torch.inference_mode()
    def loop() -> None:
        for n in calls:
            for weight in weights:
                torch.mm(rows[n, len(weight)], weight)

    return loop


class Pointwise(Backbone):
    """A network that costs nothing, to see what the loop around it does."""

    causal = True
    conditioning = Conditioning()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def embed_time(self, t: Tensor) -> Tensor:
        return t[..., None]

    def prepare(self, *_: Any, grouped: bool = True) -> None:
        return None

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        context: None,
        *,
        start: int = 0,
        mask: Tensor | None = None,
        cache: None = None,
    ) -> Tensor:
        return self.linear(x_t) + time


def every_token(model: Decoder, num_groups: int, *, batch: int, steps: int) -> Callable[[], Tensor]:
    """Groups with all tokens in every call, waiting ones too, and no cache."""
    layout, num_tokens = model.layout, model.layout.num_tokens
    config = DecodeConfig(num_groups=num_groups, steps=steps)
    schedule = config.schedule(layout)
    order = torch.arange(num_tokens, device=model.device)

    @torch.no_grad()
    def decode() -> Tensor:
        noise = torch.randn(batch, num_tokens, layout.token_dim, device=model.device)
        context = model.backbone.prepare(order)
        embed = model.backbone.embed_time
        grid = TimeGrid(schedule, model.noise, model.prediction, embed=embed, like=noise)
        clean, pure = grid.data_end.embedding, grid.noise_end.embedding

        def denoise(x_t: Tensor, level: NoiseLevel, span: slice) -> Estimate:
            size, count = clean.shape[-1], span.stop - span.start
            moving = level.embedding.expand(count, size)
            before = clean.expand(span.start, size)
            after = pure.expand(num_tokens - span.stop, size)
            block = Visibility(schedule, span.start, span.stop).blocks
            mask = attention_mask(block, block).to(model.device)
            y = model.backbone(x_t, torch.cat([before, moving, after]), context, mask=mask)
            return to_x_eps(y[:, span], x_t[:, span], level.inverse)

        states = sample(denoise, noise, schedule, grid=grid, randn=lambda n: noise[:, :n])
        return deque(states, maxlen=1).pop().x_t

    return decode
