"""Every YAML composes and instantiates."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rolldiff.cli import config_dir

CONF = config_dir()
LEAVES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml"))
# A prior is trained over the codes of a run: tests/test_chain.py does.
LEAVES = [leaf for leaf in LEAVES if leaf.name != "prior"]
EXPERIMENTS = [leaf for leaf in LEAVES if leaf.parts[0] == "experiment"]
PARTS = [leaf for leaf in LEAVES if leaf not in EXPERIMENTS]
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
    command = "decode" if group == "step" else "train"
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
    told = 0 if "tokenizer" in leaf.name else cfg.num_classes  # its own images, no labels
    assert lit.model.condition.num_classes == told


def test_the_default_is_the_digits_experiment():
    assert composed("train") == composed("train", "experiment=digits")


def test_folders_mirror_rooms():
    package = Path(__file__).parent.parent / "rolldiff"
    outside = {"experiment", "optimizer", "trainer", "logger"}  # Lightning's and torch's
    for folder in {leaf.parts[0] for leaf in LEAVES} - outside:
        assert (package / f"{folder}.py").exists() or (package / folder).is_dir(), folder
