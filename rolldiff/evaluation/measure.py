"""Measuring one configuration: images for every seed, their metrics, and the cost of decoding.

Sample `i` of a seed has the same noise and the same label in every configuration, so that
configurations are compared on the same draws. Images may come class by class, so a part of them is
a random part, and samples take their labels in random order; both are the same in every run. Under
`torchrun` the batches are distributed over the processes and gathered in order, so that the results
are bit-identical for any number of processes.
"""

import math
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rolldiff.decoder import DecodeConfig, DecodeOutput, Decoder
from rolldiff.diffusion.layout import Layout, highest
from rolldiff.diffusion.schedule import decode_order
from rolldiff.evaluation.bits import bits_per_dim
from rolldiff.evaluation.features import Extractor, Pixels
from rolldiff.evaluation.metrics import (
    band_distances,
    boundaries,
    frechet_distance,
    kernel_distance,
    precision_recall,
    seam_ratio,
)
from rolldiff.likelihood import LikelihoodConfig
from rolldiff.processes import Processes

__all__ = [
    "Evaluator",
    "Measurement",
    "device_name",
    "expected_cost",
    "extract_features",
    "mean_std",
    "random_halves",
]

BANDS = 4
BATCH = 500  # images whose features are computed at a time


def expected_cost(
    config: DecodeConfig, layout: Layout, *, causal: bool = True, cache: bool = True
) -> tuple[int, int]:
    """The `nfe` and `tokens` of a decoding, in closed form.

    With a cache and a solver of one call per step they are

        nfe = R = S + (G - 1) k,        tokens = N (S + 1) - (tokens of the last group),

    for any number of groups and overlap: `S` evaluations per token, and one to write the cache,
    which the last group does not need.

    Args:
        config: the settings.
        layout: of the images.
        causal: whether the backbone is block-causal.
        cache: whether finished tokens are cached; only a causal backbone can.
    """
    schedule, num_tokens = config.schedule(layout), layout.num_tokens
    solver, guidance = config.solver, config.guidance
    ends, rows, k = schedule.ends, schedule.num_steps, schedule.stagger
    together = k == 0 or schedule.num_groups == 1
    last = num_tokens if together else num_tokens - ends[-2]
    extra = solver.nfe_per_step - 1
    # Some solvers skip the second call in the rows in which all moving tokens take their last step.
    one_by_one = k == schedule.steps and not together
    skipped = 0
    if solver.nfe_last_step < solver.nfe_per_step:
        skipped = schedule.num_groups if one_by_one else 1
    again = extra * (rows - skipped)
    if causal and cache:
        spared = 0 if not skipped else num_tokens if one_by_one else last
        tokens = num_tokens * (schedule.steps + 1) - last
        tokens += extra * (num_tokens * schedule.steps - spared)
    elif causal:
        # A token is in every call from its group's start to the end.
        sizes = [b - a for a, b in pairwise(ends)]
        tokens = sum(size * (rows - g * k) for g, size in enumerate(sizes))
        if extra:
            alone = [g * k + schedule.steps - 1 for g in range(len(sizes))]
            alone = alone if one_by_one else [rows - 1]
            started = [ends[schedule.moving(i).stop] for i in alone] if skipped else []
            tokens += tokens - sum(started)
    else:
        tokens = num_tokens * (rows + again)
    scale = guidance if isinstance(guidance, int | float) else guidance.scale
    return rows + again, tokens * (2 if scale else 1)


class _Batch(NamedTuple):
    """What one process contributes: a batch of one seed."""

    image: Tensor
    features: dict[str, Tensor]
    nfe: int
    tokens: int
    seconds: float
    seconds_to_first_group: float


