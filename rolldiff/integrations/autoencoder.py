"""`Autoencoder`: a frozen `AutoencoderKL` of diffusers as two functions, to latents and back.

autoencoder = Autoencoder.from_pretrained("stabilityai/sd-vae-ft-mse")
latents = autoencoder.encode(images)                  # [B, 3, 256, 256] to [B, 4, 32, 32]
decoder = Decoder.build(image_size=32, channels=4, latents=True)
decoder.loss(latents).backward()                      # … and your training
pictures = autoencoder.decode(decoder.decode(num_images=4, seed=0).image)
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.device import named_device
from rolldiff.errors import (
    UsageError,
    dense_tensor,
    finite_number,
    instance,
    reason,
    whole_number,
)

if TYPE_CHECKING:  # importing it takes seconds, and it is not among the requirements
    from diffusers import AutoencoderKL

__all__ = ["WANTED", "Autoencoder"]

Shape = tuple[int, int, int]

WANTED = "an Autoencoder (autoencoder=kl autoencoder.path=FOLDER)"  # what a setting must be


class Autoencoder:
    """Pictures in [-1, 1] to latents of about unit variance, and back.

    `z = scaling_factor (mean - shift_factor)`, with the mean of the encoder's Gaussian, and back
    `decode(z / scaling_factor + shift_factor)`, as pipelines of diffusers do it. It is neither
    trained nor saved with a decoder.

    Args:
        module: the autoencoder. It is frozen and put in evaluation mode.
        scaling_factor: what latents are multiplied by; None takes that of the module.
        shift_factor: what is subtracted before; None takes that of the module, 0 if it has none.
        batch_size: images at a time, which bounds the memory.
        device: where it computes; None is where the module is.

    Raises:
        UsageError: if an argument is something else or out of range.
    """

    def __init__(
        self,
        module: "AutoencoderKL",
        *,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ) -> None:
        instance(module, _kl(), "module", "an AutoencoderKL of diffusers")
        config = module.config
        if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
            raise UsageError(
                "module must be of pictures of 1 or 3 channels, got "
                f"{config.in_channels} and {config.out_channels}"
            )
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise UsageError(f"module must have no {name} of its own, got one with them")
        scale = config.scaling_factor if scaling_factor is None else scaling_factor
        shift = (config.get("shift_factor") or 0.0) if shift_factor is None else shift_factor
        self.scaling_factor = finite_number(scale, "scaling_factor")
        self.shift_factor = finite_number(shift, "shift_factor")
        if self.scaling_factor <= 0:
            raise UsageError(f"scaling_factor must be above 0, got {scale}")
        self.batch_size = whole_number(batch_size, "batch_size")
        self.module = module.eval().requires_grad_(False)
        self.device = module.device if device is None else named_device(str(device))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> "Autoencoder":
        """Read an autoencoder of diffusers, from safetensors alone.

        Args:
            path: a folder, or else the name of a repository on the Hub.
            subfolder: where it is in there, such as `vae` in that of a pipeline.
            device: where it computes; None takes a GPU if there is one.
            **settings: the other arguments of `Autoencoder`.

        Raises:
            UsageError: if there is none, it is damaged, or a setting is out of range.
        """
        instance(path, str | Path, "autoencoder.path", "a path")
        folder = Path(path).expanduser()
        name, where = str(path), {} if subfolder is None else {"subfolder": subfolder}
        if name.strip() and folder.is_dir():
            name, where = str(folder / (subfolder or "")), {}  # diffusers would try the folder too
        elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.exists():
            raise UsageError(
                "autoencoder.path must be a folder or the name of a repository on the Hub, got "
                f"{name!r}"
            )
        kl = _kl()
        try:
            found = kl.load_config(name, **where).get("_class_name")
            if found != kl.__name__:
                raise UsageError(f"autoencoder must be an {kl.__name__}, got a {found} in {name}")
            module, info = kl.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **where
            )
        except UsageError:
            raise
        except Exception as error:  # whatever the name, the network or the damage provokes
            raise UsageError(
                f"autoencoder.path must hold an {kl.__name__} of diffusers in safetensors, got "
                f"{name}: {reason(error)}"
            ) from error
        if wrong := [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]:
            raise UsageError(
                f"autoencoder.path must hold all weights and no others, got {name} with "
                f"{len(wrong)} that differ, such as {wrong[0]}"
            )
        return cls(module, device=named_device(None if device is None else str(device)), **settings)

    @property
    def factor(self) -> int:
        """Pixels of a picture per row or column of latents."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    def latent_shape(self, shape: Shape) -> Shape:
        """The shape `[C, h, w]` of the latents of a picture.

        Args:
            shape: of the picture, `[C, H, W]`.

        Raises:
            UsageError: if it encodes no such pictures.
        """
        (channels, height, width), config = shape, self.module.config
        if channels != config.in_channels or height % self.factor or width % self.factor:
            raise UsageError(
                f"autoencoder needs pictures of {config.in_channels} channels and sides that are "
                f"multiples of {self.factor}, got {tuple(shape)}"
            )
        return config.latent_channels, height // self.factor, width // self.factor

    def check_latents(self, shape: Shape) -> None:
        """Refuse latents `[C, h, w]` that are not its own.

        Raises:
            UsageError: if they have another number of channels.
        """
        if shape[0] != self.module.config.latent_channels:
            raise UsageError(
                f"autoencoder must be of the latents, {shape[0]} channels, got one of "
                f"{self.module.config.latent_channels}"
            )

    def encode(
        self, image: Float[Tensor, "B C H W"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B c h w"]:
        """The latents of pictures.

        Args:
            image: `[B, 3, H, W]`, floating point, in [-1, 1].
            generator: a CPU generator that draws latents from the encoder's Gaussian; None takes
                its mean.

        Raises:
            UsageError: if the pictures have the wrong shape, type or range.
        """
        shape = self.latent_shape(_shape(image, "image"))
        low, high = (float(end) for end in image.detach().aminmax())
        if not -1.001 <= low <= high <= 1.001:
            raise UsageError(f"image must be in [-1, 1], got {low:.4g} … {high:.4g}")
        noise = torch.zeros(len(image), *shape)
        if generator is not None:  # for all at once, so that it does not depend on `batch_size`
            noise.normal_(generator=generator)

        def encoded(part: Tensor, noise: Tensor) -> Tensor:
            gaussian = self.module.encode(part).latent_dist
            z = gaussian.mean if generator is None else gaussian.mean + gaussian.std * noise
            return (z - self.shift_factor) * self.scaling_factor

        return self._in_parts(encoded, image, noise)

    def decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The pictures of latents, clipped to [-1, 1].

        Raises:
            UsageError: if the latents have the wrong shape or type, or are not finite.
        """
        self.check_latents(_shape(latents, "latents"))
        if not latents.isfinite().all():
            raise UsageError("latents must be finite, got NaN or infinity")

        def decoded(part: Tensor) -> Tensor:
            return self.module.decode(part / self.scaling_factor + self.shift_factor).sample

        return self._in_parts(decoded, latents).clamp(-1, 1)

    @torch.no_grad()
    def _in_parts(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What a function makes of `batch_size` examples at a time; its result like the first."""
        module, first = self.module.to(self.device), inputs[0]
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for part in zip(*(x.split(self.batch_size) for x in inputs), strict=True):
                found = function(*(x.to(self.device, module.dtype) for x in part))
                if not found.isfinite().all():
                    raise UsageError("autoencoder must give finite numbers, got NaN or infinity")
                parts.append(found.to(first))
        return torch.cat(parts)


def _shape(value: Any, name: str) -> Shape:
    """The shape of each of a batch of images."""
    if dense_tensor(value, name).ndim != 4 or not value.numel():
        raise UsageError(f"{name} must have shape (B, C, H, W), got {tuple(value.shape)}")
    return tuple(value.shape[1:])


def _kl() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise UsageError(
            f"an autoencoder needs diffusers (pip install diffusers), and {error.name} is missing"
        ) from error
    return AutoencoderKL
