"""Time of a training step, relative to a plain diffusion transformer.

    python benchmarks/training_step.py

Both have the same width, depth and heads, and see the same images; the plain one (Peebles and Xie
2023) has one time per image and no groups. The ratios are medians over interleaved rounds.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from engine_rounds import Stopwatch
from torch import Tensor, nn

from rolldiff import Decoder, Training

GROUPS = (1, 2, 4, 8, 16)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        parts = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x = torch.layer_norm(h, h.shape[-1:]) * (1 + scale_1) + shift_1
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        h = h + gate_1 * self.out(x.transpose(1, 2).flatten(2))
        x = torch.layer_norm(h, h.shape[-1:]) * (1 + scale_2) + shift_2
        return h + gate_2 * self.mlp(x)


class Plain(nn.Module):
    """A diffusion transformer with a time per image, trained on the velocity."""

    def __init__(self, tokens: int, dim: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(dim, width), nn.Linear(width, dim)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))

    def loss(self, x: Tensor) -> Tensor:
        t, eps = torch.rand(len(x)), torch.randn_like(x)
        x_t = x.lerp(eps, t[:, None, None])
        angle = t[:, None] * (torch.pi * 2.0 ** torch.linspace(-1, 6, 32))
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))
        h = self.embed(x_t) + self.place
        for block in self.blocks:
            h = block(h, time)
        y = self.head(torch.layer_norm(h, h.shape[-1:]))
        return (y - (eps - x)).square().mean()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in {"side": 16, "width": 256, "depth": 6, "heads": 4, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    ask = parser.parse_args(argv)
    torch.set_num_threads(ask.threads)
    torch.manual_seed(0)
    sizes = {"width": ask.width, "depth": ask.depth, "heads": ask.heads}
    image = torch.rand(ask.batch, 3, ask.side, ask.side) * 2 - 1
    tokens = image.flatten(2).transpose(1, 2).contiguous()
    plain = Plain(ask.side**2, 3, **sizes)

    def ours(training: Training) -> Decoder:
        return Decoder.build(
            image_size=ask.side, patch=1, prediction="velocity", training=training, **sizes
        )

    models = {
        "num_groups 1": ours(Training()),
        "the default's mix": ours(Training(GROUPS)),
    }

    cases = {"plain": lambda: plain.loss(tokens).backward()} | {
        name: lambda model=model: model.loss(image).backward() for name, model in models.items()
    }
    rounds = Stopwatch().time_rounds(cases, ask.rounds, device=torch.device("cpu"))
    print(f"{ask.side**2} tokens, width {ask.width}, depth {ask.depth}, batch {ask.batch}")
    for name in models:
        ratios = [a / b for a, b in zip(rounds[name], rounds["plain"], strict=True)]
        low, high = min(ratios), max(ratios)
        print(f"{name}: {statistics.median(ratios):.3f} ({low:.2f} … {high:.2f}) of a plain DiT")


if __name__ == "__main__":
    main()
