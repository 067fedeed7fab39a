"""Weights of DiT and SiT: into a decoder, and back into a network of diffusers.

`load_dit` reads the checkpoints that the authors of DiT (Peebles and Xie 2023) and SiT (Ma et al.
2024) published, and networks of diffusers:

    decoder = load_dit("DiT-XL-2-256x256.pt")
    decoder = load_dit("SiT-XL-2-256x256.pt", kind="sit")
    decoder = load_dit(DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer"))

With one group the decoder computes what the original computes, under the noise that it was trained
with: `LinearBeta` and a prediction of the noise for DiT, straight paths and the velocity for SiT.
Its images are latents of an autoencoder. For more groups it has to be trained further, by
`rolldiff train init=…`. Variances that a network predicts beside the noise are left out.

The scripts of DiT and SiT guide three channels of four and count the scale from 1; here all are
guided, and `guidance=w` is their `cfg_scale = 1 + w`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rolldiff.conditioning import ClassLabels
from rolldiff.decoder import Decoder
from rolldiff.diffusion.layout import Patches
from rolldiff.diffusion.process import LinearBeta, Rectified
from rolldiff.diffusion.timesteps import TrainingDistribution
from rolldiff.errors import UsageError, instance, reason, shown, whole_number
from rolldiff.nn.dit import DiT, sines_of_places

__all__ = ["Kind", "load_dit", "to_diffusers"]

Kind = Literal["dit", "sit"]

# Attention heads of the published sizes S, B, L and XL, by their width; a file does not say.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
DDPM, SIT = (1000.0, -1.0), (-1.0, 1.0)  # `DiT.timestep`
MLP_EPS = 1e-6
SHOWN = 5
LABELS = "cond_embedder.parts.0.embedding.weight"

# Names in the files of DiT and SiT, and in those of diffusers; patterns, and our names.
ORIGINAL = (
    (r"x_embedder\.proj\.", "embed."),
    (r"t_embedder\.mlp\.0\.", "time_embed.0.hidden."),
    (r"t_embedder\.mlp\.2\.", "time_embed.0.out."),
    (r"y_embedder\.embedding_table\.weight", "labels.0"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attn.out."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"blocks.\1.mlp.up."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"blocks.\1.mlp.down."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"final_layer\.linear\.", "head."),
    (r"final_layer\.adaLN_modulation\.1\.", "head_modulation."),
)
BLOCK = r"transformer_blocks\.(\d+)\."
DIFFUSERS = (
    (r"pos_embed\.proj\.", "embed."),
    (BLOCK + r"norm1\.emb\.timestep_embedder\.linear_1\.", r"time_embed.\1.hidden."),
    (BLOCK + r"norm1\.emb\.timestep_embedder\.linear_2\.", r"time_embed.\1.out."),
    (BLOCK + r"norm1\.emb\.class_embedder\.embedding_table\.weight", r"labels.\1"),
    (BLOCK + r"norm1\.linear\.", r"blocks.\1.modulation."),
    (BLOCK + r"attn1\.to_([qkv])\.", r"blocks.\1.attn.\2."),
    (BLOCK + r"attn1\.to_out\.0\.", r"blocks.\1.attn.out."),
    (BLOCK + r"ff\.net\.0\.proj\.", r"blocks.\1.mlp.up."),
    (BLOCK + r"ff\.net\.2\.", r"blocks.\1.mlp.down."),
    (r"proj_out_1\.", "head_modulation."),
    (r"proj_out_2\.", "head."),
)
BACK = {
    "embed": "pos_embed.proj",
    "modulation": "norm1.linear",
    "attn.out": "attn1.to_out.0",
    "mlp.up": "ff.net.0.proj",
    "mlp.down": "ff.net.2",
    "head_modulation": "proj_out_1",
    "head": "proj_out_2",
}


def load_dit(
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    kind: Kind = "dit",
    heads: int | None = None,
    image_size: int | None = None,
    latents: bool = True,
) -> Decoder:
    """A decoder with the weights of a DiT or SiT.

    Args:
        source: a file of weights (`.safetensors`, or `.pt`, read with `weights_only=True`), of
            which averaged ones are taken where it has them; a dictionary of weights; or a
            `DiTTransformer2DModel` of diffusers.
        kind: what the weights were trained for, which no file says.
        heads: attention heads; by default those of the published network of this width, or of the
            network of diffusers.
        image_size: side of the images or latents; by default what the weights or the network say.
            Weights of diffusers without their network do not.
        latents: whether its images are latents of an autoencoder, as those of the published
            weights, or else pictures in [-1, 1].

    Returns:
        The decoder, for one group. Its weights are copies of the same type.

    Raises:
        UsageError: if the file cannot be read without running code from it, the weights are not
            those of a DiT, or an argument does not fit them; nothing is loaded then.
    """
    if not isinstance(kind, str) or kind not in get_args(Kind):
        raise UsageError(f"kind must be one of {', '.join(get_args(Kind))}, got {shown(kind)}")
    config: Any = {}
    if isinstance(source, nn.Module):
        config = _diffusers_config(source)
        state: Any = source.state_dict()
    elif isinstance(source, Mapping):
        state = source
    else:
        instance(source, str | Path, "source", "a file, a dictionary of weights or a network")
        state = _read(Path(source))
    state = _checked(state)
    of_diffusers = any(name.startswith("transformer_blocks.") for name in state)
    ours = _renamed(state, DIFFUSERS if of_diffusers else ORIGINAL)
    copies = _join(ours)
    patches, hidden, table = (
        _shaped(ours, name, ndim)
        for name, ndim in (("embed.weight", 4), ("blocks.0.mlp.up.weight", 2), (LABELS, 2))
    )
    width, channels, patch, _ = patches.shape
    places = ours.pop("pos_embed", None)
    if image_size is None:
        image_size = config.get("sample_size")
        if places is not None:
            image_size = patch * round(places.shape[-2] ** 0.5)
        if image_size is None:
            raise UsageError("image_size must be given for weights of diffusers alone, got None")
    if heads is None:
        heads = config.get("num_attention_heads") or HEADS.get(width)
    if heads is None:
        raise UsageError(f"heads must be given for a network of width {width}, got None")
    layout = Patches(whole_number(image_size, "image_size"), channels=channels, patch=patch)
    backbone = DiT(
        layout,
        width=width,
        depth=1 + max((int(n.split(".")[1]) for n in ours if n.startswith("blocks.")), default=0),
        heads=whole_number(heads, "heads"),
        mlp_ratio=hidden.shape[0] / width,
        condition=ClassLabels(table.shape[0] - 1),
        timestep=DDPM if kind == "dit" else SIT,
        frequency_shift=int(of_diffusers),
        mlp_eps=config.get("norm_eps", 1e-5) if of_diffusers else MLP_EPS,
        separate_embeddings=copies > 1,
    )
    if places is not None:
        _check_places(places, backbone)
    ours["embed.weight"] = patches.flatten(1)  # [width, C p q], as tokens are
    for name in ("head.weight", "head.bias"):
        ours[name] = _head(_shaped(ours, name, 2 if "weight" in name else 1), layout)
        if kind == "sit":  # its time runs from noise to data, and so does its velocity
            ours[name] = -ours[name]
    _check_same(ours, backbone.state_dict())
    backbone.to(patches.dtype).load_state_dict(ours)
    return Decoder(
        layout,
        backbone,
        noise=LinearBeta() if kind == "dit" else Rectified(),
        prediction="eps" if kind == "dit" else "velocity",
        training=TrainingDistribution(num_groups=(1,), drop_cond=0.1),
        latents=latents,
    ).eval()


def to_diffusers(decoder: Decoder) -> nn.Module:
    """The network of a decoder as a `DiTTransformer2DModel`, for a `DiTPipeline`.

    It computes what the decoder computes with one group.

    Args:
        decoder: one with a `DiT` in the manner of diffusers: square images, class labels,
            frequencies with `frequency_shift=1` and DDPM's timesteps, as `load_dit` makes it of a
            network of diffusers.

    Raises:
        UsageError: if the decoder has another network.
        ImportError: without diffusers.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ModuleNotFoundError as error:
        raise ImportError("to_diffusers needs: pip install diffusers") from error
    net, layout = instance(decoder, Decoder, "decoder", "a Decoder").backbone, decoder.layout
    if not isinstance(net, DiT) or not isinstance(layout, Patches):
        raise UsageError(f"decoder must have a DiT, got a {type(net).__name__}")
    labels, (height, side) = net.conditioning.num_classes, layout.size
    found = {
        "timestep": (net.timestep, DDPM),
        "frequency_shift": (net.frequency_shift, 1),
        "height": (height, side),
        "conditions": (len(net.conditioning.parts), 1),
    }
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise UsageError(
                f"decoder must have a DiT with {name} {wanted}, which networks of diffusers are "
                f"made with, got {value}"
            )
    if not labels or decoder.prediction != "eps":
        raise UsageError(
            "decoder must be conditioned on class labels and predict eps, got "
            f"{labels} classes and prediction {decoder.prediction}"
        )
    settings = net.config
    network = DiTTransformer2DModel(
        num_attention_heads=net.heads,
        attention_head_dim=net.width // net.heads,
        in_channels=layout.channels,
        out_channels=layout.channels,  # by default None, which the pipeline cannot divide
        num_layers=len(net.blocks),
        sample_size=side,
        patch_size=layout.patch,
        num_embeds_ada_norm=labels,
        norm_num_groups=1,
        norm_eps=settings["mlp_eps"],
    )
    if network.dtype != decoder.dtype:
        network.to(decoder.dtype)
    network.load_state_dict(_to_diffusers_state(net, layout))
    return network.eval()


