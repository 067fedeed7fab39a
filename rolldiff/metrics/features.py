"""What a distance sees of an image: feature extractors.

An extractor is a module that takes images `[B, C, H, W]`, floats in about [-1, 1], and returns
features `[B, F]`. It is frozen, in evaluation mode, and computes in float32 without gradients and
without autocast, whoever calls it. It has a `name`, after which the distance under it is called
`fd_<name>`, and a `hash` of its weights: two distances are comparable where both are the same.
"""

import hashlib
import re

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Extractor", "Pixels", "described", "short_hash"]


class Extractor(nn.Module):
    """A frozen network that turns images into features. Children define `features`.

    Attributes:
        name: lower-case letters, digits and underscores.
        channels: the channels `C` an image must have; None takes any.
    """

    name: str
    channels: int | None = None

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of a SHA-256 over names, shapes and bytes of the weights.

        Without weights it is over the name.
        """
        return short_hash(self.state_dict(), name=self.name)

    @property
    def distance(self) -> str:
        """What the Fréchet distance of these features is called."""
        return f"fd_{self.name}"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The features themselves, of images that were checked."""
        raise NotImplementedError

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of images.

        Raises:
            ValueError: if the images have the wrong shape, or what comes out is not `[B, F]`.
        """
        self.check(image)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            features = self.features(image.float())
        if not isinstance(features, Tensor) or features.shape[:-1] != image.shape[:1]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(f"features must be a tensor of shape (B, F), got {found}")
        return features

    def check(self, image: Tensor) -> None:
        """Refuse images that are not `[B, channels, H, W]`.

        Raises:
            ValueError: if they are not.
        """
        wanted = image.shape[1:2] if self.channels is None else (self.channels,)
        if image.ndim != 4 or image.shape[1:2] != wanted:
            channels = "C" if self.channels is None else self.channels
            raise ValueError(
                f"image must have shape (B, {channels}, H, W), got {tuple(image.shape)}"
            )

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in evaluation mode, also as part of a module that is trained."""
        return super().train(False)

    def freeze(self) -> None:
        """Evaluation mode, and no parameter asks for a gradient."""
        self.requires_grad_(False).eval()


class Pixels(Extractor):
    """The pixels themselves, flattened."""

    name = "pixels"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        return image.flatten(1)


def described(module: nn.Module, *, name: str | None = None) -> Extractor:
    """Any module from images to features as an extractor; an extractor stays what it is.

    Args:
        module: takes `[B, C, H, W]` and returns `[B, F]`. It is frozen, and put in evaluation mode:
            give a copy of what is still trained.
        name: what to call it; its attribute `name`, or else its class in lower case, if None. An
            extractor keeps its own.

    Raises:
        ValueError: if the name has other than lower-case letters, digits and underscores.
    """
    if isinstance(module, Extractor):
        return module
    if name is None:
        own = getattr(module, "name", None)
        name = own if isinstance(own, str) else type(module).__name__.lower()
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(
            f"name must be of lower-case letters, digits and underscores, got {name!r}"
        )
    return _Described(module, name)


class _Described(Extractor):
    """A module of others, with a name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.freeze()

    @property
    def hash(self) -> str:
        own = getattr(self.module, "hash", None)
        return own if isinstance(own, str) else short_hash(self.module.state_dict(), name=self.name)

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        return self.module(image)


def short_hash(state: dict[str, Tensor], *, name: str = "") -> str:
    """Twelve hexadecimal digits of a SHA-256 over tensors by name, whatever device they are on.

    Args:
        state: the tensors; what else a module keeps there is left out.
        name: what is hashed where there is no tensor.
    """
    digest = hashlib.sha256()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    if not tensors:
        digest.update(name.encode())
    return digest.hexdigest()[:12]
