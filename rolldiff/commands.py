"""What the commands do, once Hydra has settled their configuration.

What only one of them needs is imported inside: a wrong override is told before Lightning is loaded.
"""

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

__all__ = ["bench", "decode", "generate", "train"]


def config_dir() -> Path:
    """The folder of YAML files: beside the package in a wheel, beside its parent in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ValueError(f"conf must stand beside {package} or inside it, and is missing")


def train(cfg: DictConfig) -> None:
    """Train a model, or go on with one that stopped, and say what to try next."""
    from rolldiff import run

    folder = Path(cfg.run_dir)
    if cfg.resume is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    else:
        piece, cfg = cfg.piece, cast(DictConfig, OmegaConf.load(folder / "config.yaml"))
        cfg.run_dir, cfg.resume, cfg.piece = str(folder), str(folder), piece
    summary = run.train(cfg)
    if summary is None:
        print(f"\nStopped, and saved. Next:\n  rolldiff train resume={folder} piece={cfg.piece}")
        return
    print(f"\n{summary.reported.table}\n")
    print(f"{summary.seconds:.0f} s, {summary.images_seen} images seen. Everything is in {folder}")
    print(f"Next:\n  {summary.reported.try_next}")


def decode(cfg: DictConfig) -> None:
    """Draw images, or a film of their decode."""
    from hydra.utils import instantiate

    from rolldiff.evaluation.images import make_grid, save_gif
    from rolldiff.lit import load
    from rolldiff.run import compile_in_place, named_device, named_dtype

    if cfg.ckpt is None:
        raise ValueError("ckpt must be a run folder or a checkpoint, got none; say ckpt=PATH")
    out = _out(cfg)
    decoder = load(cfg.ckpt).to(named_device(cfg.device))
    cond = _labels(cfg, decoder.conditioning.num_classes)
    ask = {
        "num_images": cfg.num_images,
        "num_groups": cfg.num_groups,
        "overlap": cfg.overlap,
        "steps": cfg.steps,
        "order": cfg.order if isinstance(cfg.order, str) else list(cfg.order),
        "step": instantiate(cfg.step),
        "guidance": cfg.guidance,
        "seed": cfg.seed,
        "dtype": named_dtype(cfg.dtype),
    }
    if cfg.compile:
        compile_in_place(decoder)
    if out.suffix.lower() == ".gif":
        frames = decoder.stream(cond, frames=cfg.frames, **ask)
        save_gif((make_grid(frame.image) for frame in frames), out)
        print(out)
        return
    decoded = decoder.decode(cond, **ask)
    make_grid(decoded.image).save(out)
    cost = decoded.cost
    print(
        f"{out}: {cfg.num_images} images, {cost.nfe} network calls in series, "
        f"{cost.tokens} token evaluations an image, {cost.seconds:.2f} s"
    )


def _out(cfg: DictConfig) -> Path:
    out = Path(cfg.out)
    if out.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"out must end in .png or .gif, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got {out}")
    return out


def _labels(cfg: DictConfig, classes: int) -> Any:
    """The labels asked for; without, the classes in turn."""
    if OmegaConf.is_list(cfg.label):
        return list(cfg.label)
    if cfg.label is None and classes and isinstance(cfg.num_images, int):
        return [i % classes for i in range(cfg.num_images)]
    return cfg.label


def generate(cfg: DictConfig) -> None:
    """Write codes and draw the pictures behind them."""
    from rolldiff.evaluation.images import make_grid, save_gif
    from rolldiff.run import named_device
    from rolldiff.tokenizer.pipeline import Generation
    from rolldiff.tokenizer.prior import Prior
    from rolldiff.tokenizer.tokenizer import Tokenizer

    for name, said in (("prior", "prior"), ("tokenizer", "decoder")):
        if cfg[name] is None:
            raise ValueError(f"{said} must be a run folder, got none; say {said}=PATH")
    out, device = _out(cfg), named_device(cfg.device)
    prior = Prior.from_pretrained(cfg.prior).to(device)
    generation = Generation(
        prior,
        Tokenizer.from_pretrained(cfg.tokenizer).to(device),
        cond=_labels(cfg, prior.conditioning.num_classes),
        num_images=cfg.num_images,
        seed=cfg.seed,
        temperature=cfg.temperature,
        prior_guidance=cfg.guidance,
        settings={"num_groups": cfg.num_groups, "overlap": cfg.overlap, "steps": cfg.steps},
    )
    if out.suffix.lower() == ".gif":
        save_gif((make_grid(frame.image) for frame in generation.stream(frames=cfg.frames)), out)
    else:
        make_grid(generation.images()).save(out)
    print(f"{out}: {cfg.num_images} images of {prior.num_tokens} codes")


def bench(cfg: DictConfig) -> None:
    """Measure quality against cost, and say where the report is."""
    from rolldiff.evaluation.sweep import bench as run

    print(run(cfg, conf=config_dir()) / "report.md")
