"""`rolldiff bench`: a sweep over the settings of decoding, measured, resumable, and reported.

`results.jsonl` has one line per configuration: its settings, its cost, its metrics, and what makes
it comparable with the others. A configuration that is in the file is not measured again. Settings
that cannot differ (the order of a single group, overlaps that round to the same stagger) are
measured once.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
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
from rolldiff.diffusion.sampler import Solver
from rolldiff.errors import UsageError
from rolldiff.evaluation.features import Extractor, as_extractor, short_hash
from rolldiff.evaluation.measure import (
    Evaluator,
    Processes,
    device_name,
    expected_cost,
    extract_features,
    processes,
)
from rolldiff.evaluation.report import config_label, write_report
from rolldiff.hub import read_checkpoint

__all__ = ["Match", "Results", "Timings", "bench", "grid", "match_cost"]

Match = Literal["nfe", "tokens", "seconds"]
Record = dict[str, Any]

# Keys of the data in run folders of version 0.1.
RENAMED_DATA = {"reference": "reference_images", "corrupt": "on_error"}


def bench(cfg: DictConfig, *, conf: Path) -> Path:
    """Measure what is configured and not yet measured, and write the report.

    Args:
        cfg: the configuration of `rolldiff bench`.
        conf: the folder of YAML files, for the solvers.

    Returns:
        The run folder: `results.jsonl`, `report.md` and its pictures.

    Raises:
        UsageError: if a setting is out of range, or the folder holds results of something else.
    """
    if cfg.ckpt is None:
        raise UsageError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    folder = Path(cfg.run_dir or _default_folder(Path(cfg.ckpt)))
    with processes() as group:
        decoder = read_checkpoint(cfg.ckpt, Decoder).to(named_device(cfg.device))
        solvers = {name: _solver(name, conf) for name in cfg.bench.solver}
        configs = _configs(cfg, decoder, solvers)
        evaluator = _evaluator(cfg, decoder, group)
        if cfg.compile:
            compile_in_place(decoder)
        if cfg.bench.match is not None:
            configs = group.broadcast(_matched(cfg.bench.match, configs, evaluator, folder=folder))
        same, provenance = _same(evaluator, cfg), _provenance(evaluator, cfg)
        results = None
        if group.is_main:
            results = Results(folder / "results.jsonl", same=same, solvers=solvers)
            # The report decodes samples of earlier lines too, which may have other solvers.
            names = {record["solver"] for record in results.records} - solvers.keys()
            solvers = solvers | {name: _solver(name, conf) for name in names}
        todo = group.broadcast([] if results is None else results.missing(configs))
        with _progress(todo, len(configs), show=group.is_main) as bar:
            for config in todo:
                measurement = evaluator.measure(config)
                if results is not None and measurement is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    results.append(config, asdict(measurement) | provenance)
                    bar.update()
                    tqdm.write(_summary(results.records[-1]), file=sys.stderr)
        if results is not None:
            write_report(results.records, folder, evaluator=evaluator, solvers=solvers)
    return folder


def grid(
    num_tokens: int,
    *,
    num_groups: Sequence[int],
    overlap: Sequence[float],
    steps: Sequence[int],
    order: Sequence[str],
    solver: Sequence[Solver],
    guidance: Sequence[float],
    joint_steps: Sequence[int] = (),
) -> list[DecodeConfig]:
    """All combinations of settings, each once.

    Args:
        num_tokens: of the decoder.
        num_groups: see `DecodeConfig`, as for all that follow.
        overlap: of successive groups.
        steps: solver steps per group.
        order: of decoding.
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
        "solver": solver,
        "guidance": guidance,
    }
    for name, values in swept.items():
        if not values:
            raise UsageError(f"bench.{name} must hold at least one value, got none")
    found: dict[tuple[object, ...], DecodeConfig] = {}
    every = [*steps, *(s for s in joint_steps if s not in steps)]
    for g, s, o, way, rule, w in product(num_groups, every, overlap, order, solver, guidance):
        if g > 1 and s not in steps:
            continue
        config = DecodeConfig(num_groups=g, overlap=o, steps=s, order=way, solver=rule, guidance=w)
        stagger = config.schedule(num_tokens=num_tokens).stagger
        if g == 1:  # a single group has neither overlap nor order
            config, stagger = replace(config, overlap=0.0, order=order[0]), 0
        found.setdefault((g, stagger, s, config.order, rule, w), config)
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