def _diffusers_config(network: nn.Module) -> Any:
    """The settings of a network of diffusers.

    Raises:
        UsageError: if it is another network, or computes something else than a DiT.
    """
    config: Any = getattr(network, "config", None)
    if type(network).__name__ != "DiTTransformer2DModel" or config is None:
        raise UsageError(
            "source must be a DiTTransformer2DModel of diffusers, a file or a dictionary of "
            f"weights, got a {type(network).__name__}"
        )
    expected = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "upcast_attention": False,
    }
    for name, value in expected.items():
        if config[name] != value:
            raise UsageError(f"source must have {name} {value}, got {config[name]}")
    return config


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"source cannot be read: {path}: {reason(error)}") from error
    except Exception as error:  # torch raises whatever the damage, or a refused class, provokes
        raise UsageError(
            f"source must be a file of weights that can be read without running code from it, got "
            f"{path}: {reason(error)}"
        ) from error


def _checked(state: Any) -> dict[str, Tensor]:
    """The weights, averaged ones where there are two, by their names.

    Raises:
        UsageError: if there is something else among them.
    """
    for name in ("ema", "model"):  # of a training that can be continued
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping) or not state:
        raise UsageError(f"source must be a dictionary of weights, got {shown(state)}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(
                f"source must hold weights alone, got a {type(value).__name__} as {shown(name)}"
            )
        if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
            raise UsageError(f"source must hold dense floating-point weights, got another {name}")
        if not value.isfinite().all():
            raise UsageError(f"source must hold finite weights, got NaN or infinity in {name}")
    kinds = {value.dtype for value in state.values()}
    if len(kinds) > 1:
        raise UsageError(f"source must hold weights of one type, got {', '.join(map(str, kinds))}")
    return dict(state)


