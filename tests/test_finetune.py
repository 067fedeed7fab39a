"""Fine-tuning: parameters that are not trained stay as they were, and adapters can be merged."""

import re
import sys
from pathlib import Path

import pytest
import torch
from runs import ALLOWED, composed

from rolldiff import Decoder, Training
from rolldiff.errors import UsageError
from rolldiff.training import train
from rolldiff.training.module import freeze_parameters
from rolldiff.training.run import resumed_config

pytestmark = ALLOWED
SMALL = {"image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 1}
TINY = [
    "max_steps=3",
    "max_time=null",
    "batch_size=4",
    "progress=false",
    "nn.width=16",
    "nn.depth=2",
    "nn.heads=1",
    "report.num_groups=[1]",
    "report.samples=8",
    "report.steps=1",
    "callbacks.samples=null",
    "lit.warmup_steps=0",
    "optimizer.weight_decay=0.5",
]
FROZEN = "freeze=[backbone.blocks.0,'*.mlp',backbone.embed.weight]"


def build(**settings):
    torch.manual_seed(0)
    decoder = Decoder.build(**SMALL | {"num_classes": 3} | settings)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def is_frozen(name):
    of_block = name.startswith("backbone.blocks.0.") or ".mlp." in name
    return of_block or name == "backbone.embed.weight"


def test_a_name_freezes_a_parameter_or_all_of_a_module():
    decoder = build()
    freeze_parameters(decoder, ["backbone.blocks.0", "*.mlp", "backbone.embed.weight"])
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad is not is_frozen(name), name
    freeze_parameters(decoder, [])  # which leaves them as they are
    assert not decoder.backbone.embed.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["backbone.embed", "backbone.blocks.2"], "such as backbone.* got 'backbone.blocks.2'"),
        (["backbone.block"], "got 'backbone.block'"),  # a part of a name is none
        (["*"], "freeze must leave a parameter to train"),
        ("*.mlp", "freeze must be a list of names"),
        ([1], "freeze must be a list of names"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_names_of_nothing_and_of_everything_are_refused(patterns, words):
    decoder = build()
    with pytest.raises(UsageError, match=words):
        freeze_parameters(decoder, patterns)
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_frozen_parameters_stay_bit_for_bit_and_a_stopped_training_goes_on(tmp_path):
    first = tmp_path / "first"
    build(num_classes=10, prediction="velocity").save_pretrained(first)
    settings = [*TINY, f"init={first}", FROZEN, "training.num_groups=[1,4]"]
    train(composed(*settings, f"run_dir={tmp_path / 'whole'}"))
    stopped = tmp_path / "stopped"
    assert train(composed(*settings, f"run_dir={stopped}", "time_limit=00:00:00:00")) is None
    train(resumed_config(composed(f"resume={stopped}", "progress=false")))
    before, whole, resumed = (
        Decoder.from_pretrained(tmp_path / name).state_dict()
        for name in ("first", "whole", "stopped")
    )
    for name, value in before.items():
        assert torch.equal(whole[name], value) is is_frozen(name), name
        assert torch.equal(resumed[name], whole[name]), name
    # The optimizer holds nothing of them, and the averaged weights do not move.
    checkpoint = torch.load(tmp_path / "whole/last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    assert len(state) == sum(not is_frozen(name) for name in before if name != "orders")
    for name, value in before.items():
        if is_frozen(name):
            assert torch.equal(checkpoint["state_dict"][f"model.{name}"], value)


def test_a_wrong_name_leaves_no_folder(tmp_path):
    with pytest.raises(Exception, match="freeze must name parameters"):
        train(composed(*TINY, "freeze=[backbone.nothing]", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


# Adapters

DOCS = Path(__file__).parents[1] / "docs"
DECODED = {"num_groups": 4, "overlap": 0.5, "steps": 3, "seed": 0}


def example():
    """The Python of the page, which is given a decoder and batches."""
    page = (DOCS / "fine-tuning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return code


def test_adapters_train_alone_and_merge_into_the_weights(tmp_path, monkeypatch):
    """By the example of the page: what it saves decodes what the adapters did, without peft."""
    pytest.importorskip("peft")
    build(training=Training((1,))).save_pretrained(tmp_path / "RUN")
    plain = Decoder.from_pretrained(tmp_path / "RUN")
    torch.manual_seed(1)
    batches = [(torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4) % 3) for _ in range(3)]
    monkeypatch.chdir(tmp_path)
    seen = {}

    def batches_watched():
        """Between two steps of the example, and after its last one."""
        yield from batches
        decoder = found["decoder"].eval()
        seen["image"] = decoder.decode([0, 1], **DECODED).image
        seen["trained"] = {n for n, p in decoder.named_parameters() if p.requires_grad}
        seen["grad"] = {n for n, p in decoder.named_parameters() if p.grad is not None}

    found = {"batches": batches_watched()}
    exec(example(), found)
    assert seen["trained"] == seen["grad"]
    assert seen["trained"]
    assert all("lora_" in name for name in seen["trained"])
    merged = found["decoder"]
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails from here on
    loaded = Decoder.from_pretrained(tmp_path / "TUNED")
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert loaded.training_distribution == Training((1, 2, 4, 8, 16))
    for decoder in (merged, loaded):
        image = decoder.decode([0, 1], **DECODED).image
        torch.testing.assert_close(image, seen["image"], rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="num_groups 4 .trained: 1."):
        before = plain.decode([0, 1], **DECODED).image
    assert (seen["image"] - before).abs().max() > 1e-3
    # What the adapters adapt has changed, and nothing else.
    for name, value in loaded.state_dict().items():
        adapted = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        assert torch.equal(value, plain.state_dict()[name]) is not adapted, name


def test_adapters_decode_the_same_with_the_cache_and_without():
    peft = pytest.importorskip("peft")
    decoder = build(training=Training((1, 4)))
    layers = peft.LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False)
    peft.inject_adapter_in_model(layers, decoder.backbone)
    images = [decoder.decode([0, 1], **DECODED, cache=cache).image for cache in (True, False)]
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)
