"""`rolldiff bench`: a sweep over the settings of decoding, measured, resumable, and reported.

A configuration that is in `results.jsonl` is not measured again. Settings that cannot differ (the
order of a single group, overlaps that round to the same stagger) are measured once.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

import rolldiff
from rolldiff.decoder import DecodeConfig, Decoder
from rolldiff.device import compile_in_place, named_device, named_dtype
from rolldiff.diffusion.layout import Layout
from rolldiff.diffusion.sampler import Solver
from rolldiff.diffusion.schedule import Grouping, Order, check_grouping, decode_order, groupings_of
from rolldiff.errors import UsageError, finite_number, instance, reason, warn_user, whole_number
from rolldiff.evaluation.bits import SEEN, check_dequantization, held_out
from rolldiff.evaluation.features import (
    Classifier,
    Extractor,
    as_extractor,
    short_hash,
    train_classifier,
    unclassifiable,
)
from rolldiff.evaluation.measure import (
    Evaluator,
    device_name,
    expected_cost,
    extract_features,
)
from rolldiff.evaluation.plots import COSTS
from rolldiff.evaluation.report import config_label, write_report
from rolldiff.evaluation.results import METHOD, SETTINGS, Results, Timings
from rolldiff.files import LOCK, locked, refuse_links, remove_parts
from rolldiff.hub import read_checkpoint
from rolldiff.likelihood import LikelihoodConfig
from rolldiff.likelihood.config import check_levels
from rolldiff.processes import Processes, processes
from rolldiff.trust import DATA, read_run_config, trusted_prefixes

__all__ = ["Match", "bench", "grid", "match_cost", "run_data", "smallest_distance"]

Match = Literal["nfe", "tokens", "seconds"]
Record = dict[str, Any]

# Keys of the data in run folders of version 0.1.
RENAMED_DATA = {"reference": "reference_images", "corrupt": "on_error"}

MATCHES = ("nfe", "tokens", "seconds")
RESULTS, TIMINGS, REPORT = "results.jsonl", "timings.json", "report.md"
MIN_IMAGES = 4  # precision and recall take the third neighbour of each


def bench(cfg: DictConfig, *, conf: Path) -> Path:
    """Measure what is configured and not yet measured, and write the report.

    All settings are checked before anything is written, and the results of earlier commands before
    anything is decoded. Whenever it is interrupted, the finished configurations stay, and the same
    command goes on with the others.

    Args:
        cfg: the configuration of `rolldiff bench`.
        conf: the folder of YAML files, for the library's own solvers.

    Returns:
        The run folder: `results.jsonl`, `report.md` and its pictures.

    Raises:
        UsageError: if a setting is out of range, the folder holds results of something else or
            damaged ones, or another job is writing to it.
    """
    if cfg.ckpt is None:
        raise UsageError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    folder = _folder(cfg)
    with processes() as group:
        if group.size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(group.local_rank)
        trusted = trusted_prefixes(cfg.trust)
        decoder = read_checkpoint(cfg.ckpt, Decoder, trusted=trusted)
        decoder = decoder.to(named_device(cfg.device))
        sweep = _read_sweep(cfg, decoder, conf)
        with _held(folder, group):
            results = None
            if group.is_main:
                path = folder / RESULTS
                results = Results(path, layout=decoder.layout, solvers=sweep.solvers)
            data = run_data(cfg)
            evaluator = _evaluator(cfg, sweep, decoder=decoder, data=data, group=group)
            if results is not None:
                results.require(_same(evaluator, cfg), metrics=evaluator.metric_names)
            if cfg.compile:
                compile_in_place(decoder)
            configs = sweep.configs
            if sweep.match is not None:
                configs = group.broadcast(_matched(sweep, evaluator, folder=folder))
            todo = group.broadcast([] if results is None else results.missing(configs))
            provenance = _provenance(evaluator, cfg, data) if group.is_main else {}
            show = group.is_main and cfg.progress
            with _progress(todo, len(configs), show=show) as bar:
                for config in todo:
                    measurement = evaluator.measure(config)
                    if results is not None and measurement is not None:
                        results.append(config, asdict(measurement) | provenance)
                        bar.update()
                        if show:
                            tqdm.write(_summary(results.records[-1]), file=sys.stderr)
            if results is not None:
                solvers = sweep.solvers
                write_report(results.records, folder, evaluator=evaluator, solvers=solvers)
    return folder


def smallest_distance(folder: Path) -> tuple[str, Record]:
    """The best configuration of a finished benchmark, by the distance of its first features.

    Returns:
        The name of the distance, and settings, costs and means of metrics by their names.
    """
    lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    names = [name for name in records[0]["metrics"] if name.startswith("fd_")]
    best = min(records, key=lambda record: record["metrics"][names[0]]["mean"])
    means = {name: value["mean"] for name, value in best["metrics"].items() if value is not None}
    return names[0], {name: best[name] for name in (*SETTINGS, *COSTS)} | means


def grid(
    layout: Layout,
    *,
    num_groups: Sequence[int],
    overlap: Sequence[float],
    steps: Sequence[int],
    order: Sequence[Order],
    grouping: Sequence[Grouping] = ("equal",),
    solver: Sequence[Solver],
    guidance: Sequence[float],
    joint_steps: Sequence[int] = (),
) -> list[DecodeConfig]:
    """All combinations of settings, each once.

    Args:
        layout: of the decoder.
        num_groups: see `DecodeConfig`, as for all that follow.
        overlap: of successive groups.
        steps: solver steps per group.
        order: of decoding.
        grouping: of tokens. With both, counts above the number of levels are `equal` alone.
        solver: of decoding.
        guidance: its scale.
        joint_steps: further steps for a single group, which has no other way to spend as many
            network calls as several groups do.

    Raises:
        UsageError: if a value is out of range or a list is empty.
    """
    swept = {
        "num_groups": num_groups,
        "overlap": overlap,
        "steps": steps,
        "order": order,
        "grouping": grouping,
        "solver": solver,
        "guidance": guidance,
    }
    for name, values in swept.items():
        if not values:
            raise UsageError(f"bench.{name} must hold at least one value, got none")
    found: dict[tuple[object, ...], DecodeConfig] = {}
    every = [*steps, *(s for s in joint_steps if s not in steps)]
    num_levels = len(layout.coords[:, 0].unique())
    for g, s, o, way, sizes, rule, w in product(
        num_groups, every, overlap, order, grouping, solver, guidance
    ):
        if sizes not in groupings_of(g, grouping, num_levels=num_levels):
            continue
        if g > 1 and s not in steps:
            continue
        config = DecodeConfig(
            num_groups=g,
            overlap=o,
            steps=s,
            order=way,
            grouping=sizes,
            solver=rule,
            guidance=w,
        )
        stagger = config.schedule(layout).stagger
        if g == 1:  # a single group has neither overlap nor order
            config = replace(config, overlap=0.0, order=order[0], grouping="equal")
            stagger = 0
        found.setdefault((g, stagger, s, config.order, config.grouping, rule, w), config)
    return list(found.values())


def match_cost(
    configs: Sequence[DecodeConfig], cost: Callable[[DecodeConfig], float]
) -> list[DecodeConfig]:
    """The same configurations, with the steps that bring each to the cost of a single group.

    The budgets are what a single group costs at each of the steps. A configuration gets the steps
    that bring it nearest, and is left out if it stays off by more than half of the budget.

    Args:
        configs: from `grid`.
        cost: of a configuration.

    Raises:
        UsageError: if a single group is not among the configurations.
    """
    joint = [config for config in configs if config.num_groups == 1]
    if not joint:
        raise UsageError("bench.match must have num_groups 1 among bench.num_groups, got none")
    found: dict[DecodeConfig, None] = {}
    for config in configs:
        same = [j for j in joint if (j.steps, j.solver) == (config.steps, config.solver)]
        budget = cost(next((j for j in same if j.guidance == config.guidance), same[0]))
        # Up to three times the steps, because a group may take less time per step than the image.
        trials = [replace(config, steps=steps) for steps in range(1, 3 * config.steps)]
        distance = {trial: abs(math.log(cost(trial) / budget)) for trial in trials}
        nearest = min(trials, key=distance.__getitem__)
        if distance[nearest] < math.log(1.5):
            found[nearest] = None
    return list(found)


def _progress(todo: Sequence[DecodeConfig], total: int, *, show: bool) -> Any:
    """A bar over all configurations in a terminal; elsewhere lines alone."""
    done = total - len(todo)
    if show and done:
        tqdm.write(f"{done} of {total} configurations were measured earlier", file=sys.stderr)
    hidden = not (show and sys.stderr.isatty())
    return tqdm(total=total, initial=done, unit="configuration", disable=hidden)


def _summary(record: Record) -> str:
    metrics = {k: v["mean"] for k, v in record["metrics"].items() if k.startswith(("fd_", "fid"))}
    values = {"nfe": record["nfe"], "tokens": record["tokens"], "seconds": record["seconds"]}
    text = ", ".join(f"{name} {value:.4g}" for name, value in (values | metrics).items())
    return f"{config_label(record)}: {text}"


def _folder(cfg: DictConfig) -> Path:
    """Where the results go. What is in somebody else's run folder is not written through links."""
    if cfg.run_dir is None:
        ckpt = Path(str(cfg.ckpt)).expanduser()
        folder = ckpt / "bench"
        if ckpt.is_file():
            folder = ckpt.with_name(f"{ckpt.stem}-bench")
        elif not ckpt.exists():  # the name of a repository on the Hub
            folder = Path(f"{ckpt.name}-bench")
        refuse_links(folder)
    elif cfg.run_dir == "":
        raise UsageError("run_dir must be a folder or null, got ''")
    else:
        folder = Path(str(cfg.run_dir)).expanduser()
    refuse_links(folder / RESULTS, folder / TIMINGS, folder / REPORT)
    return folder


