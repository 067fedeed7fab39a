"""`DiffusersDecoder`: a decoder as the `vae` of a diffusers pipeline.

The decoder is conditioned on the latents, and the pipeline calls `decode` with them. The other
attributes that pipelines read of an autoencoder exist too: `config.scaling_factor`,
`config.block_out_channels`, `dtype`, `device`. For the reverse, a diffusers network inside a
decoder, see `DiffusersBackbone`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rolldiff.conditioning import TokenGrid
from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.diffusion.process import MAX_SEED
from rolldiff.errors import (
    UsageError,
    boolean,
    dense_tensor,
    finite_number,
    instance,
    whole_number,
    whole_numbers,
)
from rolldiff.hub import build, describe
from rolldiff.integrations.diffusers_backbone import DiffusersBackbone, Network

try:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.autoencoders.vq_model import VQEncoderOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ModuleNotFoundError as error:
    raise ImportError("rolldiff.integrations.diffusers needs: pip install diffusers") from error

__all__ = ["DiffusersBackbone", "DiffusersDecoder", "Network"]


class DiffusersDecoder(ModelMixin, ConfigMixin):
    """A decoder of latents with the manners of diffusers' autoencoders.

    The settings of decoding are the attributes `decoding` and `seed`. They may be replaced between
    calls, and `save_pretrained` writes them as they are. `from_pretrained` builds classes of
    rolldiff alone; read a decoder with foreign parts by
    `Decoder.from_pretrained(folder, trusted=...)` and wrap it.

    Args:
        decoder: a decoder with the single condition `TokenGrid(h, w, channels=C)`, or its
            configuration, for fresh weights. Images are `h 2^k x w 2^k` pixels.
        encoder: images `[B, 3, H, W]` to latents `[B, C, h, w]`, for `encode`. Its weights are
            saved with the others, but not how it is built: hand it to `from_pretrained` too.
        decode_config: the settings of decoding. A call's `num_inference_steps` replaces its steps.
        seed: of the noise if a call passes no generator, so that decoding is a function of the
            latents, as pipelines expect; None draws from torch's global generator.
        scaling_factor: pipelines divide latents by it, and the decoder gets the quotients.
        shift_factor: likewise, of those pipelines that add one.
        force_upcast: whether pipelines are to turn the weights into float32 first.
        latent_channels: `C`, as read from the decoder; not to be given by hand.
        block_out_channels: k + 1 numbers, of which pipelines read how many there are; likewise.

    Raises:
        UsageError: if the decoder's condition is another, its images are not larger than the
            latents by a power of two, or what was read back disagrees with it.
    """

    def __init__(
        self,
        decoder: Decoder | Mapping[str, Any],
        *,
        encoder: nn.Module | None = None,
        decode_config: DecodeConfig | Mapping[str, Any] = DecodeConfig(),
        seed: int | None = 0,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        force_upcast: bool = False,
        latent_channels: int | None = None,
        block_out_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        instance(decoder, Decoder | Mapping, "decoder", "a Decoder or its configuration")
        model = decoder if isinstance(decoder, Decoder) else _fresh(decoder)
        if model.latents:
            raise UsageError("decoder must be one of pictures, got one of latents")
        if encoder is not None:
            instance(encoder, nn.Module, "encoder", "an nn.Module")
        instance(decode_config, DecodeConfig | Mapping, "decode_config", "a DecodeConfig")
        if seed is not None:
            seed = whole_number(seed, "seed", minimum=0, maximum=MAX_SEED)
        scaling_factor = finite_number(scaling_factor, "scaling_factor")
        if shift_factor is not None:
            shift_factor = finite_number(shift_factor, "shift_factor")
        force_upcast = boolean(force_upcast, "force_upcast")
        if latent_channels is not None:
            latent_channels = whole_number(latent_channels, "latent_channels")
        if block_out_channels is not None:
            block_out_channels = whole_numbers(block_out_channels, "block_out_channels")
        grid, levels = _latents(model)
        channels, blocks = grid.channels, [grid.channels] * (levels + 1)
        if latent_channels not in (None, channels) or (
            block_out_channels is not None and len(block_out_channels) != len(blocks)
        ):
            raise UsageError(
                f"latent_channels must be {channels} and block_out_channels {len(blocks)} numbers, "
                f"as the decoder has them, got {latent_channels} and {block_out_channels}"
            )
        # No attribute may be called as something in the configuration that is not equal to it.
        self.model = model
        self.encoder = encoder
        self.grid = grid
        self.decoding = (
            decode_config if isinstance(decode_config, DecodeConfig) else build(dict(decode_config))
        )
        instance(self.decoding, DecodeConfig, "decode_config", "a DecodeConfig")
        self.seed = seed
        self.register_to_config(
            decoder=model.to_config(),
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=force_upcast,
            latent_channels=channels,
            block_out_channels=blocks,
            **self._settings(),
        )

    def decode(
        self,
        z: Tensor,
        *,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents.

        Args:
            z: `[B, C, h, w]`, floating point.
            return_dict: whether to return an object with `.sample`, or a tuple.
            generator: of the noise; or one for each example, which then are decoded one by one.
            num_inference_steps: solver steps per group; by default those of `decoding`.

        Returns:
            Images `[B, 3, H, W]`, values about [-1, 1] (not clipped), in float32 or better.

        Raises:
            UsageError: if an argument has the wrong shape, type or range.
        """
        return self._decoded(
            z, generator=generator, steps=num_inference_steps, return_dict=return_dict
        )

    def forward(
        self,
        z: Tensor,
        *,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """As `decode`."""
        return self._decoded(
            z, generator=generator, steps=num_inference_steps, return_dict=return_dict
        )

    def encode(self, x: Tensor, *, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Encode images `[B, 3, H, W]`, if there is an encoder.

        Returns:
            An object with `.latents` `[B, C, h, w]`, or a tuple.

        Raises:
            UsageError: without an encoder, or if its latents have the wrong shape.
        """
        if self.encoder is None:
            raise UsageError(
                "encode needs an encoder, and this decoder has none: give "
                "DiffusersDecoder(decoder, encoder=...) a module from images to latents"
            )
        latents = self._check(self.encoder(x), "the encoder's latents")
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def save_config(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """See `ConfigMixin.save_config`; settings are written as they are now."""
        self.register_to_config(**self._settings())
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def _decoded(
        self, z: Tensor, *, generator: Any, steps: int | None, return_dict: bool
    ) -> DecoderOutput | tuple[Tensor]:
        latents = self._check(z, "z").permute(0, 2, 3, 1)
        if generator is not None and not isinstance(generator, list | tuple):
            instance(generator, torch.Generator, "generator", "a torch.Generator or one per image")
        parts, sources = [latents], [self.seed if generator is None else generator]
        if isinstance(generator, list | tuple):
            if len(generator) != len(z):
                raise UsageError(f"generator must be {len(z)} for as many z, got {len(generator)}")
            for source in generator:
                instance(source, torch.Generator, "each of generator", "a torch.Generator")
            parts, sources = list(latents.split(1)), list(generator)
        config = self.decoding if steps is None else replace(self.decoding, steps=steps)
        images = [
            self.model.decode(part, config, seed=source).image
            for part, source in zip(parts, sources, strict=True)
        ]
        image = torch.cat(images)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _settings(self) -> dict[str, Any]:
        return {"decode_config": describe(self.decoding), "seed": self.seed}

    def _check(self, z: Tensor, name: str) -> Tensor:
        dense_tensor(z, name)
        shape = self.grid.channels, self.grid.height, self.grid.width
        if z.ndim != 4 or z.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise UsageError(f"{name} must have shape (B, {wanted}), got {tuple(z.shape)}")
        if not z.isfinite().all():
            raise UsageError(f"{name} must be finite, got NaN or infinity")
        return z


def _fresh(config: Mapping[str, Any]) -> Decoder:
    """A decoder in the default type, as diffusers wants it, but with tables in float32."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return Decoder.from_config(dict(config)).to(dtype)
    finally:
        torch.set_default_dtype(dtype)


def _latents(decoder: Decoder) -> tuple[TokenGrid, int]:
    """The grid of latents, and how often its sides double to the image's."""
    parts = decoder.conditioning.parts
    if len(parts) != 1 or not isinstance(parts[0], TokenGrid) or not parts[0].channels:
        raise UsageError(
            "decoder must be conditioned on a single TokenGrid(h, w, channels=C), got "
            f"{', '.join(map(str, parts)) or 'no condition'}"
        )
    grid = parts[0]
    _, height, width = decoder.layout.image_shape
    levels = (height // grid.height).bit_length() - 1
    if (grid.height << levels, grid.width << levels) != (height, width):
        raise UsageError(
            "the image must be larger than the latents by a power of two, got an image of "
            f"{height} x {width} and latents of {grid.height} x {grid.width}"
        )
    return grid, levels