def _renamed(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, ours in names:
            changed, count = re.subn(f"^{pattern}", ours, name)
            if count:
                name = changed
                break
        renamed[name] = value
    return renamed


def _join(ours: dict[str, Tensor]) -> int:
    """Join queries, keys and values, and the embeddings of all blocks, in place.

    Returns:
        The number of embeddings, which is 1 if those of all blocks are equal.
    """
    for name in [n for n in ours if re.match(r"blocks\.\d+\.attn\.q\.", n)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in ours and ours[part].shape == ours[name].shape for part in parts):
            joined = torch.cat([ours.pop(part) for part in parts])
            ours[name.replace(".attn.q.", ".attn.qkv.")] = joined
    tables = _numbered(ours, "labels.")
    copied = [name for name in ours if name.startswith("time_embed.")]
    first = {name: re.sub(r"^time_embed\.\d+", "time_embed.0", name) for name in copied}
    same = all(torch.equal(table, tables[0]) for table in tables) and all(
        name in ours and torch.equal(ours[copy], ours[name]) for copy, name in first.items()
    )
    if same:
        tables = tables[:1]
        for copy, name in first.items():
            if copy != name:
                ours.pop(copy)
    if tables and len({len(table) for table in tables}) == 1:
        ours[LABELS] = torch.cat(tables, dim=1)
    return max(1, len(tables))


def _numbered(ours: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """Take what is called `prefix0`, `prefix1`, …."""
    found: list[Tensor] = []
    while f"{prefix}{len(found)}" in ours:
        found.append(ours.pop(f"{prefix}{len(found)}"))
    return found


def _shaped(ours: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    value = ours.get(name)
    if value is None or value.ndim != ndim or not value.numel():
        got = "none" if value is None else str(tuple(value.shape))
        raise UsageError(f"source must be weights of a DiT, with {ndim} axes of {name}, got {got}")
    return value


def _head(value: Tensor, layout: Patches) -> Tensor:
    """The head's rows in the order of a token, `(C p q)`, of `(p q C)` with variances after C."""
    p, channels = layout.patch, layout.channels
    out, left = divmod(len(value), p * p)
    if left or out not in (channels, 2 * channels):
        raise UsageError(
            f"source must have a head of {channels} or {2 * channels} channels and {p * p} pixels, "
            f"got {len(value)} numbers"
        )
    rows = value.unflatten(0, (p, p, out)).movedim(2, 0)[:channels]
    return rows.flatten(0, 2).contiguous()


def _check_places(places: Tensor, net: DiT) -> None:
    expected = sines_of_places(net.layout.coords, net.width)
    if places.shape[-2:] != expected.shape or not torch.allclose(
        places.float().view(-1, net.width), expected, atol=1e-2
    ):
        raise UsageError(
            "pos_embed must be the fixed sines and cosines of DiT for a square of "
            f"{net.layout.num_tokens} tokens, got others of shape {tuple(places.shape)}"
        )


def _check_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names and shapes.

    Raises:
        UsageError: with a list of what differs.
    """
    different = []
    for name in sorted(ours.keys() | expected.keys()):
        shapes = [
            str(tuple(state[name].shape)) if name in state else "none" for state in (ours, expected)
        ]
        if shapes[0] != shapes[1]:
            different.append(f"{name} {shapes[0]}, and {shapes[1]} in a DiT of this size")
    if different:
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise UsageError(
            f"source must be weights of a DiT, got {'; '.join(different[:SHOWN])}{more}"
        )


def _to_diffusers_state(net: DiT, layout: Patches) -> dict[str, Tensor]:
    """The inverse of `load_dit` for networks of diffusers."""
    p, channels, state = layout.patch, layout.channels, {}
    for name, value in net.state_dict().items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.+)", module)
        if module == "embed" and kind == "weight":
            value = value.unflatten(1, (channels, p, p))
        if module == "head":
            value = value.unflatten(0, (channels, p, p)).movedim(0, 2).flatten(0, 2)
        if name.startswith(("time_embed.", "cond_embedder.")):
            continue
        if block is None:
            state[f"{BACK[module]}.{kind}"] = value
        elif block[2] == "attn.qkv":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                state[f"transformer_blocks.{block[1]}.attn1.to_{part}.{kind}"] = piece
        else:
            state[f"transformer_blocks.{block[1]}.{BACK[block[2]]}.{kind}"] = value
    tables = net.state_dict()[LABELS].split(net.width, dim=1)
    for i in range(len(net.blocks)):
        embedding, copy = f"transformer_blocks.{i}.norm1.emb.", i % net.copies
        state[f"{embedding}class_embedder.embedding_table.weight"] = tables[copy]
        for ours, theirs in (("hidden", "linear_1"), ("out", "linear_2")):
            layer = getattr(net.time_embed[copy], ours)
            state[f"{embedding}timestep_embedder.{theirs}.weight"] = layer.weight
            state[f"{embedding}timestep_embedder.{theirs}.bias"] = layer.bias
    return {name: value.detach().clone() for name, value in state.items()}