class Results:
    """`results.jsonl`: one line per finished configuration, never changed.

    Args:
        path: the file, which may exist.
        same: what every line must agree on (checkpoint, reference, samples, seeds, features).
        solvers: by the names that lines use.

    Attributes:
        records: the lines.

    Raises:
        UsageError: if a line was written for something else, or cannot be read.
    """

    def __init__(self, path: Path, *, same: Record, solvers: Mapping[str, Solver]) -> None:
        self.path, self.same, self.solvers = path, same, solvers
        self.records: list[Record] = []
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{path} must hold one JSON object per line, got line {number}"
                ) from error
            for key, value in same.items():
                if record.get(key) != value:
                    raise UsageError(
                        f"run_dir must be empty or hold results of the same {key}, got "
                        f"{record.get(key)!r} in {path}, now {value!r}"
                    )
            self.records.append(record)
        if complete != text:  # killed while writing: that configuration is not finished
            with path.open("r+", encoding="utf-8") as file:
                file.truncate(len(complete.encode()))

    def missing(self, configs: Sequence[DecodeConfig]) -> list[DecodeConfig]:
        """The configurations that are still to be measured."""
        done = [{key: record.get(key) for key in SETTINGS} for record in self.records]
        return [config for config in configs if self._settings(config) not in done]

    def append(self, config: DecodeConfig, record: Record) -> None:
        """Write a configuration's line, through to the disk."""
        record = self._settings(config) | record | self.same
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def _settings(self, config: DecodeConfig) -> Record:
        return settings_of(config, self.solvers)


SETTINGS = ("num_groups", "overlap", "steps", "order", "solver", "guidance")


def settings_of(config: DecodeConfig, solvers: Mapping[str, Solver]) -> Record:
    """A configuration as flat, plain values; the solver by its name."""
    record = {name: getattr(config, name) for name in SETTINGS}
    guidance = config.guidance
    return record | {
        "order": config.order if isinstance(config.order, str) else list(config.order),
        "solver": next(name for name, solver in solvers.items() if solver == config.solver),
        "guidance": guidance if isinstance(guidance, int | float) else guidance.scale,
    }


class Timings:
    """`timings.json`: how the seconds of a configuration grow with its steps, measured once.

    Args:
        path: the file, which may exist.
        measure: measures the offset and the slope of a configuration, in seconds.
    """

    def __init__(
        self, path: Path, *, measure: Callable[[DecodeConfig], tuple[float, float]]
    ) -> None:
        self.path, self.measure = path, measure
        self.fits = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, config: DecodeConfig) -> float:
        """The seconds of a configuration."""
        key = repr(replace(config, steps=1))
        if key not in self.fits:
            self.fits[key] = self.measure(config)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.fits, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        offset, slope = self.fits[key]
        return offset + slope * config.steps


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


def _default_folder(ckpt: Path) -> Path:
    return ckpt / "bench" if ckpt.is_dir() else ckpt.with_name(f"{ckpt.stem}-bench")


def _solver(name: str, conf: Path) -> Solver:
    leaf = conf / "solver" / f"{name}.yaml"
    if not leaf.is_file():
        known = ", ".join(sorted(path.stem for path in leaf.parent.glob("*.yaml")))
        raise UsageError(f"bench.solver must be among {known}, got {name!r}")
    return instantiate(OmegaConf.load(leaf))


def _configs(
    cfg: DictConfig, decoder: Decoder, solvers: Mapping[str, Solver]
) -> list[DecodeConfig]:
    swept, training = cfg.bench, decoder.training_distribution
    return grid(
        decoder.layout.num_tokens,
        num_groups=list(swept.num_groups or training.num_groups),
        overlap=[float(overlap) for overlap in swept.overlap],
        steps=list(swept.steps),
        joint_steps=[] if swept.match else list(swept.joint_steps),
        order=list(swept.order or [str(training.orders[0])]),
        solver=list(solvers.values()),
        guidance=[float(guidance) for guidance in swept.guidance],
    )


