"""Which networks of diffusers a backbone may hold, and such a network as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rolldiff.layout import Patches

try:
    import diffusers
except ModuleNotFoundError as error:
    raise ImportError("rolldiff.integrations.diffusers needs: pip install diffusers") from error

__all__ = ["NETWORKS", "Network", "check_fit", "class_rows"]

# The classes that a configuration may name.
NETWORKS = ("DiTTransformer2DModel", "UNet2DModel")


@dataclass(frozen=True)
class Network:
    """A network of diffusers with fresh weights, as plain data.

    Args:
        name: its class, one of `NETWORKS`.
        settings: its arguments, pairs of name and value.

    Raises:
        ValueError: if it is another class.
    """

    name: str
    settings: Sequence[tuple[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {self.name!r}")

    @classmethod
    def of(cls, network: nn.Module) -> "Network":
        """What a network was built with."""
        name = type(network).__name__
        described = cls(name)  # refuses other classes, which may have no settings
        if type(network) is not getattr(diffusers, name):
            raise ValueError(f"network must be diffusers' own {name}, got {type(network)}")
        config: Any = network.config
        settings = tuple((key, value) for key, value in config.items() if key[0] != "_")
        return replace(described, settings=settings)

    def build(self) -> nn.Module:
        """The network."""
        return getattr(diffusers, self.name)(**dict(self.settings))


def check_fit(layout: Patches, network: nn.Module) -> None:
    """Refuse a network that could only fail later.

    Raises:
        ValueError: if its channels, its sizes or its embeddings do not fit.
    """
    config: Any = network.config
    is_transformer = isinstance(network, diffusers.DiTTransformer2DModel)
    channels, (height, width) = layout.channels, layout.size
    out = config.out_channels or config.in_channels
    if config.in_channels != channels or out not in (channels, 2 * channels):
        raise ValueError(
            f"network must have {channels} channels as the layout has, got in_channels "
            f"{config.in_channels} and out_channels {out}"
        )
    side = config.patch_size if is_transformer else 2 ** (len(config.block_out_channels) - 1)
    if height % side or width % side or (is_transformer and height != width):
        square = " and be square" if is_transformer else ""
        raise ValueError(f"image_size must divide by {side}{square}, got {layout.size}")
    if not is_transformer:
        embeddings = config.time_embedding_type, config.class_embed_type
        if embeddings != ("positional", None):
            raise ValueError(
                "network must have time_embedding_type positional and class_embed_type None, got "
                f"{embeddings[0]} and {embeddings[1]}"
            )


def class_rows(network: Any) -> tuple[int, int]:
    """The rows of the network's class embedding, and how many of them are classes for sure."""
    if isinstance(network, diffusers.DiTTransformer2DModel):
        table = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        return table.num_embeddings, network.config.num_embeds_ada_norm
    rows = network.config.num_class_embeds or 0
    return rows, rows
