"""A small convolutional encoder: images to a grid of vectors."""

from collections.abc import Sequence
from math import log2

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """Images `[B, C, H, W]` to `[B, h, w, channels]`, each halving by a strided convolution.

    Args:
        image_size: height and width in pixels, or one number for a square image.
        in_channels: `C`.
        factor: pixels a cell, in each direction; a power of 2. `h = H / factor`.
        channels: numbers a cell.
        width: channels inside.
        depth: residual blocks at every size.

    Raises:
        ValueError: if `factor` is no power of 2 or does not divide the image.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        in_channels: int = 3,
        factor: int = 2,
        channels: int = 3,
        width: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if factor < 1 or factor & (factor - 1) or any(side % factor for side in size):
            raise ValueError(
                f"factor must be a power of 2 that divides the image {size}, got {factor}"
            )
        self.config = {
            "image_size": list(size),
            "in_channels": in_channels,
            "factor": factor,
            "channels": channels,
            "width": width,
            "depth": depth,
        }
        self.grid = (size[0] // factor, size[1] // factor)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
        for _ in range(int(log2(factor))):
            layers += [_Residual(width) for _ in range(depth)]
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        layers += [_Residual(width) for _ in range(depth)]
        layers += [nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, channels, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w channels"]:
        return self.layers(image).movedim(1, -1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
