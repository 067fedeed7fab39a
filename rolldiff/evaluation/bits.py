"""`rolldiff likelihood`: bits per dimension of images, a table over groups, overlap and order.

Image `i` has the same noise in every setting, so that settings are compared on the same draws.
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from rolldiff.data import Source
from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.device import named_device
from rolldiff.diffusion.schedule import groupings_of
from rolldiff.errors import UsageError, finite_number, warn_user, whole_number
from rolldiff.evaluation.plots import groups_label
from rolldiff.hub import read_checkpoint
from rolldiff.likelihood import LikelihoodConfig
from rolldiff.trust import trusted_prefixes

SEEN = (
    "the likelihood may be that of images of the training, for its data hold none out; say "
    "data=NAME data.split=test, or train with data.held_out=0.1"
)

__all__ = [
    "SEEN",
    "BitsPerDim",
    "bits_per_dim",
    "check_dequantization",
    "held_out",
    "likelihood_table",
]


@dataclass(frozen=True)
class BitsPerDim:
    """The bits per dimension of some images under one setting.

    Attributes:
        values: of each image.
        noise_error: `[B]`, the standard error of each, over samples and probes.
        solver_error: `[B]`, of each.
        nfe: network calls in series, of a batch.
        products: vector-Jacobian products in series, of a batch.
        seconds: of all images.
        divergence: `exact` or `hutchinson`; None for the bound.
    """

    values: Float[Tensor, " B"]
    noise_error: Float[Tensor, " B"]
    solver_error: Float[Tensor, " B"]
    nfe: int
    products: int
    seconds: float
    divergence: str | None

    @property
    def mean(self) -> float:
        """Over the images."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean as an estimate for all images of their kind."""
        return float(self.values.std()) / math.sqrt(len(self.values))


def bits_per_dim(
    decoder: Decoder,
    image: Float[Tensor, "N C H W"],
    label: Int[Tensor, " N"] | None,
    *,
    config: DecodeConfig,
    likelihood: LikelihoodConfig,
    batch_size: int,
    seed: int = 0,
    start_index: int = 0,
) -> BitsPerDim:
    """The bits per dimension of images, a batch at a time.

    Args:
        decoder: the decoder.
        image: the images.
        label: their labels, or None.
        config: of the decoding.
        likelihood: how it is computed.
        batch_size: images at a time.
        seed: of the noise.
        start_index: of the first image's noise.
    """
    parts, seconds = [], 0.0
    with torch.no_grad():
        for start in range(0, len(image), batch_size):
            part = slice(start, start + batch_size)
            found = decoder.log_likelihood(
                image[part],
                None if label is None else label[part],
                config,
                likelihood=likelihood,
                seed=seed,
                start_index=start_index + start,
            )
            seconds += found.seconds
            parts.append(found)
    return BitsPerDim(
        values=torch.cat([found.bits_per_dim.cpu() for found in parts]),
        noise_error=torch.cat([found.standard_error.cpu() for found in parts]),
        solver_error=torch.cat([found.solver_error.cpu() for found in parts]),
        nfe=parts[0].nfe,
        products=parts[0].products,
        seconds=seconds,
        divergence=parts[0].divergence,
    )


def check_dequantization(how: LikelihoodConfig, decoder: Decoder) -> None:
    """Refuse levels for latents, before any data are read.

    Raises:
        UsageError: if there are some.
    """
    if decoder.latents and how.dequantization is not None:
        raise UsageError(
            "likelihood.dequantization must be null for a decoder of latents, which have no "
            f"levels, got {how.dequantization}"
        )


