"""Reports: of a benchmark (`report.md`), and of a training (distances and pictures).

A training report is validated against the model before the training begins, and called when it has
ended.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.diffusion.sampler import Solver
from rolldiff.diffusion.schedule import Grouping, check_grouping
from rolldiff.errors import UsageError, finite_number, whole_number
from rolldiff.evaluation.features import Classifier
from rolldiff.evaluation.images import (
    as_pictures,
    labelled_rows,
    make_grid,
    save_gif,
    save_picture,
)
from rolldiff.evaluation.measure import Evaluator, random_halves
from rolldiff.evaluation.metrics import pixel_distance, psnr
from rolldiff.evaluation.plots import COSTS, groups_label, plot_costs, plot_matrices
from rolldiff.evaluation.results import config_of
from rolldiff.files import write_text
from rolldiff.processes import Processes
from rolldiff.progress import progress
from rolldiff.shell import command_line
from rolldiff.tokenizer import Generation, Prior, Tokenizer
from rolldiff.tokenizer.pipeline import Timing, measure_latency

__all__ = [
    "DecoderReport",
    "PriorReport",
    "Report",
    "TokenizerReport",
    "TrainingReport",
    "config_label",
    "pareto_front",
    "split_half_distance",
    "write_report",
]

T = TypeVar("T")
Record = dict[str, Any]
BATCH = 500
SHOWN = 16  # images per row of a picture
ALWAYS = ("fd_pixels_floor", "samples", "steps_per_group")  # numbers of every training report
MIN_IMAGES = 4  # for a distance: they are halved, and each half needs two


# ---------------------------------------------------------------------------------------------
# Of a benchmark


def config_label(record: Mapping[str, Any]) -> str:
    """The settings of a record in a few words; defaults are left out."""
    shape = groups_label(record["num_groups"], record["overlap"])
    return ", ".join([shape, f"{record['steps']} steps", *_variant(record)])


def _variant(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Grouping, order, solver and guidance, if they are not the default."""
    variant = []
    if record["num_groups"] > 1 and record.get("grouping", "equal") != "equal":
        variant.append("by levels")
    if record["num_groups"] > 1 and record["order"] != "top_to_bottom":
        variant.append(_order_name(record["order"]))
    if record["solver"] != "euler":
        variant.append(record["solver"])
    if record["guidance"]:
        variant.append(f"guidance {record['guidance']:g}")
    return tuple(variant)


def _order_name(order: str | Sequence[int]) -> str:
    """A named order, or a short name for a permutation, whose numbers would fill the page."""
    if isinstance(order, str):
        return order
    digest = hashlib.sha256(" ".join(map(str, order)).encode()).hexdigest()
    return f"permutation {digest[:6]}"


def pareto_front(records: Sequence[Record], *, cost: str, metric: str) -> list[Record]:
    """The records that no cheaper record beats, from the cheapest on."""
    front: list[Record] = []

    def value(record: Record) -> float:
        return record["metrics"][metric]["mean"]

    for record in sorted(records, key=lambda r: (r[cost], value(r))):
        if not front or value(record) < value(front[-1]):
            front.append(record)
    return front


