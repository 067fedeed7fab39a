"""One cell: images of one setting, drawn for every seed, and what is measured on them.

Sample `i` of a seed has the same noise and the same label in every cell, so that settings are
compared on the same draws.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rolldiff.bench.settings import Setting
from rolldiff.bench.share import Share
from rolldiff.decoder import Decoded, Decoder
from rolldiff.evaluation.features import Extractor
from rolldiff.evaluation.metrics import (
    band_distances,
    boundaries,
    frechet_distance,
    kernel_distance,
    precision_recall,
    seam_ratio,
)
from rolldiff.grouping import Grouping, decode_order
from rolldiff.step import Step

__all__ = ["Bench", "Cell", "features_of"]

BANDS = 4


class _Batch(NamedTuple):
    """What one process hands over: a batch of one seed."""

    image: Tensor
    features: dict[str, Tensor]
    nfe: int
    tokens: int
    seconds: float
    seconds_to_first_group: float


@dataclass(frozen=True)
class Cell:
    """What was measured at one setting.

    Attributes:
        nfe: network calls in series.
        tokens: token evaluations for one image.
        flops: floating-point operations for one image, by torch's counter.
        seconds: of decoding one batch, the median over batches and seeds.
        seconds_to_first_group: until its first group was final, likewise.
        metrics: for each, `values` (one a seed), their `mean` and their `std`; a metric of several
            parts has lists in these.
    """

    nfe: int
    tokens: int
    flops: int
    seconds: float
    seconds_to_first_group: float
    metrics: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """What all cells have in common.

    Attributes:
        decoder: the decoder.
        image: the images that samples are compared to.
        label: their labels; sample `i` gets that of image `i`, going round. None draws without.
        extractors: by name.
        features: of the images, by the same names.
        samples: images a seed.
        seeds: of the noise.
        batch_size: images decoded at a time.
        pairs: images of each side, at most, in metrics that look at pairs of them or at pixels.
        dtype: what the network computes in, see `Decoder.decode`.
        share: the processes.
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
    share: Share

    def decode(
        self, setting: Setting, step: Step, *, seed: int, first: int = 0, count: int
    ) -> Decoded:
        """The samples `first … first + count - 1` of a seed."""
        cond = None
        if self.label is not None:
            cond = self.label[(first + torch.arange(count)) % len(self.label)]
        return self.decoder.decode(
            cond,
            num_images=count,
            num_groups=setting.num_groups,
            overlap=setting.overlap,
            steps=setting.steps,
            order=setting.order,
            step=step,
            guidance=setting.guidance,
            seed=seed,
            first=first,
            dtype=self.dtype,
        )

    def cell(self, setting: Setting, step: Step) -> Cell | None:
        """Measure a setting; None on all processes but the leading one."""
        firsts = [(seed, n) for seed in self.seeds for n in range(0, self.samples, self.batch_size)]
        if self.decoder.device.type == "cuda":  # the first decode compiles, or warms up
            self.decode(setting, step, seed=self.seeds[0], count=min(self.batch_size, self.samples))
        mine = [self._batch(setting, step, *firsts[n]) for n in self.share.mine(len(firsts))]
        batches = self.share.gather(mine)
        if not self.share.leads:
            return None
        full = [b for b in batches if len(b.image) == min(self.batch_size, self.samples)]
        each = len(batches) // len(self.seeds)
        values = [
            self._metrics(setting, batches[i : i + each]) for i in range(0, len(batches), each)
        ]
        return Cell(
            nfe=batches[0].nfe,
            tokens=batches[0].tokens,
            flops=self._flops(setting, step),
            seconds=statistics.median(b.seconds for b in full),
            seconds_to_first_group=statistics.median(b.seconds_to_first_group for b in full),
            metrics={name: _spread([v[name] for v in values]) for name in values[0]},
        )

    def _batch(self, setting: Setting, step: Step, seed: int, first: int) -> _Batch:
        count = min(self.batch_size, self.samples - first)
        decoded = self.decode(setting, step, seed=seed, first=first, count=count)
        image = decoded.image.float()
        features = {name: extractor(image).cpu() for name, extractor in self.extractors.items()}
        cost = decoded.cost
        return _Batch(
            image.cpu(), features, cost.nfe, cost.tokens, cost.seconds, cost.seconds_to_first_group
        )

    def _metrics(self, setting: Setting, batches: Sequence[_Batch]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, extractor in self.extractors.items():
            real, fake = self.features[name], torch.cat([b.features[name] for b in batches])
            found[extractor.distance_name] = float(frechet_distance(real, fake))
            real, fake = real[: self.pairs], fake[: self.pairs]
            found[f"kd_{name}"] = float(kernel_distance(real, fake))
            precision, recall = precision_recall(real, fake)
            found[f"precision_{name}"] = float(precision)
            found[f"recall_{name}"] = float(recall)
        real, fake = self.image, torch.cat([b.image for b in batches])
        if (group := self._groups(setting)) is not None:
            found["seams"] = float(seam_ratio(real, fake, group))
        bands = min(BANDS, real.shape[2])
        found["by_band"] = band_distances(real[: self.pairs], fake[: self.pairs], bands=bands)
        return found

    def _groups(self, setting: Setting) -> Int[Tensor, "H W"] | None:
        """The group of each pixel; None if seams mean nothing: one group, or a group a pixel."""
        layout = self.decoder.layout
        grouping = Grouping(layout.num_tokens, setting.num_groups)
        raster = torch.empty_like(grouping.group)
        raster[decode_order(setting.order, layout.coords)] = grouping.group
        tokens = raster[None, :, None].expand(1, -1, layout.token_dim).float()
        group = layout.image(tokens)[0, 0].long()
        return group if boundaries(group) is not None else None

    def _flops(self, setting: Setting, step: Step) -> int:
        # torch's counter leaves out attention on a CPU.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with FlopCounterMode(display=False, custom_mapping={attention: _attention}) as counter:
            self.decode(setting, step, seed=0, count=1)
        return counter.get_total_flops()


def features_of(
    image: Float[Tensor, "N C H W"], extractor: Extractor, *, device: torch.device
) -> Float[Tensor, "N F"]:
    """The features of many images, some at a time."""
    return torch.cat([extractor(part.to(device)).cpu() for part in image.split(500)])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _spread(values: list[Any]) -> dict[str, Any]:
    table = torch.tensor(values, dtype=torch.float64)
    # One seed has no spread; that is not a spread of 0.
    std = table.std(0).tolist() if len(values) > 1 else None
    return {"mean": table.mean(0).tolist(), "std": std, "values": values}
