"""`DiffusersBackbone`: a network of diffusers inside a decoder.

Such a network is shown the whole image, so it is a bidirectional backbone and has no cache. It is
told the timestep `1000 t`. In its own call all of an image has one time. A DiT can be told a time
per token as well: its blocks scale and shift tokens by a projection of time and label, which may
differ from token to token; the same weights then do the same for equal times, and what they do for
unequal ones is for training to teach. A UNet's convolutions see neighbours under one time, so it
takes a single group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.conditioning import Conditions
from rolldiff.conditions import ClassLabels, Given
from rolldiff.integrations.diffusers_network import Network, check_fit, class_rows
from rolldiff.layout import Layout, Patches

try:
    from diffusers.models.embeddings import LabelEmbedding
except ModuleNotFoundError as error:
    raise ImportError("rolldiff.integrations.diffusers needs: pip install diffusers") from error

__all__ = ["DiffusersBackbone"]


@dataclass
class _Context:
    """What `DiffusersBackbone.prepare` computes once."""

    order: Int[Tensor, "*B N"]
    inverse: Int[Tensor, "*B N"]  # the place of each raster index in the decode order
    several: bool  # groups
    labels: Int[Tensor, " C"] | None = None
    cached: int | None = None


class DiffusersBackbone(nn.Module):
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
        ValueError: if the network is of another class or does not fit the layout or the classes.
    """

    def __init__(
        self, layout: Layout, network: nn.Module | Network, *, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(layout, Patches):
            raise ValueError(f"layout must be Patches, got {type(layout).__name__}")
        described = network if isinstance(network, Network) else Network.of(network)
        network = network.build() if isinstance(network, Network) else network
        self.is_transformer = described.name == "DiTTransformer2DModel"
        check_fit(layout, network)
        self.layout = layout
        self.network: Any = network
        for module in network.modules():
            # Training drops conditions itself, for whole examples and from its own generator.
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        rows, known = class_rows(network)
        num_classes = known if num_classes is None else num_classes
        if not min(rows, 1) <= num_classes <= rows:
            raise ValueError(
                f"num_classes must be in {min(rows, 1)} … {rows}, the rows of the network's "
                f"embedding, got {num_classes}"
            )
        self.num_classes = num_classes
        self.has_null = num_classes < rows
        self.causal = False
        self.condition = Conditions.of(ClassLabels(num_classes))
        self.config = {"layout": layout, "network": described, "num_classes": num_classes}

    def prepare(
        self,
        order: Int[Tensor, "*B N"],
        group: Int[Tensor, "*B N"],
        cond: dict[str, Given] | None = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Context:
        """See `Backbone.prepare`.

        Raises:
            ValueError: if there are more groups than the network can be told the times of.
        """
        groups = int(group.max()) + 1
        if groups > 1 and not self.is_transformer:
            raise ValueError(
                "num_groups must be 1 for a UNet2DModel, which is told one time for the whole "
                f"image, got {groups}"
            )
        if groups > 1 and self.layout.patch % self.network.config.patch_size:
            raise ValueError(
                "patch must be a multiple of the network's patch_size for more than one group, got "
                f"{self.layout.patch} and {self.network.config.patch_size}"
            )
        context = _Context(order, order.argsort(-1), groups > 1)
        self.arrive(context, self.condition.null(1, order.device) if cond is None else cond)
        return context

    def arrive(self, context: _Context, cond: dict[str, Given]) -> None:
        """See `Backbone.arrive`.

        Raises:
            ValueError: if there is no label, and the network has no class for that.
        """
        for value, there in cond.values():
            if not self.has_null and not there.all():
                raise ValueError(
                    "cond must have a label for every example, without guidance or drop_cond, for "
                    f"all {self.num_classes} rows of the network's embedding are classes; got null"
                )
            context.labels = value.where(there, self.num_classes)

    def needs(self) -> dict[str, Int[Tensor, " N"]]:
        """See `Backbone.needs`."""
        return {}

    def compile(self, *, mode: str | None = None) -> None:
        """Compile the network's own call, in place; one with a time per token stays as it is."""
        self.network.compile(mode=mode)

    def embed_time(self, t: Float[Tensor, "*T"]) -> Float[Tensor, "*T E"]:
        """The time itself; the network embeds it."""
        return t[..., None]

    def forward(
        self,
        x_t: Float[Tensor, "B N D"],
        time: Float[Tensor, "*B #N E"],
        context: _Context,
        start: int = 0,
    ) -> Float[Tensor, "B2 N D"]:
        """See `Backbone.__call__`; it is shown all tokens in every call."""
        labels, batch = context.labels, len(x_t)
        copies = 1 if labels is None else max(1, len(labels) // batch)
        image = self.layout.image(_gathered(x_t, context.inverse)).to(self.network.dtype)
        image = image.repeat(copies, 1, 1, 1)
        if labels is not None:
            labels = labels.expand(len(image))
        if context.several and time.shape[-2] > 1:
            y = self._walk(image, self._times(time, context, copies), labels)
        else:
            timestep = 1000 * time[..., 0, 0].expand(batch).repeat(copies)
            y = self.network(image, timestep, class_labels=labels).sample
        return _gathered(self.layout.tokens(y[:, : self.layout.channels]), context.order)

    def _times(self, time: Tensor, context: _Context, copies: int) -> Float[Tensor, "#B n"]:
        """The time of each of the network's tokens, in raster order."""
        rows, columns = self.layout.grid
        t = _gathered(time if time.ndim == 3 else time[None], context.inverse)
        t = t.view(len(t), rows, columns)
        finer = self.layout.patch // self.network.config.patch_size
        t = t.repeat_interleave(finer, 1).repeat_interleave(finer, 2).flatten(1)
        return t if len(t) == 1 else t.repeat(copies, 1)

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


def _gathered(rows: Float[Tensor, "B N F"], index: Int[Tensor, "*B N"]) -> Float[Tensor, "B2 N F"]:
    """Rows in another order, one for all or one for each example."""
    if index.ndim == 1:
        return rows[:, index]
    count = max(len(rows), len(index))
    index = index.repeat(count // len(index), 1)
    rows = rows.expand(count, -1, -1)
    return rows.gather(1, index[..., None].expand_as(rows))