def write_report(
    records: Sequence[Record],
    folder: Path,
    *,
    evaluator: Evaluator,
    solvers: Mapping[str, Solver],
) -> None:
    """Write `report.md`, `cost*.png`, `samples_equal_*.png` and `matrices.png` from the records.

    The text comes last: an earlier report stays until all its pictures are there.
    """
    distances = [extractor.distance_name for extractor in evaluator.extractors.values()]
    floors = evaluator.floors
    parts = [_setup(records[0], distances[0], evaluator=evaluator)]
    variants = _variants(records)
    usual = next(iter(variants.values()))
    samples = _samples(usual, folder, evaluator=evaluator, solvers=solvers, metric=distances[0])
    for variant, members in variants.items():
        title = ", ".join(variant) or "top to bottom, Euler"
        file = "-".join(["cost", *(word.replace(" ", "_") for word in variant)]) + ".png"
        plot_costs(members, folder / file, metrics=distances, title=title, floors=floors)
        columns = [*distances, *_other_metrics(evaluator)]
        near = {name: floors[name] for name in distances if floors[name] > 0}
        table = _table(members, columns, metric=distances[0], floors=near)
        parts += [
            f"## {title[0].upper()}{title[1:]}\n",
            f"![metrics against cost]({file})\n",
            table,
        ]
    parts.append(samples)
    shapes = sorted({(r["num_groups"], r["overlap"]) for r in usual})
    steps = sorted({record["steps"] for record in usual})
    plot_matrices(shapes, steps[len(steps) // 2], folder / "matrices.png")
    parts.append("## When each group moves\n\n![scheduling matrices](matrices.png)\n")
    write_text(folder / "report.md", "\n".join(parts))


def _setup(record: Record, metric: str, *, evaluator: Evaluator) -> str:
    labels = evaluator.label is not None
    halves = ", ".join(f"{name} {value:.3g}" for name, value in evaluator.floors.items())
    return f"""# Quality against cost

Checkpoint `{record["ckpt"]}` ({record["checkpoint"]}), compared with {record["reference_images"]}
images of {record["data"]} ({record["reference"]}). {record["samples"]} samples for each of
{len(record["seeds"])} seeds per configuration; sample `i` has the same noise\
{" and label" if labels else ""} in every configuration. {record["device"]}, \
{record["threads"]} threads, {record["processes"]} process(es), torch \
{record["versions"]["torch"]}; seconds are for a batch of \
{min(record["batch_size"], record["samples"])}.

Metrics are means over the seeds, with their standard deviation. With few seeds the standard
deviation is itself uncertain, and the best of many configurations is a little better than it would
be with new seeds. A cost in bold marks the Pareto front of `{metric}`: no configuration with a
lower cost of this kind has a lower distance. Grouping spends more network calls on fewer tokens
each, so a result at equal tokens need not hold at equal NFE.

Split-half distances, between two random halves of the data: {halves}. Halves are smaller sets than
those compared here, so lower distances are possible. They say nothing about images outside of the
data. A number in brackets is a distance over its split-half distance. `results.jsonl` holds every
seed, and `by_band`, the pixel-space distance of each quarter from the top down.
{_seen(evaluator)}{_extractors(evaluator)}"""


def _seen(evaluator: Evaluator) -> str:
    """What a distance from the images trained on is to be compared with."""
    if not evaluator.seen:
        return ""
    count = len(next(iter(evaluator.seen.values())))
    real = ", ".join(f"{name} {value:.3g}" for name, value in evaluator.real.items())
    return (
        f"\nA name that ends in `_train` is a distance from {count} images of the training. They "
        f"are themselves {real} from the images compared with. Samples that are nearer to the "
        "images of the training than to the others are memorised in part.\n"
    )


def _extractors(evaluator: Evaluator) -> str:
    """What is to be known about the extractors to judge their distances."""
    sentences = []
    count = min(len(evaluator.image), evaluator.samples)
    for name, extractor in evaluator.extractors.items():
        if isinstance(extractor, Classifier):
            sentences.append(
                f"The classifier is right on {extractor.accuracy:.1%} of the images that were held "
                "out of its training."
            )
        size = evaluator.features[name].shape[1]
        if count <= size:
            sentences.append(
                f"`{extractor.distance_name}` has {size} features and {count} images: it is far "
                "above that of large sets, and comparable at equal numbers of images only."
            )
    return "".join(f"\n{sentence}\n" for sentence in sentences)


def _variants(records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Records by grouping, order, solver and guidance; a single group is in all of a solver."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record["num_groups"] > 1:
            found.setdefault(_variant(record), []).append(record)
    for record in records:
        if record["num_groups"] == 1:
            same = [
                members
                for members in found.values()
                if all(members[0][key] == record[key] for key in ("solver", "guidance"))
            ]
            for members in same or [found.setdefault(_variant(record), [])]:
                members.append(record)
    return found


def _other_metrics(evaluator: Evaluator) -> list[str]:
    names = list(evaluator.extractors)
    return [
        *(f"{evaluator.extractors[name].distance_name}_train" for name in evaluator.seen),
        *(f"kd_{name}" for name in names),
        *(f"{kind}_{name}" for name in names for kind in ("precision", "recall")),
        "seams",
        *([] if evaluator.likelihood is None else [evaluator.likelihood.metric]),
    ]


def _table(
    records: Sequence[Record], metrics: Sequence[str], *, metric: str, floors: Mapping[str, float]
) -> str:
    fronts = {cost: pareto_front(records, cost=cost, metric=metric) for cost in COSTS}
    heads = ["NFE", "tokens", "seconds", "to the first group", "MFLOP per image", *metrics]
    lines = ["| configuration | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for record in sorted(records, key=lambda r: (r["num_groups"], r["overlap"], r["steps"])):
        costs = []
        for cost, front in fronts.items():
            text = f"{record[cost]:.3g}" if cost == "seconds" else f"{record[cost]:,}"
            costs.append(f"**{text}**" if record in front else text)
        others = [f"{record['seconds_to_first_group']:.3g}", f"{record['flops'] / 1e6:.4g}"]
        values = [_mean_std(record["metrics"].get(n), floor=floors.get(n)) for n in metrics]
        lines.append(f"| {config_label(record)} | " + " | ".join([*costs, *others, *values]) + " |")
    return "\n".join(lines) + "\n"


def _mean_std(metric: dict[str, Any] | None, *, floor: float | None = None) -> str:
    if metric is None:
        return "–"
    spread = "" if metric["std"] is None else f" ± {metric['std']:.2g}"
    ratio = "" if floor is None else f" ({metric['mean'] / floor:.1f})"
    return f"{metric['mean']:.3g}{spread}{ratio}"


def _samples(
    records: Sequence[Record],
    folder: Path,
    *,
    evaluator: Evaluator,
    solvers: Mapping[str, Solver],
    metric: str,
) -> str:
    """For each group count, the samples of the most expensive record within the joint budget."""
    parts = ["## Samples\n"]
    joint = [record for record in records if record["num_groups"] == 1] or list(records)
    for cost in ("nfe", "tokens"):
        budget = max(record[cost] for record in joint)
        # The first samples have the labels of these images.
        rows = {"data": _shown(evaluator.image[evaluator.order[:SHOWN]], evaluator)}
        for num_groups in sorted({record["num_groups"] for record in records}):
            affordable = [
                r for r in records if r["num_groups"] == num_groups and r[cost] <= 1.1 * budget
            ]
            if affordable:
                best = max(affordable, key=lambda r: (r[cost], -r["metrics"][metric]["mean"]))
                config = config_of(best, solvers)
                output = evaluator.decode(config, seed=evaluator.seeds[0], count=SHOWN)
                image = _shown(output.image.cpu(), evaluator)
                rows[f"{config_label(best)}: {cost} {best[cost]:,}"] = image
        file = f"samples_equal_{cost}.png"
        save_picture(labelled_rows(rows), folder / file)
        parts.append(
            f"At {cost} {budget:,}, or the nearest measured below:\n\n![samples]({file})\n"
        )
    return "\n".join(parts)


def _shown(image: Tensor, evaluator: Evaluator) -> Tensor:
    return as_pictures(image, evaluator.decode_latents) if evaluator.decoder.latents else image


def split_half_distance(image: Float[Tensor, "B C H W"], *, splits: int = 10) -> float | None:
    """The mean pixel-space distance between two random halves of the images; None of too few."""
    if len(image) < MIN_IMAGES:
        return None
    return fmean(pixel_distance(a, b) for a, b in random_halves(image, splits))


# ---------------------------------------------------------------------------------------------
# Of a training


class Report(NamedTuple):
    """What a training report found.

    Attributes:
        values: for `summary.json`.
        table: for a terminal.
        try_next: a command to try next.
    """

    values: dict[str, Any]
    table: str
    try_next: str


@dataclass(frozen=True, kw_only=True)
class TrainingReport(ABC):
    """What is measured and drawn when a training has ended.

    Args:
        steps: solver steps per group.
        samples: images, at most, that are compared.
        grouping: see `DecodeConfig`; the first of several.

    Raises:
        UsageError: if a setting is out of range.
    """

    held_out: ClassVar[bool] = False  # whether to measure on the images that the data holds out
    steps: int = 16
    samples: int = 2000
    grouping: Grouping | Sequence[Grouping] = "equal"

    def __post_init__(self) -> None:
        several = isinstance(self.grouping, Sequence) and not isinstance(self.grouping, str)
        first = self.grouping[0] if several and self.grouping else self.grouping
        self._set("grouping", check_grouping(first, "report.grouping"))
        self._set("steps", whole_number(self.steps, "report.steps"))
        self._set("samples", whole_number(self.samples, "report.samples", minimum=MIN_IMAGES))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # only on the way into a frozen instance

    def config(self, num_groups: int, overlap: float = 0.0) -> DecodeConfig:
        """The settings of a decoding with so many groups."""
        grouping = check_grouping(self.grouping)
        return DecodeConfig(
            num_groups=num_groups, overlap=overlap, steps=self.steps, grouping=grouping
        )

    @abstractmethod
    def configs(self) -> list[DecodeConfig]:
        """The settings that it decodes with."""

    @abstractmethod
    def decoder_of(self, model: Any) -> Decoder:
        """The decoder of a model."""

    def number_names(self) -> Sequence[str]:
        """Dotted names of the numbers that it will report; none if they are not known before."""
        return ()

    @abstractmethod
    def __call__(
        self,
        model: Any,
        image: Float[Tensor, "B C H W"],
        *,
        label: Int[Tensor, " B"],
        folder: Path,
        seed: int,
        group: Processes = Processes(),
    ) -> Report | None:
        """Measure, and write pictures to the folder.

        The images are decoded by all processes of a group; the main one does the rest, and has the
        report.
        """

    def validate(self, model: Any) -> None:
        """Refuse, before the training, what could only fail after it.

        Raises:
            UsageError: if the model cannot do what the report asks for.
        """
        layout = self.decoder_of(model).layout
        for config in self.configs():
            whole_number(config.num_groups, "report.num_groups", maximum=layout.num_tokens)
            try:
                config.schedule(layout)
            except UsageError as error:  # its message begins with the words "num_groups"
                raise UsageError(f"report.{error}") from error

    def subsample(self, image: Tensor, label: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """At most `samples` images and their labels, drawn without replacement."""
        if len(image) <= self.samples:
            return image, label
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(image), generator=generator)[: self.samples]
        return image[chosen], label[chosen]


def _group_counts(value: Any) -> tuple[int, ...]:
    """Group counts; one number is taken for a list of it."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise UsageError("report.num_groups must hold at least one value, got none")
    # Each once: training may list one more often to draw it more often.
    return tuple(dict.fromkeys(whole_number(item, "report.num_groups") for item in values))


def _distance(real: Tensor, fake: Tensor) -> float | None:
    """The pixel-space distance; None of too few images, which do not end a training in an error."""
    return pixel_distance(real, fake) if len(real) >= MIN_IMAGES else None


def _cell(value: float | None) -> str:
    return "too few images" if value is None else f"{value:9.3f}"


def _chosen(label: Tensor | None, total: int, *, count: int, seed: int) -> Int[Tensor, " count"]:
    """Random images for a picture, cyclic; with labels as many of each class as possible, in turn.

    Args:
        label: of the images; None for none.
        total: the number of images.
        count: how many are chosen.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    if label is None:
        return order[torch.arange(count) % total]
    classes = label.unique()
    if len(classes) > count:
        classes = classes[torch.randperm(len(classes), generator=generator)[:count].sort().values]
    members = [order[label[order] == c] for c in classes]
    places = (divmod(i, len(members)) for i in range(count))
    return torch.stack([members[c][n % len(members[c])] for n, c in places])


def _measured(items: Sequence[T], group: Processes) -> Iterable[T]:
    """The same items, with the main process's progress."""
    return progress(items, "measuring") if group.is_main else items


def _batches(count: int, group: Processes) -> Iterator[slice]:
    """The batches of this process, of so many images; each process has one if there are enough."""
    size = min(BATCH, math.ceil(count / group.size))
    starts = range(0, count, size)
    return (slice(starts[n], min(starts[n] + size, count)) for n in group.shard(len(starts)))


def as_trained(config: DecodeConfig, decoder: Decoder) -> DecodeConfig:
    """The settings with the order and the overlap that are nearest among the trained ones."""
    trained = decoder.training_distribution
    order = config.order if config.order in trained.orders else trained.orders[0]
    return replace(config, order=order, overlap=trained.nearest_overlap(config.overlap))


def _decode_all(
    decoder: Decoder,
    cond: Tensor | None,
    config: DecodeConfig,
    *,
    count: int,
    seed: int,
    group: Processes,
) -> Float[Tensor, "B C H W"] | None:
    """`count` images, a batch at a time, by all processes; None but on the main one."""
    parts = []
    for here in _batches(count, group):
        part = None if cond is None else cond[here]
        output = decoder.decode(
            part, config, num_images=here.stop - here.start, seed=seed, start_index=here.start
        )
        parts.append(output.image.cpu())
    gathered = group.gather(parts)
    return torch.cat(gathered) if group.is_main else None


@dataclass(frozen=True, kw_only=True)
class GroupCountReport(TrainingReport):
    """A report that compares several group counts at overlap 0, or the nearest that was trained."""

    num_groups: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("num_groups", _group_counts(self.num_groups))

    def configs(self) -> list[DecodeConfig]:
        return [self.config(g) for g in self.num_groups]

    def trained_configs(self, decoder: Decoder) -> list[DecodeConfig]:
        """The settings, at an overlap and in an order that the decoder was trained for."""
        return [as_trained(config, decoder) for config in self.configs()]

    def number_names(self) -> Sequence[str]:
        return [*(f"fd_pixels.{g}" for g in self.num_groups), *ALWAYS]


@dataclass(frozen=True, kw_only=True)
class DecoderReport(GroupCountReport):
    """Of a decoder: the distance of samples to the data, and pictures, for several group counts.

    Args:
        num_groups: the group counts.
        steps: solver steps per group.
        grouping: of the decoding.
        samples: images, at most, that as many samples are compared with.
        decode_latents: makes pictures of latents, see `as_pictures`. Distances are between the
            latents themselves.
    """

    decode_latents: Callable[[Tensor], Tensor] | None = None

    def decoder_of(self, model: Decoder) -> Decoder:
        return model

    def __call__(
        self,
        model: Decoder,
        image: Tensor,
        *,
        label: Tensor,
        folder: Path,
        seed: int,
        group: Processes = Processes(),
    ) -> Report | None:
        image, label = self.subsample(image, label, seed=seed)
        cond = label if model.conditioning.num_classes else None
        if group.is_main:
            self.pictures(model, image, label=cond, folder=folder, seed=seed)
        distances: dict[str, float | None] = {}
        for config in _measured(self.trained_configs(model), group):
            fake = _decode_all(model, cond, config, count=len(image), seed=seed, group=group)
            if fake is not None:
                distances[str(config.num_groups)] = _distance(image, fake)
        if not group.is_main:
            return None
        floor = split_half_distance(image)
        lines = ["num_groups  fd_pixels"]
        lines += [f"{groups:>10}  {_cell(value)}" for groups, value in distances.items()]
        lines += [f"{'(floor)':>10}  {_cell(floor)}  two halves of the data"]
        grouped = {g: value or 0.0 for g, value in distances.items() if g != "1"} or {"1": 0.0}
        best = int(min(grouped, key=grouped.__getitem__))
        config = as_trained(self.config(best, overlap=0.5), model)
        settings = {
            "ckpt": folder,
            "num_groups": best,
            **({} if self.grouping == "equal" else {"grouping": self.grouping}),
            **({} if config.order == "top_to_bottom" else {"order": config.order}),
            "overlap": config.overlap,
            "steps": 16,
            "num_images": 64,
            "out": "latents.safetensors" if model.latents else "images.png",
        }
        return Report(
            {
                "fd_pixels": distances,
                "fd_pixels_floor": floor,
                "samples": len(image),
                "steps_per_group": self.steps,
            },
            "\n".join(lines),
            command_line("decode", settings),
        )

    def pictures(
        self,
        decoder: Decoder,
        image: Tensor,
        *,
        label: Tensor | None,
        folder: Path,
        seed: int,
        count: int = 20,
    ) -> None:
        """Write `samples.png`, a row per `num_groups`, and `stream.gif`, a batch in progress."""

        def pictures(image: Tensor) -> Tensor:
            return as_pictures(image, self.decode_latents) if decoder.latents else image

        chosen = _chosen(label, len(image), count=count, seed=seed)
        cond = None if label is None else label[chosen]
        title = "data"
        if decoder.latents and self.decode_latents is None:
            title = f"{title}, first of {image.shape[1]} channels"
        rows = {title: pictures(image[chosen])}
        for config in self.trained_configs(decoder):
            output = decoder.decode(cond, config, num_images=count, seed=seed)
            rows[f"num_groups {config.num_groups}"] = pictures(output.image)
        save_picture(labelled_rows(rows), folder / "samples.png")
        groups = min(self.num_groups, key=lambda g: abs(g - 8))  # enough to see them move
        config = as_trained(self.config(groups, 0.5 if groups > 1 else 1.0), decoder)
        frames = decoder.stream(cond, config, num_images=count, seed=seed)
        grids = (make_grid(pictures(frame.image), columns=10) for frame in frames)
        save_gif(grids, folder / "stream.gif")


@dataclass(frozen=True, kw_only=True)
class TokenizerReport(GroupCountReport):
    """Of a tokenizer: the quality of reconstructions, for several group counts.

    The images are those that the data holds out, if it holds out any.

    Args:
        num_groups: the group counts.
        steps: solver steps per group.
        samples: images, at most.
    """

    held_out: ClassVar[bool] = True

    def number_names(self) -> Sequence[str]:
        codes = ("tokens_per_image", "codes", "bits_per_image", "bits_per_pixel", "codes_in_use")
        return [*super().number_names(), *(f"psnr.{g}" for g in self.num_groups), *codes]

    def decoder_of(self, model: Tokenizer) -> Decoder:
        return model.decoder

    @torch.no_grad()
    def __call__(
        self,
        model: Tokenizer,
        image: Tensor,
        *,
        label: Tensor,
        folder: Path,
        seed: int,
        group: Processes = Processes(),
    ) -> Report | None:
        image, _ = self.subsample(image, label, seed=seed)
        codes = torch.cat([model.encode(part.to(model.device)) for part in image.split(BATCH)])
        latents = model.dequantize(codes)
        chosen = _chosen(None, len(image), count=min(SHOWN, len(image)), seed=seed)
        rows = {"data": image[chosen]}
        ratios: dict[str, float] = {}
        distances: dict[str, float | None] = {}
        for config in _measured(self.trained_configs(model.decoder), group):
            fake = _decode_all(
                model.decoder, latents, config, count=len(image), seed=seed, group=group
            )
            if fake is None:
                continue
            rows[f"num_groups {config.num_groups}"] = fake[chosen]
            ratios[str(config.num_groups)] = psnr(image, fake)
            distances[str(config.num_groups)] = _distance(image, fake)
        if not group.is_main:
            return None
        save_picture(labelled_rows(rows), folder / "reconstructions.png")
        used = codes.flatten().bincount(minlength=model.codebook_size) / codes.numel()
        perplexity = float((-(used * used.clamp(min=1e-12).log()).sum()).exp())
        bits = model.num_tokens * math.log2(model.codebook_size)
        per_pixel = bits / math.prod(image.shape[2:])
        lines = ["num_groups  psnr (dB)  fd_pixels"]
        lines += [f"{g:>10}  {ratios[g]:9.2f}  {_cell(distances[g])}" for g in ratios]
        lines += [
            f"{model.num_tokens} codes of {model.codebook_size} per image: {bits:.0f} bits, "
            f"{per_pixel:.3f} per pixel"
        ]
        return Report(
            {
                "psnr": ratios,
                "fd_pixels": distances,
                "fd_pixels_floor": split_half_distance(image),
                "tokens_per_image": model.num_tokens,
                "codes": model.codebook_size,
                "bits_per_image": bits,
                "bits_per_pixel": per_pixel,
                "codes_in_use": perplexity,
                "samples": len(image),
                "steps_per_group": self.steps,
            },
            "\n".join(lines),
            command_line("train", {"experiment": "prior", "tokenizer": folder}),
        )


@dataclass(frozen=True, kw_only=True)
class PriorReport(TrainingReport):
    """Of a prior and its tokenizer: the distance of generated images, and the time to see them.

    Args:
        tokenizer: the tokenizer whose codes the prior generates, or its run folder.
        num_groups: groups of the decoding.
        overlap: of successive groups.
        steps: solver steps per group.
        samples: images, at most, that as many generated ones are compared with.
    """

    tokenizer: Tokenizer | str
    num_groups: int = 4
    overlap: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("num_groups", whole_number(self.num_groups, "report.num_groups"))
        overlap = finite_number(self.overlap, "report.overlap", minimum=0, maximum=1)
        self._set("overlap", overlap)

    def configs(self) -> list[DecodeConfig]:
        return [self.config(self.num_groups, self.overlap)]

    def number_names(self) -> Sequence[str]:
        own = ("fd_pixels", "sequences_in_data", "tokens_per_image", "num_groups", "overlap")
        ways = ("while_generated", "all_codes_first")
        timings = (f"{way}.{field.name}" for way in ways for field in fields(Timing))
        return [*own, *timings, *ALWAYS]

    def decoder_of(self, model: Prior) -> Decoder:
        return self._tokenizer(model).decoder

    def _tokenizer(self, model: Prior) -> Tokenizer:
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.to(model.device)
        return Tokenizer.from_pretrained(self.tokenizer).to(model.device)

    @torch.no_grad()
    def __call__(
        self,
        model: Prior,
        image: Tensor,
        *,
        label: Tensor,
        folder: Path,
        seed: int,
        group: Processes = Processes(),
    ) -> Report | None:
        tokenizer, (config,) = self._tokenizer(model), self.configs()
        image, label = self.subsample(image, label, seed=seed)
        labelled = bool(model.conditioning.parts)
        parts = []
        for here in _measured(list(_batches(len(image), group)), group):
            n, start = here.stop - here.start, here.start
            cond = label[here] if labelled else None
            generated = model.generate(cond, num_images=n, seed=seed, start_index=start)
            codes = torch.stack(list(generated), dim=1)
            latents = tokenizer.dequantize(codes)
            output = tokenizer.decoder.decode(latents, config, seed=seed, start_index=start)
            parts.append((output.image.cpu(), codes.cpu()))
        gathered = group.gather(parts)
        if not group.is_main:
            return None
        fake, codes = (torch.cat(part) for part in zip(*gathered, strict=True))
        real = torch.cat([tokenizer.encode(part.to(model.device)) for part in image.split(BATCH)])
        seen = {tuple(sequence) for sequence in real.tolist()}
        known = sum(tuple(s) in seen for s in codes.tolist()) / len(image)
        classes = label if labelled else None
        chosen = _chosen(classes, len(image), count=min(20, len(image)), seed=seed)
        rows = {"data": image[chosen], "generated": fake[chosen]}
        save_picture(labelled_rows(rows), folder / "samples.png")
        generation = Generation(
            model,
            tokenizer,
            cond=int(label[0]) if labelled else None,
            seed=seed,
            config=config,
        )
        measure_latency(generation, wait=False)  # warm up
        streamed = measure_latency(generation, wait=False)
        waited = measure_latency(generation, wait=True)
        frames = (make_grid(frame.image) for frame in generation.stream())
        save_gif(frames, folder / "stream.gif")
        distance = _distance(image, fake)
        settings: dict[str, Any] = {
            "prior": folder,
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else "TOKENIZER",
            **({"label": int(label[0])} if labelled else {}),
            "num_groups": self.num_groups,
            "out": "stream.gif",
        }
        table = [
            f"generated images: fd_pixels {_cell(distance).strip()}",
            f"code sequences that occur in the data: {known:.0%}",
            f"first row after {streamed.first_row:.3f} s ({streamed.codes_at_first_row} of "
            f"{model.num_tokens} codes), whole image after {streamed.whole:.3f} s",
            f"all codes first: first row after {waited.first_row:.3f} s, whole image after "
            f"{waited.whole:.3f} s",
        ]
        return Report(
            {
                "fd_pixels": distance,
                "fd_pixels_floor": split_half_distance(image),
                "sequences_in_data": known,
                "tokens_per_image": model.num_tokens,
                "while_generated": asdict(streamed),
                "all_codes_first": asdict(waited),
                "samples": len(image),
                "num_groups": self.num_groups,
                "overlap": self.overlap,
                "steps_per_group": self.steps,
            },
            "\n".join(table),
            command_line("generate", settings),
        )