def held_out(data: Source, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` images that the data hold out, or of all if there are none; their labels."""
    image, label = data.held_out_images if data.held_out else (data.image, data.label)
    chosen = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))[:count]
    return image[chosen], label[chosen]


def likelihood_table(cfg: DictConfig, data: DictConfig) -> str:
    """The table of `rolldiff likelihood`.

    Args:
        cfg: the configuration of `rolldiff likelihood`.
        data: the settings of the data.

    Raises:
        UsageError: if a setting is out of range.
    """
    trusted = trusted_prefixes(cfg.trust)
    decoder = read_checkpoint(cfg.ckpt, Decoder, trusted=trusted).to(named_device(cfg.device))
    how = instantiate(cfg.likelihood, _convert_="all")
    check_dequantization(how, decoder)
    configs = _configs(cfg, decoder)
    source = instantiate(data, _convert_="all")
    image, label = held_out(source, whole_number(cfg.images, "images"))
    if not cfg.get("data") and not source.held_out:
        warn_user(SEEN)
    classes = decoder.conditioning.num_classes
    rows = []
    for config in configs:
        found = bits_per_dim(
            decoder,
            image,
            label if classes else None,
            config=config,
            likelihood=how,
            batch_size=whole_number(cfg.batch_size, "batch_size"),
            seed=whole_number(cfg.seed, "seed", minimum=0),
        )
        rows.append((config, found))
    return _table(rows, how, count=len(image))


def _configs(cfg: DictConfig, decoder: Decoder) -> list[DecodeConfig]:
    trained = decoder.training_distribution
    orders = _list(cfg.order, "order") or list(trained.orders)
    if all(isinstance(item, int) for item in orders):
        orders = [orders]  # one permutation
    counts = _list(cfg.num_groups, "num_groups") or sorted(set(trained.num_groups))
    overlaps = _list(cfg.overlap, "overlap")
    groupings = _list(cfg.grouping, "grouping") or list(trained.grouping)
    num_levels = len(decoder.layout.coords[:, 0].unique())
    found: dict[tuple[object, ...], DecodeConfig] = {}
    for order, overlap, grouping, count in product(orders, overlaps, groupings, counts):
        config = DecodeConfig(
            num_groups=whole_number(count, "num_groups", maximum=decoder.layout.num_tokens),
            overlap=finite_number(overlap, "overlap", minimum=0, maximum=1),
            order=order,
            grouping=grouping,
            steps=cfg.steps,
            guidance=cfg.guidance,
        )
        if grouping not in groupings_of(config.num_groups, groupings, num_levels=num_levels):
            continue
        if config.num_groups == 1:  # has neither overlap nor order
            found.setdefault((1,), replace(config, grouping="equal"))
        else:
            found[config.num_groups, config.overlap, config.order, grouping] = config
    return list(found.values())


def _list(value: Any, name: str) -> list[Any]:
    """One value or several; none for null."""
    if value is None:
        return []
    values = OmegaConf.to_object(value) if OmegaConf.is_list(value) else [value]
    if not isinstance(values, list) or not values:
        raise UsageError(f"{name} must hold at least one value, got none")
    return values


def _table(
    rows: list[tuple[DecodeConfig, BitsPerDim]], how: LikelihoodConfig, *, count: int
) -> str:
    kind = "bits per dimension" if how.dequantization else "bits per dimension, of the density"
    lines = [
        f"{how.method}, {kind}, {how.dequantization or 'continuous data'}, {count} images, "
        f"{how.samples} sample(s)",
        "",
        "| configuration | bits/dim | noise | solver | calls | products | seconds per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for config, found in rows:
        label = groups_label(config.num_groups, config.overlap)
        if config.num_groups > 1 and config.order != "top_to_bottom":
            label += f", {config.order}"
        if config.grouping != "equal":
            label += ", by levels"
        # The mean's error by the noise; the images are the same in every row.
        noise = found.noise_error.square().sum().sqrt() / count
        cells = [
            label,
            f"{found.mean:.4f} ± {found.standard_error:.4f}",
            _number(float(noise)),
            _number(float(found.solver_error.mean())),
            f"{found.nfe:,}",
            f"{found.products:,}",
            f"{found.seconds / count:.3g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1g}"