@dataclass(frozen=True)
class Measurement:
    """The results of one configuration.

    Attributes:
        nfe: network calls in series.
        tokens: token evaluations per image.
        flops: floating-point operations per image, by torch's counter.
        seconds: of decoding one batch, the median over batches and seeds.
        seconds_to_first_group: until its first group was final, likewise.
        metrics: for each metric `values` (one per seed), their `mean` and their `std`; lists for a
            metric of several parts. A metric that is undefined for a seed is left out.
    """

    nfe: int
    tokens: int
    flops: int
    seconds: float
    seconds_to_first_group: float
    metrics: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What all configurations of a benchmark share.

    Attributes:
        decoder: the decoder.
        image: the images that samples are compared with.
        label: their labels; sample `i` gets that of image `order[i]`, cyclically. None decodes
            without.
        extractors: by name.
        features: of the images, by the same names.
        seen: features of images that were trained on; empty to compare with none.
        samples: images per seed.
        seeds: of the noise.
        batch_size: images decoded at a time.
        pairs: images of each side, at most, in metrics of pairs of images or of pixels.
        likelihood: how bits per dimension are computed; None for none.
        held_out: the images whose bits per dimension are computed, and their labels.
        dtype: what the network computes in, see `Decoder.decode`.
        processes: the processes that share the work.
        decode_latents: makes pictures of latents, see `as_pictures`.
    """

    decoder: Decoder
    image: Float[Tensor, "N C H W"]
    label: Int[Tensor, " N"] | None
    extractors: Mapping[str, Extractor]
    features: Mapping[str, Tensor]
    samples: int
    seeds: Sequence[int]
    batch_size: int
    pairs: int
    dtype: torch.dtype | None
    processes: Processes
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    likelihood: LikelihoodConfig | None = None
    held_out: tuple[Float[Tensor, "M C H W"], Int[Tensor, " M"]] | None = None
    decode_latents: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def order(self) -> Int[Tensor, " N"]:
        """A random order of the images; a part of them is the first of this order."""
        return torch.randperm(len(self.image), generator=torch.Generator().manual_seed(0))

    def part(self, data: Float[Tensor, "N ..."]) -> Float[Tensor, "P ..."]:
        """A random part of the images or of their features, `pairs` at most."""
        return data if len(data) <= self.pairs else data[self.order[: self.pairs]]

    @cached_property
    def floors(self) -> dict[str, float]:
        """The split-half distances of the images, by metric: means over five splits."""
        found: dict[str, float] = {}
        for name, extractor in self.extractors.items():
            halves = list(random_halves(self.features[name], 5))
            parts = [(a[: self.pairs], b[: self.pairs]) for a, b in halves]
            found[extractor.distance_name] = _mean(frechet_distance(a, b) for a, b in halves)
            found[f"kd_{name}"] = _mean(kernel_distance(a, b) for a, b in parts)
        return found

    @cached_property
    def real(self) -> dict[str, float]:
        """The distances of the images trained on from those compared with, by metric."""
        return {
            self.extractors[name].distance_name: float(frechet_distance(self.features[name], seen))
            for name, seen in self.seen.items()
        }

    @property
    def metric_names(self) -> list[str]:
        """The metrics of every configuration; `seams` comes beside them where there are seams."""
        names = list(self.extractors)
        return [
            *(extractor.distance_name for extractor in self.extractors.values()),
            *(f"{self.extractors[name].distance_name}_train" for name in self.seen),
            *(f"kd_{name}" for name in names),
            *(f"{kind}_{name}" for name in names for kind in ("precision", "recall")),
            "by_band",
            *([] if self.likelihood is None else [self.likelihood.metric]),
        ]

    def decode(
        self, config: DecodeConfig, *, seed: int, start_index: int = 0, count: int
    ) -> DecodeOutput:
        """The samples `start_index … start_index + count - 1` of a seed."""
        cond = None
        if self.label is not None:
            places = (start_index + torch.arange(count)) % len(self.label)
            cond = self.label[self.order[places]]
        return self.decoder.decode(
            cond,
            config,
            num_images=count,
            seed=seed,
            start_index=start_index,
            dtype=self.dtype,
        )

    def measure(self, config: DecodeConfig) -> Measurement | None:
        """Measure a configuration; None on all processes but the main one."""
        full_batch = min(self.batch_size, self.samples)
        if self.decoder.device.type == "cuda":  # the first decoding compiles, or warms up
            self.decode(config, seed=self.seeds[0], count=full_batch)
        values: list[dict[str, Any]] = []
        full: list[_Batch] = []
        for seed in self.seeds:  # images of one seed are in memory at a time
            batches = self._batches(config, seed)
            bits = self._bits_per_dim(config, seed)
            if self.processes.is_main:
                values.append(self._metrics(config, batches) | bits)
                empty = torch.empty(0)  # the images of earlier seeds are not kept
                full += [
                    b._replace(image=empty, features={})
                    for b in batches
                    if len(b.image) == full_batch
                ]
        if not self.processes.is_main:
            return None
        names = [name for name in values[0] if all(v[name] is not None for v in values)]
        return Measurement(
            nfe=full[0].nfe,
            tokens=full[0].tokens,
            flops=self._flops(config),
            seconds=statistics.median(batch.seconds for batch in full),
            seconds_to_first_group=statistics.median(b.seconds_to_first_group for b in full),
            metrics={name: mean_std([v[name] for v in values]) for name in names},
        )

    def _batches(self, config: DecodeConfig, seed: int) -> list[_Batch]:
        """The batches of a seed from all processes; empty but on the main one."""
        starts = range(0, self.samples, self.batch_size)
        shard = self.processes.shard(len(starts))
        return self.processes.gather([self._batch(config, seed, starts[n]) for n in shard])

    def _batch(self, config: DecodeConfig, seed: int, start_index: int) -> _Batch:
        count = min(self.batch_size, self.samples - start_index)
        output = self.decode(config, seed=seed, start_index=start_index, count=count)
        image, cost = output.image.float(), output.cost
        features = {name: extractor(image).cpu() for name, extractor in self.extractors.items()}
        return _Batch(
            image.cpu(), features, cost.nfe, cost.tokens, cost.seconds, cost.seconds_to_first_group
        )

    def _metrics(self, config: DecodeConfig, batches: Sequence[_Batch]) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for name, extractor in self.extractors.items():
            real, fake = self.features[name], torch.cat([b.features[name] for b in batches])
            metrics[extractor.distance_name] = float(frechet_distance(real, fake))
            if (seen := self.seen.get(name)) is not None:
                metrics[f"{extractor.distance_name}_train"] = float(frechet_distance(seen, fake))
            real, fake = self.part(real), fake[: self.pairs]  # samples are in random order
            metrics[f"kd_{name}"] = float(kernel_distance(real, fake))
            precision, recall = precision_recall(real, fake)
            metrics[f"precision_{name}"] = float(precision)
            metrics[f"recall_{name}"] = float(recall)
        image = torch.cat([b.image for b in batches])
        if (group := self._pixel_groups(config)) is not None:
            ratio = float(seam_ratio(self.image, image, group))
            metrics["seams"] = None if math.isnan(ratio) else ratio
        bands = min(BANDS, image.shape[2])
        metrics["by_band"] = band_distances(self.part(self.image), image[: self.pairs], bands=bands)
        return metrics

    def _bits_per_dim(self, config: DecodeConfig, seed: int) -> dict[str, float]:
        """The mean over the held-out images, by the name of the metric; empty without."""
        if self.likelihood is None or self.held_out is None:
            return {}
        image, label = self.held_out
        starts = range(0, len(image), self.batch_size)
        found = []
        for n in self.processes.shard(len(starts)):
            part = slice(starts[n], starts[n] + self.batch_size)
            result = bits_per_dim(
                self.decoder,
                image[part],
                None if self.label is None else label[part],
                config=config,
                likelihood=self.likelihood,
                batch_size=self.batch_size,
                seed=seed,
                start_index=starts[n],
            )
            found.append(result.values)
        gathered = self.processes.gather(found)
        return {self.likelihood.metric: float(torch.cat(gathered).mean())} if gathered else {}

    def _pixel_groups(self, config: DecodeConfig) -> Int[Tensor, "H W"] | None:
        """The group of each pixel; None if there are no seams.

        That is so with one group, a group per pixel, or pixels that depend on several groups.
        """
        layout = self.decoder.layout
        group = config.schedule(layout).group
        raster = group[decode_order(config.order, layout.coords).argsort()]
        pixels = highest(layout, raster)
        of_one = torch.equal(pixels, -highest(layout, -raster))
        return pixels if of_one and boundaries(pixels) is not None else None

    def _flops(self, config: DecodeConfig) -> int:
        # torch's counter does not know attention on a CPU.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with FlopCounterMode(display=False, custom_mapping={attention: _sdpa_flops}) as counter:
            self.decode(config, seed=0, count=1)
        return counter.get_total_flops()


def random_halves(data: Float[Tensor, "B ..."], splits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Two random halves, several times; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(splits):
        first, second = torch.randperm(len(data), generator=generator).chunk(2)
        yield data[first], data[second]


def _mean(values: Iterable[Tensor]) -> float:
    return statistics.fmean(map(float, values))


def extract_features(
    image: Float[Tensor, "N C H W"], extractor: Extractor, *, device: torch.device
) -> Float[Tensor, "N F"]:
    """The features of many images, a part at a time."""
    if isinstance(extractor, Pixels):
        return extractor(image)  # a view of the images
    features = image.new_empty(0, 0)
    for start, part in zip(range(0, len(image), BATCH), image.split(BATCH), strict=True):
        found = extractor(part.to(device)).cpu()
        if not start:  # into one tensor: a list of parts would need the memory twice
            features = found.new_empty(len(image), found.shape[1])
        features[start : start + len(part)] = found
    return features


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def mean_std(values: Sequence[Any]) -> dict[str, Any]:
    """The mean and the standard deviation over seeds, beside the values themselves."""
    table = torch.tensor(values, dtype=torch.float64)
    # The standard deviation of a single seed is undefined, not 0.
    std = table.std(0).tolist() if len(values) > 1 else None
    return {"mean": table.mean(0).tolist(), "std": std, "values": list(values)}