@contextmanager
def _held(folder: Path, group: Processes) -> Iterator[None]:
    """The folder, which exists and belongs to this job; removed again if nothing was written."""
    if not group.is_main:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            if (folder / RESULTS).exists():
                (folder / RESULTS).open("ab").close()
        except OSError as error:
            raise UsageError(
                f"run_dir must be a folder that can be written, got {folder}: {reason(error)}"
            ) from error
        try:
            remove_parts(folder)
            yield
        finally:
            with suppress(OSError):
                if missing and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    for path in missing:
                        path.rmdir()


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The settings of a benchmark, each of them in range.

    Attributes:
        configs: what is decoded.
        solvers: all known ones by their names, those of the sweep first.
        match: the cost that is matched.
        samples: per seed; None for as many as there are images.
        seeds: of the noise.
        batch_size: images decoded at a time.
        pairs: images, at most, in metrics of pairs.
        features: names of extractors.
        training_images: of the run, which are compared with as well; None for none.
        likelihood: how bits per dimension are computed; None for none.
        likelihood_images: of how many images, at most.
    """

    configs: list[DecodeConfig]
    solvers: dict[str, Solver]
    match: Match | None
    samples: int | None
    seeds: list[int]
    batch_size: int
    pairs: int
    features: list[str]
    training_images: int | None
    likelihood: LikelihoodConfig | None
    likelihood_images: int


def _read_sweep(cfg: DictConfig, decoder: Decoder, conf: Path) -> _Sweep:
    swept, layout = _plain(cfg, "bench"), decoder.layout
    training = decoder.training_distribution
    if not isinstance(cfg.progress, bool):
        raise UsageError(f"progress must be true or false, got {cfg.progress!r}")
    known = _solvers(cfg, conf)
    names = _values(swept, "solver", partial(_one_of, known=list(known)))
    # The report decodes samples of earlier lines too, which may have other solvers.
    solvers = {name: known[name] for name in [*names, *known]}
    orders = swept.get("order")
    if isinstance(orders, list) and orders and all(isinstance(item, int) for item in orders):
        swept["order"] = [orders]  # one permutation
    count = partial(whole_number, maximum=layout.num_tokens)
    match = swept.get("match")
    match = None if match is None else _one_of(match, "bench.match", known=MATCHES)
    num_groups = _values(swept, "num_groups", count, default=list(training.num_groups))
    if match is not None and 1 not in num_groups:
        raise UsageError(f"bench.num_groups must hold 1 beside bench.match, got {num_groups}")
    guidance = _values(swept, "guidance", finite_number)
    if any(guidance) and not decoder.conditioning.num_classes:
        raise UsageError(
            f"bench.guidance must be 0 for a decoder without class labels, got {guidance}"
        )
    steps = _values(swept, "steps", whole_number)
    joint = _values(swept, "joint_steps", whole_number, default=[], empty=True)
    configs = grid(
        layout,
        num_groups=num_groups,
        overlap=_values(swept, "overlap", partial(finite_number, minimum=0, maximum=1)),
        steps=steps,
        joint_steps=[] if match is not None else joint,
        order=_values(
            swept, "order", partial(_order, coords=layout.coords), default=[training.orders[0]]
        ),
        grouping=_values(swept, "grouping", check_grouping, default=list(training.grouping)),
        solver=[solvers[name] for name in names],
        guidance=guidance,
    )
    seeds = _values(swept, "seeds", partial(whole_number, minimum=0))
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"bench.seeds must be different numbers, got {seeds}")
    samples = swept.get("samples")
    if samples is not None:
        samples = whole_number(samples, "bench.samples", minimum=MIN_IMAGES)
    training_images = swept.get("training_images")
    if training_images is not None:
        training_images = whole_number(training_images, "bench.training_images", minimum=MIN_IMAGES)
        if not cfg.get("data"):
            raise UsageError(
                "bench.training_images must be null without data=…, for then the images compared "
                f"with are those of the training, got {training_images}"
            )
    makers = _plain(cfg, "features")
    features = _values(swept, "features", partial(_one_of, known=list(makers)))
    for name in features:
        if not isinstance(makers[name], dict) or "_target_" not in makers[name]:
            raise UsageError(f"features.{name} must have a _target_, got {makers[name]!r}")
    return _Sweep(
        configs=configs,
        solvers=solvers,
        match=match,
        samples=samples,
        seeds=seeds,
        batch_size=whole_number(swept.get("batch_size"), "bench.batch_size", minimum=2),
        pairs=whole_number(swept.get("pairs"), "bench.pairs", minimum=MIN_IMAGES),
        features=features,
        training_images=training_images,
        likelihood=_likelihood(cfg, swept.get("likelihood"), decoder=decoder),
        likelihood_images=whole_number(swept.get("likelihood_images"), "bench.likelihood_images"),
    )


def _solvers(cfg: DictConfig, conf: Path) -> dict[str, Solver]:
    """The solvers of the library by the names of their files, and those of the user."""
    files = {path.stem: path for path in sorted((conf / "solver").glob("*.yaml"))}
    found = {name: instantiate(OmegaConf.load(path)) for name, path in files.items()}
    for name, config in _plain(cfg, "solvers").items():
        if name in files:
            raise UsageError(f"solvers.{name} must have a name of its own, got one of conf/solver")
        if not isinstance(config, dict) or "_target_" not in config:
            raise UsageError(f"solvers.{name} must have a _target_, got {config!r}")
        made = instantiate(config, _convert_="all")
        found[name] = instance(made, Solver, f"solvers.{name}", "a Solver such as Euler()")
    return found


def _likelihood(cfg: DictConfig, method: Any, *, decoder: Decoder) -> LikelihoodConfig | None:
    changed = {}  # settings that are not used are checked too
    if method is not None:
        changed["method"] = _one_of(method, "bench.likelihood", known=("ode", "bound"))
    how = instantiate(cfg.likelihood, **changed, _convert_="all")
    instance(how, LikelihoodConfig, "likelihood", "a LikelihoodConfig")
    if method is None:
        return None
    check_dequantization(how, decoder)
    return how


def _plain(cfg: DictConfig, name: str) -> dict[str, Any]:
    """A group of settings as plain dictionaries and lists."""
    if not OmegaConf.is_dict(cfg.get(name)):
        raise UsageError(f"{name} must be a group of settings, got {cfg.get(name)!r}")
    return {str(key): _contained(value) for key, value in cfg[name].items()}


def _contained(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _values(
    swept: Mapping[str, Any],
    name: str,
    check: Callable[[Any, str], Any],
    *,
    default: Any = None,
    empty: bool = False,
) -> list[Any]:
    """The values of a setting, which may be one or a list, each of them checked."""
    value = swept.get(name)
    value = default if value is None else value
    values = value if isinstance(value, list) else [value]
    if not values and not empty:
        raise UsageError(f"bench.{name} must hold at least one value, got none")
    return [check(item, f"bench.{name}") for item in values]


def _one_of(value: Any, name: str, *, known: Sequence[str]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} must be among {', '.join(known)}, got {value!r}")
    return value


def _order(value: Any, name: str, *, coords: torch.Tensor) -> Order:
    if not isinstance(value, str):
        items = value if isinstance(value, list | tuple) else [value]
        highest = len(coords) - 1
        value = tuple(whole_number(item, name, minimum=0, maximum=highest) for item in items)
    try:
        decode_order(value, coords)
    except UsageError as error:  # its message begins with the word "order"
        raise UsageError(f"bench.{error}") from error
    return value


def _evaluator(
    cfg: DictConfig, sweep: _Sweep, *, decoder: Decoder, data: DictConfig, group: Processes
) -> Evaluator:
    source = instantiate(data, _convert_="all")
    with group.main_first():
        _check_source(source, decoder)
        image, label = source.image, source.label
        _check_images(image, label, decoder=decoder)
        # A classifier had better not be trained on the images that samples are compared with.
        known = image, label
        if sweep.training_images is not None:
            own = _training_data(cfg) | {"reference_images": sweep.training_images}
            trained_on = instantiate(own, _convert_="all")
            known = trained_on.image, trained_on.label
            _check_images(*known, decoder=decoder)
    classes = decoder.conditioning.num_classes
    extractors: dict[str, Extractor] = {}
    for name in _usable(cfg, sweep.features, *known):
        with group.main_first():
            made = _extractor(cfg.features[name], *known, name=name)
        # Such as three: it is made for pictures.
        if decoder.latents and made.channels and not isinstance(made, Classifier):
            raise UsageError(
                f"bench.features must be of any image for latents, such as pixels, got {name}"
            )
        if made.name in extractors:
            raise UsageError(f"bench.features must have different names, got {made.name} again")
        extractors[made.name] = made.to(decoder.device)

    autoencoder = getattr(source, "autoencoder", None)

    def features_of(image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {n: extract_features(image, e, device=decoder.device) for n, e in extractors.items()}

    return Evaluator(
        decoder=decoder,
        image=image,
        label=label if classes else None,
        extractors=extractors,
        features=features_of(image),
        seen={} if sweep.training_images is None else features_of(known[0]),
        samples=len(image) if sweep.samples is None else sweep.samples,
        seeds=sweep.seeds,
        batch_size=sweep.batch_size,
        pairs=sweep.pairs,
        dtype=named_dtype(cfg.dtype),
        processes=group,
        likelihood=sweep.likelihood,
        held_out=None if sweep.likelihood is None else _held_out(cfg, sweep, source),
        decode_latents=None if autoencoder is None else autoencoder.decode,
    )


def _check_source(source: Any, decoder: Decoder) -> None:
    """Refuse pictures for a decoder of latents, and the reverse."""
    latents = getattr(source, "latents", decoder.latents)
    if latents != decoder.latents:
        words = {True: "latents", False: "pictures"}
        raise UsageError(
            f"data must be {words[decoder.latents]}, as the decoder's, got {words[latents]}"
        )


def _check_images(image: torch.Tensor, label: torch.Tensor, *, decoder: Decoder) -> None:
    """Refuse images and labels that are not like the decoder's."""
    shape = tuple(decoder.layout.image_shape)
    if image.shape[1:] != shape:
        found = tuple(image.shape[1:])
        raise UsageError(f"data must be images of {shape}, as the decoder's, got {found}")
    if len(image) < MIN_IMAGES:
        raise UsageError(f"data must hold {MIN_IMAGES} images or more, got {len(image)}")
    classes = decoder.conditioning.num_classes
    if classes and not 0 <= label.min() <= label.max() < classes:
        raise UsageError(
            f"data must have labels in 0 … {classes - 1}, as the decoder's, got "
            f"{label.min()} … {label.max()}"
        )


