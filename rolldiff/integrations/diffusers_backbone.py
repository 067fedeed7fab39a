"""`DiffusersBackbone`: a network of diffusers inside a decoder.

Such a network sees the whole image, so it is a bidirectional backbone without a cache. Its timestep
is `1000 t`. Its own forward pass has one time per image. A DiT also works with a time per token:
its blocks scale and shift tokens by a projection of time and label, which may differ between
tokens. The same weights then compute the same for equal times; for unequal times they need
training. A UNet's convolutions mix neighbours under one time, so it takes a single group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.conditioning import ClassLabels, Conditioning, Masked
from rolldiff.diffusion.layout import Layout, Patches
from rolldiff.diffusion.schedule import Visibility
from rolldiff.errors import UsageError, instance, sequence, shown, whole_number
from rolldiff.nn.denoiser import Backbone

try:
    import diffusers
    from diffusers.models.embeddings import LabelEmbedding
except ModuleNotFoundError as error:
    raise ImportError("rolldiff.integrations.diffusers needs: pip install diffusers") from error

__all__ = ["DiffusersBackbone", "Network"]

# The classes that a configuration may name.
NETWORKS = ("DiTTransformer2DModel", "UNet2DModel")


@dataclass(frozen=True)
class Network:
    """A network of diffusers with fresh weights, as plain data.

    Args:
        name: its class, one of `NETWORKS`.
        settings: its arguments, pairs of name and value.

    Raises:
        UsageError: if it is another class.
    """

    name: str
    settings: Sequence[tuple[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise UsageError(
                f"network must be one of {', '.join(NETWORKS)}, got {shown(self.name)}"
            )
        pairs = tuple(sequence(self.settings, "settings", "pairs of name and value"))
        for pair in pairs:
            if len(sequence(pair, "each of settings", "a name and a value")) != 2:
                raise UsageError(f"each of settings must be a name and a value, got {shown(pair)}")
            _check_setting(*pair)
        settings = dict(pairs)
        side = settings.get("sample_size") or 32
        tokens = (side if isinstance(side, int) else max(side, default=1)) ** 2
        heads, size = (
            settings.get(name) or 1 for name in ("num_attention_heads", "attention_head_dim")
        )
        if isinstance(heads, int) and isinstance(size, int) and tokens * heads * size > 2**31:
            raise UsageError(
                f"sample_size must suit the memory for its positions, got {side} with "
                f"{heads * size} channels"
            )
        object.__setattr__(self, "settings", pairs)

    @classmethod
    def of(cls, network: nn.Module) -> "Network":
        """What a network was built with."""
        name = type(network).__name__
        described = cls(name)  # refuses other classes, which may have no settings
        if type(network) is not getattr(diffusers, name):
            raise UsageError(f"network must be diffusers' own {name}, got {type(network)}")
        config: Any = network.config
        settings = tuple((key, value) for key, value in config.items() if key[0] != "_")
        return replace(described, settings=settings)

    def build(self) -> nn.Module:
        """The network."""
        return getattr(diffusers, self.name)(**dict(self.settings))


def _check_setting(name: Any, value: Any) -> None:
    """Refuse sizes that no network has, so that building one cannot take hours or all memory."""
    instance(name, str, "each name in settings", "text")
    items = sequence(value, name, "values") if isinstance(value, list | tuple) else [value]
    largest = 100 if "layers" in name else 2**20
    for item in items:
        if (isinstance(item, int) and item > largest) or len(items) > 32:
            raise UsageError(f"{name} must be at most {largest}, 32 of them, got {shown(value)}")


class _Context(NamedTuple):
    """What `DiffusersBackbone.prepare` computes once."""

    order: Int[Tensor, "*B N"]
    inverse: Int[Tensor, "*B N"]  # position of each raster index in the decode order
    grouped: bool  # more than one group
    labels: Int[Tensor, " C"] | None


class DiffusersBackbone(Backbone):
    """A `DiTTransformer2DModel` or `UNet2DModel` as a bidirectional backbone.

    What it predicts is the decoder's `prediction`. A network that was trained elsewhere wants the
    decoder's `noise` to be what it was trained with: `Rectified()` and `prediction="velocity"` for
    flow matching. If it predicts variances too, they are left out.

    Args:
        layout: `Patches`. For more than one group, and so a DiT, `patch` is a multiple of the
            network's.
        network: the network; or a `Network`, for fresh weights.
        num_classes: classes of the labels, by default all that the network has. Null is its next
            row of embeddings: a DiT has one; a UNet with `num_class_embeds` rows has one if
            `num_classes` is below it, and otherwise wants labels always.

    Raises:
        UsageError: if the network is of another class or does not fit the layout or the classes.
    """

    def __init__(
        self, layout: Layout, network: nn.Module | Network, *, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(layout, Patches):
            raise UsageError(f"layout must be Patches, got {type(layout).__name__}")
        instance(network, nn.Module | Network, "network", "a network of diffusers or a Network")
        described = network if isinstance(network, Network) else Network.of(network)
        network = network.build() if isinstance(network, Network) else network
        self.is_transformer = described.name == "DiTTransformer2DModel"
        _check_fit(layout, network)
        self.layout = layout
        self.network: Any = network
        for module in network.modules():
            # Training drops conditions itself, for whole examples and from its own generator.
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        rows, known = _class_rows(network)
        num_classes = (
            known if num_classes is None else whole_number(num_classes, "num_classes", minimum=0)
        )
        if not min(rows, 1) <= num_classes <= rows:
            raise UsageError(
                f"num_classes must be in {min(rows, 1)} … {rows}, the rows of the network's "
                f"embedding, got {num_classes}"
            )
        self.num_classes = num_classes
        self.has_null = num_classes < rows
        self.causal = False
        self.conditioning = Conditioning.of(ClassLabels(num_classes))
        self.config = {"layout": layout, "network": described, "num_classes": num_classes}

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        cond: dict[str, Masked] | None = None,
        *,
        grouped: bool = True,
    ) -> _Context:
        """See `Backbone.prepare`.

        Raises:
            UsageError: if the network cannot take the times of several groups.
        """
        if grouped and not self.is_transformer:
            raise UsageError(
                "num_groups must be 1 for a UNet2DModel, which has one time for the whole image, "
                "got several groups"
            )
        if grouped and self.layout.patch % self.network.config.patch_size:
            raise UsageError(
                "patch must be a multiple of the network's patch_size for more than one group, got "
                f"{self.layout.patch} and {self.network.config.patch_size}"
            )
        labels = None
        for value, mask in (cond or self.conditioning.null(1, order.device)).values():
            if not self.has_null and not mask.all():
                raise UsageError(
                    "cond must have a label for every example, without guidance or drop_cond, for "
                    f"all {self.num_classes} rows of the network's embedding are classes; got null"
                )
            labels = value.where(mask, self.num_classes)
        return _Context(order, order.argsort(-1), grouped, labels)

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the network's own forward pass in place; a time per token stays eager."""
        self.network.compile(mode=mode)

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """The time itself; the network embeds it."""
        return t[..., None]

    def forward(
        self,
        x_t: Float[Tensor, "B N D"],
        time: Float[Tensor, "*B #N E"],
        context: _Context,
        *,
        start: int = 0,
        mask: Tensor | Visibility | None = None,
        cache: None = None,
    ) -> Float[Tensor, "B2 N D"]:
        """See `Backbone.forward`; every call shows all tokens."""
        labels, batch = context.labels, len(x_t)
        branches = 1 if labels is None else max(1, len(labels) // batch)
        image = self.layout.image(_gather(x_t, context.inverse)).to(self.network.dtype)
        image = image.repeat(branches, 1, 1, 1)
        if labels is not None:
            labels = labels.expand(len(image))
        if context.grouped and time.shape[-2] > 1:
            y = self._walk(image, self._times(time, context, branches), labels)
        else:
            timestep = 1000 * time[..., 0, 0].expand(batch).repeat(branches)
            y = self.network(image, timestep, class_labels=labels).sample
        return _gather(self.layout.tokens(y[:, : self.layout.channels]), context.order)

    def _times(self, time: Tensor, context: _Context, branches: int) -> Float[Tensor, "#B n"]:
        """The time of each of the network's tokens, in raster order."""
        rows, columns = self.layout.grid
        t = _gather(time if time.ndim == 3 else time[None], context.inverse)
        t = t.view(len(t), rows, columns)
        finer = self.layout.patch // self.network.config.patch_size
        t = t.repeat_interleave(finer, 1).repeat_interleave(finer, 2).flatten(1)
        return t if len(t) == 1 else t.repeat(branches, 1)

    def _walk(self, image: Tensor, t: Float[Tensor, "#B n"], labels: Tensor | None) -> Tensor:
        """The call of a DiT, with a time for each of its tokens."""
        net = self.network
        h = net.pos_embed(image)

        def conditioning(block: Any) -> Float[Tensor, "B n width"]:
            embed = block.norm1.emb
            features = embed.time_proj(1000 * t.flatten()).to(h.dtype)
            of_time = embed.timestep_embedder(features).unflatten(0, t.shape)
            return F.silu(of_time + embed.class_embedder(labels)[:, None])

        for block in net.transformer_blocks:
            parts = block.norm1.linear(conditioning(block)).chunk(6, dim=-1)
            shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
            h = h + gate * block.attn1(block.norm1.norm(h) * (1 + scale) + shift)
            h = h + gate_ff * block.ff(block.norm3(h) * (1 + scale_ff) + shift_ff)
        of_head = net.proj_out_1(conditioning(net.transformer_blocks[0]))
        shift, scale = of_head.chunk(2, dim=-1)
        y = net.proj_out_2(net.norm_out(h) * (1 + scale) + shift)
        p = net.config.patch_size
        rows = image.shape[2] // p
        return rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)


