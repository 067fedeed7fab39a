"""Every YAML composes, instantiates, and trains for a few steps in its own precision."""

import io
import json
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from autoencoders import tiny_kl
from datasets import Dataset, Features, Image, Value
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image as Picture

from rolldiff import hub
from rolldiff.cli import config_dir
from rolldiff.objective import check_objective, flat, objective
from rolldiff.training import LitTokenizer, train
from rolldiff.trust import TARGETS

CONF = config_dir()
LEAVES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml"))
SEARCHES = [leaf for leaf in LEAVES if leaf.parts[0] == "hparams_search"]
EXPERIMENTS = [leaf for leaf in LEAVES if leaf.parts[0] == "experiment"]
# A prior needs the run of a tokenizer: see test_tokenizer.py, and decoder=init other weights: see
# test_initial.py; a recipe and a search are settings.
PARTS = [
    leaf
    for leaf in LEAVES
    if leaf.parts[0] not in ("experiment", "recipe", "hparams_search")
    and leaf.name not in ("prior", "init")
]
PACKAGES = {"data", "training", "evaluation", "integrations", "presets"}
NETWORK = {"small", "base", "large", "xl", "dit_s", "dit_b", "dit_l", "dit_xl"}
TINY = [
    "max_steps=3",
    "max_time=null",
    "batch_size=4",
    "compile=false",
    "progress=false",
    "nn.width=16",
    "nn.depth=1",
    "nn.heads=1",
    "report.samples=8",
    "report.steps=1",
    "trainer.val_check_interval=2",
]


def slow_ones(leaves, *names):
    """The leaves as parameters, those of these names among the slow tests."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(leaf, id=str(leaf), marks=marks[leaf.name in names]) for leaf in leaves]


def composed(command, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            command, ["run_dir=unused", *overrides] if command == "train" else list(overrides)
        )


def test_what_a_leaf_names_may_be_named_by_a_run_that_is_resumed():
    named = {
        target
        for path in CONF.glob("*/*.yaml")
        for target in re.findall(r"_target_: (\S+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    assert named <= TARGETS


def here(leaf):
    """What a leaf needs on this machine: that of a GPU is tried on the CPU where there is none."""
    no_gpu = str(leaf) == "trainer/gpu" and not torch.cuda.is_available()
    return ["trainer.accelerator=cpu"] if no_gpu else []


@pytest.mark.parametrize("leaf", PARTS, ids=str)
def test_every_leaf_instantiates(leaf, tmp_path, monkeypatch):
    group, name = leaf.parts
    if group == "logger":
        monkeypatch.setenv("WANDB_MODE", "offline")
    command = {"solver": "decode", "decode": "decode", "likelihood": "likelihood"}.get(
        group, "train"
    )
    overrides = [f"{group}={name}"]
    if name in NETWORK:  # the shape is what matters here, not the minutes
        overrides.append("nn.depth=1")
    # What a leaf leaves to the user.
    overrides += {
        "hub": ["data.name=somebody/images", "data.image_size=8", "num_classes=2"],
        "parquet": ["data.path=somewhere", "data.image_size=8", "num_classes=2"],
        "tokenizer": ["experiment=tokenizer"],
        "folder": ["data.path=somewhere", "data.image_size=8", "num_classes=2"],
        "kl": [f"autoencoder.path={tmp_path / 'kl'}"],
    }.get(name, [])
    if str(leaf) == "data/latents":
        overrides.append("data.path=somewhere")
    if name == "kl":
        tiny_kl().save_pretrained(tmp_path / "kl")
    overrides += here(leaf)
    cfg = composed(command, *overrides)
    if command == "train":
        cfg.run_dir, cfg.run_id = str(tmp_path), "1"
        if cfg.num_classes is None:
            cfg.num_classes = 2
    part = cfg[group]
    if group == "callbacks":
        for callback in part.values():
            assert instantiate(callback, _convert_="all")
    else:
        assert instantiate(part, _convert_="all") is not None


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Local copies of the hub's sets, with ten pictures each, by the names of their leaves."""
    folders = {}
    generator = np.random.default_rng(0)
    for name, column, shape in (
        ("cifar10", "img", (32, 32, 3)),
        ("fashion_mnist", "image", (28, 28)),
    ):
        rows = []
        for _ in range(10):
            file = io.BytesIO()
            Picture.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        folders[name] = tmp_path_factory.mktemp(name)
        features = Features({column: Image(), "label": Value("int64")})
        table = Dataset.from_dict({column: rows, "label": list(range(10))}, features=features)
        table.to_parquet(folders[name] / "train-0.parquet")
    return folders


def of_data(cfg, tables):
    """Where an experiment finds its pictures here."""
    for name, folder in tables.items():
        if OmegaConf.select(cfg, "data.name", default="").endswith(name):
            return [f"data.path={folder}", "data.split=train", "data.reference_images=null"]
    return []