def _held_out(cfg: DictConfig, sweep: _Sweep, source: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The images whose likelihood is measured, and their labels."""
    image, label = held_out(source, sweep.likelihood_images)
    if not cfg.get("data") and not source.held_out:
        warn_user(SEEN)
    if sweep.likelihood is not None and sweep.likelihood.dequantization is not None:
        check_levels(image, sweep.likelihood.levels)
    return image, label


def _usable(
    cfg: DictConfig, names: Sequence[str], image: torch.Tensor, label: torch.Tensor
) -> list[str]:
    """The extractors without a classifier that cannot be trained on these data."""
    classifier = f"{train_classifier.__module__}.{train_classifier.__name__}"
    why = unclassifiable(image, label)
    if why is None:
        return list(names)
    kept = [n for n in names if OmegaConf.select(cfg.features, f"{n}._target_") != classifier]
    left_out = ", ".join(name for name in names if name not in kept)
    if not kept:
        raise UsageError(
            f"bench.features must hold another than {left_out} for these data: {why}; say "
            "bench.features=pixels"
        )
    if left_out:
        warn_user(f"bench.features leaves out {left_out}, which needs other data: {why}")
    return kept


def _extractor(
    cfg: DictConfig, image: torch.Tensor, label: torch.Tensor, *, name: str
) -> Extractor:
    made = instantiate(cfg)
    if not callable(made):
        raise UsageError(f"features.{name} must make a module from images to features, got {made}")
    if not isinstance(made, nn.Module):  # a function that trains one on the data
        made = made(image, label)
    return as_extractor(made, name=name)


def run_data(cfg: DictConfig) -> DictConfig:
    """The settings of the data: those of the command, or those that the run was trained with."""
    if cfg.get("data"):
        return cfg.data
    data = OmegaConf.create(_training_data(cfg))
    if cfg.get("autoencoder") is not None:
        data.autoencoder = cfg.autoencoder
    return data


def _training_data(cfg: DictConfig) -> dict[str, Any]:
    """The settings of the data that the run was trained with."""
    config = Path(str(cfg.ckpt)).expanduser() / "config.yaml"
    if not config.is_file():
        raise UsageError(f"data must be given (data=…), for there is no {config} to take it from")
    # The folder may be somebody else's.
    data = read_run_config(config, part="data", trust=cfg.trust)["data"]
    target = data.get("_target_") if isinstance(data, dict) else None
    if target not in DATA and not str(target).startswith(trusted_prefixes(cfg.trust)):
        raise UsageError(f"data of {config} must be of rolldiff.data, got {target}; say data=…")
    return {RENAMED_DATA.get(key, key): value for key, value in data.items()}


def _matched(sweep: _Sweep, evaluator: Evaluator, *, folder: Path) -> list[DecodeConfig]:
    decoder = evaluator.decoder
    layout, causal = decoder.layout, decoder.backbone.causal
    if not evaluator.processes.is_main:
        return []
    if sweep.match == "seconds":
        # Kept in a file: new timings would give a resumed benchmark other steps.
        timings = Timings(folder / TIMINGS, measure=_seconds(evaluator))
        return match_cost(sweep.configs, timings)
    which = 0 if sweep.match == "nfe" else 1
    return match_cost(sweep.configs, lambda c: expected_cost(c, layout, causal=causal)[which])


def _seconds(evaluator: Evaluator) -> Callable[[DecodeConfig], tuple[float, float]]:
    """Offset and slope of the seconds per batch, from two short decodings."""

    def measure(config: DecodeConfig) -> tuple[float, float]:
        count = min(evaluator.batch_size, evaluator.samples)
        few, many = (
            statistics.median(
                evaluator.decode(replace(config, steps=steps), seed=0, count=count).cost.seconds
                for _ in range(3)
            )
            for steps in (2, 8)
        )
        slope = max((many - few) / 6, 1e-9)
        return max(few - 2 * slope, 0.0), slope

    return measure


def _same(evaluator: Evaluator, cfg: DictConfig) -> Record:
    """What makes two lines comparable."""
    return {
        "method": METHOD,
        "checkpoint": short_hash(evaluator.decoder.state_dict()),
        "reference": short_hash({"image": evaluator.image}),
        "training": short_hash(dict(evaluator.seen)) if evaluator.seen else None,
        "extractors": {name: e.hash for name, e in evaluator.extractors.items()},
        "samples": evaluator.samples,
        "seeds": list(evaluator.seeds),
        "batch_size": evaluator.batch_size,
        "pairs": evaluator.pairs,
        "device": device_name(evaluator.decoder.device),
        "dtype": str(cfg.dtype or "default"),
        "likelihood": _likelihood_of(evaluator),
    }


def _likelihood_of(evaluator: Evaluator) -> Record | None:
    """How bits per dimension are computed, and of which images."""
    if evaluator.likelihood is None or evaluator.held_out is None:
        return None
    image, _ = evaluator.held_out
    return asdict(evaluator.likelihood) | {
        "images": len(image),
        "held_out": short_hash({"image": image}),
    }


def _provenance(evaluator: Evaluator, cfg: DictConfig, data: DictConfig) -> Record:
    """What else is worth knowing about a line."""
    return {
        "ckpt": "".join(c if c.isprintable() else "?" for c in Path(cfg.ckpt).name),
        "data": data["_target_"],
        "reference_images": len(evaluator.image),
        "floors": evaluator.floors,
        "real": evaluator.real,
        "match": cfg.bench.match,
        "processes": evaluator.processes.size,
        "threads": torch.get_num_threads(),
        "versions": {
            "rolldiff": rolldiff.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