def _check_fit(layout: Patches, network: nn.Module) -> None:
    """Refuse a network that could only fail later.

    Raises:
        UsageError: if its channels, its sizes or its embeddings do not fit.
    """
    config: Any = network.config
    is_transformer = isinstance(network, diffusers.DiTTransformer2DModel)
    channels, (height, width) = layout.channels, layout.size
    out = config.out_channels or config.in_channels
    if config.in_channels != channels or out not in (channels, 2 * channels):
        raise UsageError(
            f"network must have {channels} channels as the layout has, got in_channels "
            f"{config.in_channels} and out_channels {out}"
        )
    side = config.patch_size if is_transformer else 2 ** (len(config.block_out_channels) - 1)
    if height % side or width % side or (is_transformer and height != width):
        square = " and be square" if is_transformer else ""
        raise UsageError(f"image_size must divide by {side}{square}, got {layout.size}")
    if not is_transformer:
        embeddings = config.time_embedding_type, config.class_embed_type
        if embeddings != ("positional", None):
            raise UsageError(
                "network must have time_embedding_type positional and class_embed_type None, got "
                f"{embeddings[0]} and {embeddings[1]}"
            )


def _class_rows(network: Any) -> tuple[int, int]:
    """The rows of the network's class embedding, and how many of them are classes for sure."""
    if isinstance(network, diffusers.DiTTransformer2DModel):
        table = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        return table.num_embeddings, network.config.num_embeds_ada_norm
    rows = network.config.num_class_embeds or 0
    return rows, rows


def _gather(tokens: Float[Tensor, "B N F"], index: Int[Tensor, "*B N"]) -> Float[Tensor, "B2 N F"]:
    """Tokens in another order, the same for all examples or one per example."""
    if index.ndim == 1:
        return tokens[:, index]
    count = max(len(tokens), len(index))
    index = index.repeat(count // len(index), 1)
    tokens = tokens.expand(count, -1, -1)
    return tokens.gather(1, index[..., None].expand_as(tokens))
