"""The networks and loops that the card of the engine times."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rolldiff import Decoder, Euler, Grouping, Patches, RollingSchedule, Training, Transformer
from rolldiff.conditioning import Conditions
from rolldiff.cost import Meter
from rolldiff.denoiser import Denoiser
from rolldiff.nn.blocks import apart
from rolldiff.prediction import Estimate, solve
from rolldiff.sampler import sample
from rolldiff.timetable import Timetable


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
        context = backbone.prepare(order, torch.zeros_like(order), batch=batch, dtype=dtype)
        for i in range(steps):
            x_t = x_t - backbone(x_t, time[i : i + 1], context) / steps
        return x_t

    return loop


def products(model: Decoder, num_groups: int, steps: int) -> Callable[[], None]:
    """The products with the blocks' weights in the calls of a decode of one image, nothing else.

    No decode that makes these calls is faster, whatever else it leaves out.
    """
    calls: list[int] = []  # the tokens that each shows
    hook = model.backbone.register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[1]))
    model.decode(num_groups=num_groups, steps=steps, seed=0)
    hook.remove()
    weights = []
    for block in model.backbone.blocks:
        up = apart(block.up.weight) if num_groups > 1 else None
        weights += [block.qkv.weight, block.out.weight, block.up.weight if up is None else up]
        weights.append(block.down.weight)
    rows = {(n, len(w)): torch.randn(n, len(w)) for n in set(calls) for w in weights}

    @torch.inference_mode()
    def loop() -> None:
        for n in calls:
            for weight in weights:
                torch.mm(rows[n, len(weight)], weight)

    return loop


class Pointwise(nn.Module):
    """A network that costs nothing, to see what the loop around it does."""

    causal = True
    condition = Conditions()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def embed_time(self, t: Tensor) -> Tensor:
        return t[..., None]

    def needs(self) -> dict[str, Tensor]:
        return {}

    def arrive(self, context: Any, cond: dict[str, Any]) -> None:
        pass  # it is told nothing

    def prepare(self, *place: Any, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(cached=None)

    def forward(self, x_t: Tensor, time: Tensor, context: Any, start: int = 0) -> Tensor:
        return self.linear(x_t) + time


def every_token(model: Decoder, num_groups: int, batch: int, steps: int) -> Callable[[], Tensor]:
    """Groups with all tokens in every call, those that wait too: no thought, no cache."""
    layout, num_tokens = model.layout, model.layout.num_tokens
    schedule, order = RollingSchedule(num_groups), torch.arange(num_tokens, device=model.device)
    group = Grouping(num_tokens, num_groups).group.to(model.device)
    meter = Meter(model.device)
    denoiser = Denoiser(model.backbone, model.noise, model.prediction, meter)

    @torch.no_grad()
    def decode() -> Tensor:
        noise = torch.randn(batch, num_tokens, layout.token_dim, device=model.device)
        context = model.backbone.prepare(order, group)

        def denoise(x_t: Tensor, timetable: Timetable, span: tuple[int, int]) -> Estimate:
            time = timetable.embedded(timetable.level(0, num_tokens))
            y = model.backbone(x_t, time, context)
            inverse = timetable.level(*span).inverse
            return solve(y[:, slice(*span)], x_t[:, slice(*span)], inverse)

        timetable = denoiser.timetable(schedule, steps, num_tokens, like=noise)
        states = sample(
            denoise, noise, timetable=timetable, step=Euler(), draw=lambda n: noise[:, :n]
        )
        return deque(states, maxlen=1).pop().x_t

    return decode
