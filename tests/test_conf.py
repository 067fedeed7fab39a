"""Every YAML composes and instantiates."""

import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rolldiff import hub
from rolldiff.cli import config_dir
from rolldiff.training import LitTokenizer

CONF = config_dir()
LEAVES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml"))
# A prior needs the run of a tokenizer: see test_training.py and test_chain.py.
LEAVES = [leaf for leaf in LEAVES if leaf.name != "prior"]
EXPERIMENTS = [leaf for leaf in LEAVES if leaf.parts[0] == "experiment"]
PARTS = [leaf for leaf in LEAVES if leaf not in EXPERIMENTS]
# "chain" and "report" are in evaluation soon.
PACKAGES = {"data", "training", "evaluation"}
NETWORK = {"small", "base", "large", "xl"}


def composed(command, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            command, ["run_dir=unused", *overrides] if command == "train" else list(overrides)
        )


@pytest.mark.parametrize("leaf", PARTS, ids=str)
def test_every_leaf_instantiates(leaf, tmp_path, monkeypatch):
    group, name = leaf.parts
    if group == "logger":
        monkeypatch.setenv("WANDB_MODE", "offline")
    command = "decode" if group in ("solver", "decode") else "train"
    overrides = [f"{group}={name}"]
    if name in NETWORK:  # the shape is what matters here, not the minutes
        overrides.append("nn.depth=1")
    # What a leaf leaves to the user.
    overrides += {
        "hub": ["data.name=somebody/images", "data.image_size=8"],
        "parquet": ["data.path=somewhere", "data.image_size=8"],
        "tokenizer": ["experiment=tokenizer"],
        "folder": ["data.path=somewhere", "data.image_size=8"],
    }.get(name, [])
    cfg = composed(command, *overrides)
    if command == "train":
        cfg.run_dir = str(tmp_path)
    part = cfg[group]
    if group == "callbacks":
        for callback in part.values():
            assert instantiate(callback, _convert_="all")
    else:
        assert instantiate(part, _convert_="all") is not None


@pytest.mark.parametrize("leaf", EXPERIMENTS, ids=str)
def test_every_experiment_builds_its_model(leaf):
    cfg = composed("train", f"experiment={leaf.name}")
    lit = instantiate(cfg.lit, _convert_="all")
    if "tokenizer" in leaf.name:
        assert isinstance(lit, LitTokenizer)  # which takes no labels
    else:
        assert lit.model.conditioning.num_classes == cfg.num_classes


def test_the_default_is_the_digits_experiment():
    assert composed("train") == composed("train", "experiment=digits")


def test_no_experiment_leaves_the_defaults():
    assert composed("train", "~experiment").max_steps == 1000


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_models_are_named_by_their_public_paths(path):
    """Parts of a model as in `config.json`; the others by the package that they belong to."""
    for target in re.findall(r"_target_: (rolldiff\.[\w.]+)", path.read_text()):
        package = target.split(".")[1]
        assert target in hub.PUBLIC or package in PACKAGES, target
