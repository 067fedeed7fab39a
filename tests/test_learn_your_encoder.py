"""The lesson on an encoder of one's own: what its page says of training, streaming and files."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from rolldiff.evaluation.metrics import psnr

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "your_encoder.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lesson():
    return runpy.run_path(str(LEARN / "your_encoder.py"))


def quality(text):
    """What was decoded with, and its PSNR."""
    rows = re.findall(r"^\| (num_groups=\d+|principal components) \| ([\d.]+) dB \|$", text, re.M)
    return {name: float(value) for name, value in rows}


def arrivals(text):
    """Overlap, final rows of pixels, arrived rows of codes, and network calls."""
    rows = re.findall(r"^\| ([\d.]+) \| (\d) of 8 \| (\d) of 4 \| (\d+) \|$", text, re.M)
    return [(float(overlap), *map(int, rest)) for overlap, *rest in rows]


def test_the_loss_trains_the_encoder(lesson):
    torch.manual_seed(0)
    encoder, decoder = lesson["build"]()
    for parameter in decoder.parameters():  # some of them are zero at the start
        torch.nn.init.normal_(parameter, std=0.1)
    lesson["train"](encoder, decoder, torch.rand(4, 1, 8, 8) * 2 - 1, steps=1)
    assert all((p.grad != 0).any() for p in encoder.parameters())


def test_the_page_says_what_its_tables_say():
    found = quality(PAGE)
    assert list(found)[:5] == [f"num_groups={g}" for g in (1, 2, 4, 8, 16)]
    components = found.pop("principal components")
    assert min(found.values()) == found["num_groups=16"] < max(found.values()) < components
    assert [row for row in arrivals(PAGE) if row[0] == 0] == [
        (0.0, 2 * i, i, 16 * i) for i in range(1, 5)
    ]


@pytest.mark.slow
def test_the_script_trains_streams_and_draws(lesson, tmp_path, capsys):
    lesson["main"](tmp_path, steps=300)
    printed = capsys.readouterr().out
    found = quality(printed)
    assert found.keys() == quality(PAGE).keys()
    assert found["principal components"] == quality(PAGE)["principal components"]
    # A fifth of the training. The mean of all digits has 11.3 dB, and noise has less.
    assert all(found[f"num_groups={groups}"] > 14 for groups in (1, 2, 4, 8))
    assert arrivals(printed) == arrivals(PAGE)  # they do not depend on the weights
    assert "equal to decoding with all codes: True" in printed
    assert (tmp_path / "your_encoder.png").stat().st_size


@pytest.mark.slow
def test_the_codes_tell_images_apart_and_survive_a_file(lesson, tmp_path):
    torch.manual_seed(0)
    image = lesson["Digits"](held_out=0.1).image
    encoder, decoder = lesson["build"]()
    lesson["train"](encoder, decoder, image, steps=150)
    lesson["save"](encoder, decoder, tmp_path)
    again = lesson["load"](tmp_path)
    with torch.no_grad():
        codes = [encoder(image[:64]), again[0](image[:64])]
    decoded = [
        each.decode(code, num_groups=4, steps=8, seed=0).image
        for each, code in zip((decoder, again[1]), codes, strict=True)
    ]
    assert torch.equal(*codes)
    assert torch.equal(*decoded)
    own, others = psnr(image[:64], decoded[0]), psnr(image[:64].roll(1, 0), decoded[0])
    assert own > others + 2
