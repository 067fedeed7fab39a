"""The job of `rolldiff bench`: every cell that is not done yet, then the report."""

import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import rolldiff
from rolldiff.bench.conclusions import floors
from rolldiff.bench.measure import Bench, features_of
from rolldiff.bench.progress import Progress
from rolldiff.bench.report import write_report
from rolldiff.bench.results import Results, Timings
from rolldiff.bench.settings import Setting, counted, grid, matched
from rolldiff.bench.share import Share, shared
from rolldiff.decoder import Decoder
from rolldiff.device import compile_in_place, named_device, named_dtype
from rolldiff.evaluation.features import Extractor, as_extractor, short_hash
from rolldiff.hub import read_checkpoint
from rolldiff.report import device_name
from rolldiff.step import Step

__all__ = ["bench"]


def bench(cfg: DictConfig, *, conf: Path) -> Path:
    """Measure what is configured, as far as it is not measured yet, and write the report.

    Args:
        cfg: the configuration of `rolldiff bench`.
        conf: the folder of YAML files, for the step rules.

    Returns:
        The run folder: `results.jsonl`, `report.md` and its pictures.

    Raises:
        ValueError: if a setting is out of range, or the folder holds results of something else.
    """
    if cfg.ckpt is None:
        raise ValueError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    folder = Path(cfg.run_dir or _beside(Path(cfg.ckpt)))
    with shared() as share:
        decoder = read_checkpoint(cfg.ckpt, Decoder).to(named_device(cfg.device))
        steps = {name: _step(name, conf) for name in cfg.bench.step}
        settings = _settings(cfg, decoder)
        common = _common(cfg, decoder, share)
        if cfg.compile:
            compile_in_place(decoder)
        if cfg.bench.match is not None:
            settings = share.told(_matched(cfg.bench.match, settings, common, steps, folder))
        same, about = _same(common, cfg), _about(common, cfg)
        results = Results(folder / "results.jsonl", same=same) if share.leads else None
        left = share.told(_left(settings, results))
        with Progress(len(settings), len(settings) - len(left), show=share.leads) as progress:
            for setting in left:
                cell = common.cell(setting, steps[setting.step])
                if results is not None and cell is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    results.add(setting, asdict(cell) | about)
                    progress.done(setting, cell)
        if results is not None:
            write_report(results.rows, folder, common=common, floors=floors(common), steps=steps)
    return folder


def _beside(ckpt: Path) -> Path:
    return ckpt / "bench" if ckpt.is_dir() else ckpt.with_name(f"{ckpt.stem}-bench")


def _settings(cfg: DictConfig, decoder: Decoder) -> list[Setting]:
    swept = cfg.bench
    training = decoder.trained_for
    return grid(
        decoder.layout.num_tokens,
        num_groups=list(swept.num_groups or training.num_groups),
        overlap=[float(overlap) for overlap in swept.overlap],
        steps=list(swept.steps),
        joint_steps=[] if swept.match else list(swept.joint_steps),
        order=list(swept.order or [str(training.orders[0])]),
        step=list(swept.step),
        guidance=[float(guidance) for guidance in swept.guidance],
    )


def _step(name: str, conf: Path) -> Step:
    leaf = conf / "step" / f"{name}.yaml"
    if not leaf.is_file():
        known = ", ".join(sorted(path.stem for path in leaf.parent.glob("*.yaml")))
        raise ValueError(f"bench.step must be among {known}, got {name!r}")
    return instantiate(OmegaConf.load(leaf))


