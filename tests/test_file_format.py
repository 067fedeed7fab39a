"""Files of version 0.1 (commit 74d2ec2) load and give the images that it gave."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rolldiff
from rolldiff import ClassLabels, Decoder, Guidance, Heun, TokenGrid
from rolldiff.hub import MOVED, PUBLIC, RENAMED, build, describe, read_checkpoint
from rolldiff.tokenizer import Prior, Tokenizer

LEGACY = Path(__file__).parent / "legacy"
pytestmark = pytest.mark.filterwarnings("ignore:decoding beyond")


def close(image, expected):
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_decoder_decodes_the_same_image():
    decoder = Decoder.from_pretrained(LEGACY / "decoder")
    expected = load_file(LEGACY / "decoder/expected.safetensors")
    cond = {name[5:]: value for name, value in expected.items() if name.startswith("cond.")}
    cond["small"] = cond["small"].movedim(1, -1)  # LowResolution is a TokenGrid now
    output = decoder.decode(
        cond,
        num_groups=4,
        steps=3,
        solver=Heun(),
        guidance=Guidance(1.0, ramp_from=0.5),
        seed=3,
    )
    close(output.image, expected["image"])


@pytest.mark.parametrize("name", ["decoder", "last.ckpt"])
def test_overlap_is_beyond_what_it_was_trained_for(name):
    """Its moving groups did not see later ones, which makes no difference at overlap 0 alone."""
    decoder = read_checkpoint(LEGACY / name, Decoder)
    assert decoder.training_distribution.overlap == (0.0,)
    with pytest.warns(UserWarning, match=r"overlap 0\.5 \(trained: 0\.0\)"):
        decoder.decode(num_images=1, num_groups=2, overlap=0.5, steps=1)


def test_a_tokenizer_gives_the_same_codes_and_image():
    tokenizer = Tokenizer.from_pretrained(LEGACY / "tokenizer")
    expected = load_file(LEGACY / "tokenizer/expected.safetensors")
    codes = tokenizer.encode(expected["input"])
    assert torch.equal(codes, expected["codes"])
    latents = tokenizer.dequantize(codes)
    close(tokenizer.decoder.decode(latents, num_groups=2, steps=2, seed=0).image, expected["image"])


def test_a_prior_gives_the_same_codes():
    prior = Prior.from_pretrained(LEGACY / "prior")
    codes = torch.stack(list(prior.generate([1, 2], seed=0, guidance=0.5)), 1)
    assert torch.equal(codes, load_file(LEGACY / "prior/expected.safetensors")["codes"])


def test_a_lightning_checkpoint_decodes_the_same_image():
    decoder = read_checkpoint(LEGACY / "last.ckpt", Decoder)
    expected = load_file(LEGACY / "last.expected.safetensors")["image"]
    close(decoder.decode([1], num_groups=2, steps=2, seed=0).image, expected)


@pytest.mark.parametrize("kind", ["decoder", "tokenizer", "prior"])
def test_saved_again_it_names_public_paths_only(kind, tmp_path):
    cls = {"decoder": Decoder, "tokenizer": Tokenizer, "prior": Prior}[kind]
    cls.from_pretrained(LEGACY / kind).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()

    def targets(config):
        if isinstance(config, dict):
            yield config.get("_target_")
            config = list(config.values())
        for value in config if isinstance(config, list) else []:
            yield from targets(value)

    found = {target for target in targets(json.loads(text)) if target}
    assert found
    assert found <= set(PUBLIC)
    before, after = cls.from_pretrained(LEGACY / kind), cls.from_pretrained(tmp_path)
    for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("public", [name for name in PUBLIC if "integrations" not in name])
def test_a_public_path_is_importable_as_written(public):
    module, _, name = PUBLIC[public].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    found = rolldiff
    for part in public.split(".")[1:]:
        found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
    assert found is cls
    assert not set(MOVED) & set(PUBLIC)
    assert set(RENAMED) | set(MOVED.values()) <= set(PUBLIC)


def test_only_public_classes_are_built():
    assert build(describe(ClassLabels(3))) == ClassLabels(3)
    old = {"_target_": "rolldiff.conditions.TokenGrid", "height": 2, "width": 3, "codes": 5}
    assert build(old) == TokenGrid(2, 3, codebook_size=5)
    for name in ("rolldiff.evaluation.networks.Inception", "rolldiff.hub.Pretrained", "os.system"):
        with pytest.raises(ValueError, match="_target_ must name a class"):
            build({"_target_": name})