@pytest.mark.parametrize("leaf", slow_ones(EXPERIMENTS, "photo_tokenizer", "prior"))
@pytest.mark.filterwarnings("ignore")  # Lightning's, about three steps
def test_every_experiment_trains(leaf, tables, tmp_path):
    overrides = [f"experiment={leaf.name}", *TINY, f"run_dir={tmp_path / 'run'}"]
    if leaf.name == "prior":
        tokens = tmp_path / "tokens"
        ask = ["experiment=tokenizer", *TINY, "report.num_groups=[1]", f"run_dir={tokens}"]
        train(composed("train", *ask))
        overrides += [f"tokenizer={tokens}", "prior_model.width=16", "prior_model.heads=1"]
    else:
        overrides += ["report.num_groups=[1]"]
    overrides += of_data(composed("train", *overrides), tables)
    if "photo" in leaf.name:
        overrides += ["data.reference_images=8", "data.flip=false", "callbacks.samples=null"]
        overrides += ["tokenizer_model.encoder.width=16", "trainer.limit_val_batches=0"]
    if "pixels" in leaf.name and "digits" not in leaf.name:  # hundreds of groups of one token
        overrides += ["training.num_groups=[1,7]", "callbacks.samples=null"]
    cfg = composed("train", *overrides)
    bf16 = leaf.name.startswith(("cifar10", "fashion_mnist"))
    bf16 = bf16 and not leaf.name.endswith(("tiny", "small"))
    bf16 = bf16 and "tokenizer" not in leaf.name
    assert cfg.trainer.precision == ("bf16-mixed" if bf16 else "32-true")
    summary = train(cfg)
    assert summary.steps == 3
    # The numbers that a sweep may search by are known before the training.
    report = instantiate(cfg.report, _convert_="all")
    assert set(report.number_names()) == set(flat(summary.report.values))
    assert json.loads((tmp_path / "run/summary.json").read_text())["images_seen"] == 12


LEAF = ["layout", "lit", "nn", "noise", "training", "logger", "conditions", "trainer", "optimizer"]
TRAINED = [leaf for leaf in PARTS if leaf.parts[0] in LEAF]


@pytest.mark.parametrize("leaf", slow_ones(TRAINED, "wandb", "dit_l", "dit_xl"))
@pytest.mark.filterwarnings("ignore")  # Lightning's, about three steps
def test_every_leaf_trains(leaf, tmp_path, monkeypatch):
    group, name = leaf.parts
    monkeypatch.setenv("WANDB_MODE", "offline")
    choice = f"{group}={name}"
    overrides = [choice, *TINY, "report.num_groups=[1]", "training.num_groups=[1,2]"]
    if name in ("latents", "tokenizer"):  # a grid of latents is a tokenizer's
        overrides = ["experiment=tokenizer", *overrides]
    if group == "logger" and name == "wandb":
        overrides.append("logger.offline=true")
    overrides += here(leaf)
    summary = train(composed("train", *overrides, f"run_dir={tmp_path / 'run'}"))
    assert summary.steps == 3
    assert np.isfinite(objective(summary.values, "fd_pixels"))


@pytest.mark.parametrize("leaf", SEARCHES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy 1.4, about 2.0
def test_every_search_samples_settings_that_can_be_trained(leaf):
    search = f"hparams_search={leaf.name}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [search], return_hydra_config=True)
    assert cfg.hydra.mode == RunMode.MULTIRUN
    optuna = import_module("optuna")  # here, where the warning is expected
    plugin = import_module("hydra_plugins.hydra_optuna_sweeper._impl")
    params = [f"{name}={values}" for name, values in cfg.hydra.sweeper.params.items()]
    space, _ = plugin.create_params_from_overrides(params)
    study = optuna.create_study(sampler=instantiate(cfg.hydra.sweeper.sampler))
    for _ in range(4):
        trial = study.ask()
        drawn = [f"{name}={trial._suggest(name, part)}" for name, part in space.items()]
        cfg = composed("train", search, *drawn)
        assert instantiate(cfg.lit, _convert_="all")
        report = instantiate(cfg.report, _convert_="all")
        check_objective(cfg.optimized_metric, report.number_names())


@pytest.mark.parametrize("leaf", EXPERIMENTS, ids=str)
def test_every_experiment_builds_its_model(leaf, tmp_path):
    if leaf.name == "prior":
        pytest.skip("needs the run of a tokenizer, and is trained above")
    cfg = composed("train", f"experiment={leaf.name}")
    lit = instantiate(cfg.lit, _convert_="all")
    if "tokenizer" in leaf.name:
        assert isinstance(lit, LitTokenizer)  # which takes no labels
    else:
        assert lit.model.conditioning.num_classes == cfg.num_classes == 10


def test_the_digits_have_a_recipe():
    assert composed("train") == composed("train", "experiment=digits")
    assert composed("train", "~recipe").max_time is None


def test_other_data_inherits_nothing_from_the_digits():
    ask = ["data=folder", "data.path=somewhere", "data.image_size=64"]
    assert composed("train", *ask) == composed("train", *ask, "~recipe")
    with pytest.raises(Exception, match="experiment/nothing"):
        composed("train", "experiment=nothing")


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_models_are_named_by_their_public_paths(path):
    """Parts of a model as in `config.json`; the others by the package that they belong to."""
    for target in re.findall(r"_target_: (rolldiff\.[\w.]+)", path.read_text()):
        package = target.split(".")[1]
        assert target in hub.PUBLIC or package in PACKAGES, target
