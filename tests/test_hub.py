import json

import pytest
import torch

from rolldiff import ClassLabels, Cosine, Decoder, Patches, Training, Transformer
from rolldiff.config import build, describe
from rolldiff.times import Independent, LogitNormal, Mixture, Shared


@pytest.fixture
def decoder():
    layout = Patches((4, 8), channels=3, patch=2)
    times = Mixture((Shared(), Independent(LogitNormal(-0.5, 2.0))), (1.0, 3.0))
    return Decoder(
        layout,
        Transformer(layout, width=16, depth=1, heads=2, condition=ClassLabels(4)),
        noise=Cosine(2.0),
        prediction="v",
        training=Training((1, 2), orders=("cells:2", list(range(8))), times=times),
    )


def test_round_trip(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    read = Decoder.from_pretrained(tmp_path)
    assert (
        read.to_config()
        == decoder.to_config()
        == json.loads((tmp_path / "config.json").read_text())
    )
    assert read.trained_for == decoder.trained_for
    ask = {"num_groups": 2, "steps": 2, "seed": 0, "order": "cells:2"}
    assert torch.equal(read.decode(**ask).image, decoder.decode(**ask).image)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.nn.Linear",
        "rolldiff.config.importlib.import_module",
        "rolldiff.cli.main",
        "rolldiff.hub.Path",
        "rolldiff.nowhere.Thing",
        "rolldiff",
        None,
    ],
)
def test_a_configuration_names_nothing_but_our_classes(target):
    with pytest.raises(ValueError, match="_target_ must name a class of rolldiff"):
        build({"_target_": target, "x": 1})


@pytest.mark.usefixtures("unchecked")
def test_a_configuration_that_does_not_fit(decoder):
    with pytest.raises(ValueError, match="does not fit Patches"):
        build({"_target_": "rolldiff.layout.Patches", "sides": 3})
    with pytest.raises(ValueError, match="must describe a Decoder"):
        Decoder.from_config(describe(Patches(8)))
    with pytest.raises(ValueError, match="cannot hold"):
        describe(object())


def test_damaged_folders(decoder, tmp_path):
    def broken(message, name, content):
        decoder.save_pretrained(tmp_path)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Decoder.from_pretrained(tmp_path)

    weights = tmp_path / "model.safetensors"
    decoder.save_pretrained(tmp_path)
    whole = weights.read_bytes()
    broken("without model.safetensors", "model.safetensors", None)
    broken("without config.json", "config.json", None)
    broken("damaged", "model.safetensors", whole[: len(whole) // 2])
    broken("damaged", "model.safetensors", b"pickle")
    broken("not JSON", "config.json", b"{")
    smaller = decoder.to_config()
    smaller["backbone"]["width"] = 8
    broken("disagree", "config.json", json.dumps(smaller).encode())