def _common(cfg: DictConfig, decoder: Decoder, share: Share) -> Bench:
    swept = cfg.bench
    data = instantiate(_data(cfg), _convert_="all")
    with share.leader_first():
        image, label = data.image, data.label
    shape = tuple(decoder.layout.image_shape)
    if image.shape[1:] != shape:
        raise ValueError(f"data must be images of {shape}, as the decoder's, got {image.shape[1:]}")
    seeds = list(swept.seeds)
    samples = len(image) if swept.samples is None else swept.samples
    for name, value in (("samples", samples), ("batch_size", swept.batch_size)):
        if not isinstance(value, int) or value < 2:
            raise ValueError(f"bench.{name} must be a whole number of 2 or more, got {value!r}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"bench.seeds must be different numbers, one at least, got {seeds}")
    extractors = {}
    for name in swept.features:
        if name not in cfg.features:
            raise ValueError(f"bench.features must be among {list(cfg.features)}, got {name!r}")
        with share.leader_first():
            made = _extractor(cfg.features[name], name, image, label).to(decoder.device)
        extractors[made.name] = made
    return Bench(
        decoder=decoder,
        image=image,
        label=label if decoder.condition.num_classes else None,
        extractors=extractors,
        features={n: features_of(image, e, device=decoder.device) for n, e in extractors.items()},
        samples=samples,
        seeds=seeds,
        batch_size=swept.batch_size,
        pairs=swept.pairs,
        dtype=named_dtype(cfg.dtype),
        share=share,
    )


def _extractor(cfg: DictConfig, name: str, image: torch.Tensor, label: torch.Tensor) -> Extractor:
    made = instantiate(cfg)
    if not isinstance(made, nn.Module):  # a training on the data
        made = made(image, label)
    return as_extractor(made, name=name)


def _data(cfg: DictConfig) -> Any:
    if cfg.get("data"):
        return cfg.data
    config = Path(cfg.ckpt) / "config.yaml"
    if not config.is_file():
        raise ValueError(f"data must be given (data=…), for there is no {config} to take it from")
    data = OmegaConf.select(OmegaConf.load(config), "data")
    target = None if data is None else data.get("_target_")
    # The folder may be somebody else's: nothing is called that is not ours.
    if not str(target).startswith("rolldiff.data."):
        raise ValueError(f"data of {config} must be of rolldiff.data, got {target}; say data=…")
    return data


def _left(settings: Sequence[Setting], results: Results | None) -> list[Setting]:
    if results is None:
        return []
    done = results.done()
    return [setting for setting in settings if setting not in done]


def _matched(
    match: Any, settings: list[Setting], common: Bench, steps: dict[str, Step], folder: Path
) -> list[Setting]:
    decoder = common.decoder

    def counts(setting: Setting) -> tuple[int, int]:
        calls, causal = steps[setting.step].calls, decoder.backbone.causal
        return counted(setting, decoder.layout.num_tokens, calls=calls, causal=causal)

    if match not in ("nfe", "tokens", "seconds"):
        raise ValueError(f"bench.match must be nfe, tokens or seconds, got {match!r}")
    if not common.share.leads:
        return []
    if match != "seconds":
        return matched(settings, match, counts=counts)
    # Times taken again would give other steps, and other cells, to a bench that goes on.
    kept = Timings(folder / "timings.json", fitted=_seconds(common, steps))
    return matched(settings, match, counts=counts, seconds=kept)


def _seconds(common: Bench, steps: dict[str, Step]) -> Callable[[Setting], tuple[float, float]]:
    """Offset and slope of the seconds of a batch, from two short decodes of it."""

    def fitted(setting: Setting) -> tuple[float, float]:
        few, many = (replace(setting, steps=count) for count in (2, 8))
        count = min(common.batch_size, common.samples)
        times = []
        for trial in (few, many):
            step = steps[setting.step]
            turns = [common.decode(trial, step, seed=0, count=count).cost for _ in range(3)]
            times.append(statistics.median(cost.seconds for cost in turns))
        slope = max((times[1] - times[0]) / 6, 1e-9)
        return max(times[0] - 2 * slope, 0.0), slope

    return fitted


def _same(common: Bench, cfg: DictConfig) -> dict[str, Any]:
    """What makes two lines comparable."""
    return {
        "checkpoint": short_hash(common.decoder.state_dict()),
        "reference": short_hash({"image": common.image}),
        "extractors": {name: e.hash for name, e in common.extractors.items()},
        "samples": common.samples,
        "seeds": list(common.seeds),
        "batch_size": common.batch_size,
        "pairs": common.pairs,
        "device": device_name(common.decoder.device),
        "dtype": str(cfg.dtype or "default"),
    }


def _about(common: Bench, cfg: DictConfig) -> dict[str, Any]:
    """What else is worth knowing of a line."""
    return {
        "ckpt": Path(cfg.ckpt).name,
        "data": _data(cfg)["_target_"],
        "reference_images": len(common.image),
        "match": cfg.bench.match,
        "processes": common.share.world,
        "threads": torch.get_num_threads(),
        "versions": {
            "rolldiff": rolldiff.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