def _evaluator(cfg: DictConfig, decoder: Decoder, group: Processes) -> Evaluator:
    swept = cfg.bench
    data = instantiate(_data(cfg), _convert_="all")
    with group.main_first():
        image, label = data.image, data.label
    shape = tuple(decoder.layout.image_shape)
    if image.shape[1:] != shape:
        raise UsageError(f"data must be images of {shape}, as the decoder's, got {image.shape[1:]}")
    seeds = list(swept.seeds)
    samples = len(image) if swept.samples is None else swept.samples
    for name, value in (("samples", samples), ("batch_size", swept.batch_size)):
        if not isinstance(value, int) or value < 2:
            raise UsageError(f"bench.{name} must be a whole number of 2 or more, got {value!r}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"bench.seeds must be one or more different numbers, got {seeds}")
    extractors = {}
    for name in swept.features:
        if name not in cfg.features:
            raise UsageError(f"bench.features must be among {list(cfg.features)}, got {name!r}")
        with group.main_first():
            made = _extractor(cfg.features[name], image, label, name=name)
        extractors[made.name] = made.to(decoder.device)
    return Evaluator(
        decoder=decoder,
        image=image,
        label=label if decoder.conditioning.num_classes else None,
        extractors=extractors,
        features={
            n: extract_features(image, e, device=decoder.device) for n, e in extractors.items()
        },
        samples=samples,
        seeds=seeds,
        batch_size=swept.batch_size,
        pairs=swept.pairs,
        dtype=named_dtype(cfg.dtype),
        processes=group,
    )


def _extractor(
    cfg: DictConfig, image: torch.Tensor, label: torch.Tensor, *, name: str
) -> Extractor:
    made = instantiate(cfg)
    if not isinstance(made, nn.Module):  # a function that trains one on the data
        made = made(image, label)
    return as_extractor(made, name=name)


def _data(cfg: DictConfig) -> Any:
    if cfg.get("data"):
        return cfg.data
    config = Path(cfg.ckpt) / "config.yaml"
    if not config.is_file():
        raise UsageError(f"data must be given (data=…), for there is no {config} to take it from")
    data = OmegaConf.select(OmegaConf.load(config), "data")
    target = None if data is None else data.get("_target_")
    # The folder may be somebody else's: nothing is called that is not ours.
    if not str(target).startswith("rolldiff.data."):
        raise UsageError(f"data of {config} must be of rolldiff.data, got {target}; say data=…")
    return OmegaConf.create({RENAMED_DATA.get(key, key): data[key] for key in data})


def _matched(
    match: Any, configs: list[DecodeConfig], evaluator: Evaluator, *, folder: Path
) -> list[DecodeConfig]:
    decoder = evaluator.decoder
    num_tokens, causal = decoder.layout.num_tokens, decoder.backbone.causal
    if match not in ("nfe", "tokens", "seconds"):
        raise UsageError(f"bench.match must be nfe, tokens or seconds, got {match!r}")
    if not evaluator.processes.is_main:
        return []
    if match == "seconds":
        # Kept in a file: new timings would give a resumed benchmark other steps.
        return match_cost(configs, Timings(folder / "timings.json", measure=_seconds(evaluator)))
    which = 0 if match == "nfe" else 1
    return match_cost(configs, lambda c: expected_cost(c, num_tokens, causal=causal)[which])


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
        "checkpoint": short_hash(evaluator.decoder.state_dict()),
        "reference": short_hash({"image": evaluator.image}),
        "extractors": {name: e.hash for name, e in evaluator.extractors.items()},
        "samples": evaluator.samples,
        "seeds": list(evaluator.seeds),
        "batch_size": evaluator.batch_size,
        "pairs": evaluator.pairs,
        "device": device_name(evaluator.decoder.device),
        "dtype": str(cfg.dtype or "default"),
    }


def _provenance(evaluator: Evaluator, cfg: DictConfig) -> Record:
    """What else is worth knowing about a line."""
    return {
        "ckpt": Path(cfg.ckpt).name,
        "data": _data(cfg)["_target_"],
        "reference_images": len(evaluator.image),
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
