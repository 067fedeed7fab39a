"""A training on several devices: what one process would train, and an end with a message."""

import csv
import json
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from rolldiff.cli import config_dir
from rolldiff.diffusion.process import Shard
from rolldiff.errors import UsageError
from rolldiff.training import train
from rolldiff.training.run import resumed_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:Checkpoint directory",
    "ignore:You're resuming from a checkpoint",
)
TINY = [
    "max_steps=20",
    "max_time=null",
    "batch_size=8",
    "progress=false",
    "nn.width=16",
    "nn.depth=2",
    "nn.heads=1",
    "training.num_groups=[1,2]",
    "report.samples=9",
    "report.steps=1",
    "lit.warmup_steps=4",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=10",
    "callbacks.samples.steps=1",
    "callbacks.checkpoint.every_n_train_steps=5",
    "trainer.accelerator=cpu",
]
TWO = "trainer.devices=2"
COMMAND = [sys.executable, "-m", "rolldiff", "train"]


def config(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", [*TINY, *overrides])


def resume(folder, **settings):
    cfg = config(f"resume={folder}", TWO)
    for name, value in settings.items():
        cfg[name] = value
    return train(resumed_config(cfg))


def column(folder, name="loss"):
    with (folder / "logs/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_same(folder, other, *, rtol=1e-5, atol=1e-5):
    """The averaged weights, the trained ones and the optimizer's state."""
    a, b = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, other))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert a.get(key, {}).keys() == b.get(key, {}).keys()
        for name, value in a.get(key, {}).items():
            torch.testing.assert_close(value, b[key][name], rtol=rtol, atol=atol, msg=name)
    moments, others = (c["optimizer_states"][0]["state"] for c in (a, b))
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        torch.testing.assert_close(
            state["exp_avg"], others[number]["exp_avg"], rtol=1e-3, atol=atol
        )
    saved, whole = (load_file(f / "model.safetensors") for f in (folder, other))
    assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in whole.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process trains with some settings, each trained once."""
    found = {}

    def trained(*overrides):
        if overrides not in found:
            folder = tmp_path_factory.mktemp("one") / "run"
            train(config(f"run_dir={folder}", *overrides))
            found[overrides] = folder
        return found[overrides]

    return trained


# The mathematics


@pytest.mark.parametrize("count", [2, 3, 4, 12])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_shards_of_a_batch_have_its_loss_and_its_gradient(make, count, drop):
    """Also where a process begins in the middle of a slice."""
    decoder = make(dtype=torch.float64)
    object.__setattr__(decoder.training_distribution, "drop_cond", drop)
    image = torch.rand(12, 1, 8, 8, dtype=torch.float64) * 2 - 1
    label = torch.arange(12) % 10

    def loss(shard):
        generator = torch.Generator().manual_seed(3)
        return decoder.loss(shard.rows(image), shard.rows(label), generator=generator, shard=shard)

    def gradient(value):
        decoder.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in decoder.parameters()])

    whole = loss(Shard())
    parts = torch.stack([loss(Shard(i, count)) for i in range(count)])
    torch.testing.assert_close(parts.mean(), whole)
    assert parts.detach().std() > 0
    torch.testing.assert_close(gradient(parts.mean()), gradient(whole))


def test_shards_need_a_generator_that_all_have(make):
    with pytest.raises(UsageError, match="generator must be given beside shard"):
        make().loss(torch.zeros(2, 1, 8, 8), [0, 1], shard=Shard(0, 2))
    with pytest.raises(UsageError, match="index must be a whole number in 0 … 1, got 2"):
        Shard(2, 2)


# The same training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ([], 1e-5),
        (["+trainer.accumulate_grad_batches=2", "max_steps=6"], 1e-5),
        (["nn.gradient_checkpointing=true", "max_steps=6"], 1e-5),
        (["trainer.precision=bf16-mixed", "max_steps=6"], 2e-2),
        (["trainer=fsdp"], 1e-5),
        (["trainer=fsdp", "+trainer.accumulate_grad_batches=2", "max_steps=6"], 1e-5),
        (["trainer=fsdp", "trainer.precision=bf16-mixed", "max_steps=6"], 2e-2),
    ],
    ids=str,
)
def test_two_processes_train_what_one_does(overrides, tolerance, one, tmp_path):
    alone = one(*(o for o in overrides if o != "trainer=fsdp"))
    folder = tmp_path / "run"
    summary = train(config(*overrides, f"run_dir={folder}", TWO))
    assert column(folder) == pytest.approx(column(alone), rel=tolerance, abs=tolerance)
    assert column(folder, "val_loss") == pytest.approx(
        column(alone, "val_loss"), rel=10 * tolerance
    )
    assert_same(folder, alone, rtol=tolerance, atol=tolerance)
    found, whole = (json.loads((f / "summary.json").read_text()) for f in (folder, alone))
    assert found["fd_pixels"] == pytest.approx(whole["fd_pixels"], rel=10 * tolerance)
    assert found["images_seen"] == whole["images_seen"] == summary.images_seen
    assert found["parameters"] == whole["parameters"]
    names = {p.relative_to(f) for f in (folder,) for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(alone) for p in alone.rglob("*") if p.is_file()}
