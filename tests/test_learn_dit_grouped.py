"""The lesson on a DiT that becomes grouped: what its page says before and after fine-tuning."""

import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: nothing is tested")

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "dit_grouped.md").read_text(encoding="utf-8")


def table(text):
    """For each number of groups the distances before and after, and the varieties."""
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \| (\d+)% \|$", text, re.MULTILINE
    )
    assert [int(groups) for groups, *_ in rows] == [1, 2, 4, 8, 16]
    return [tuple(map(float, row)) for _, *row in rows]


def holds(text):
    """More groups are farther and more alike before the fine-tuning, and less so after it."""
    before, after, alike, varied = zip(*table(text), strict=True)
    assert list(before) == sorted(before)
    assert list(alike) == sorted(alike, reverse=True)
    assert before[2] > 1.5 * before[0]
    assert max(after) < min(2 * after[0], before[-1] / 1.5)
    assert min(varied) > 2 * alike[-1]
    there, back = re.findall(r"^ *largest difference .*: (\de-\d\d)$", text, re.MULTILINE)
    assert max(float(there), float(back)) < 1e-2
    assert "4 groups: decoding beyond what this checkpoint was trained for" in text


def test_the_page_says_what_its_table_says():
    holds(PAGE)


@pytest.mark.slow
def test_a_short_training_shows_the_same(tmp_path, capsys):
    lesson = runpy.run_path(str(LEARN / "dit_grouped.py"))
    lesson["main"](tmp_path, steps=1000, tuning=300, samples=500)
    holds(capsys.readouterr().out)
    assert (tmp_path / "dit_grouped.png").stat().st_size


@pytest.mark.slow
def test_one_group_samples_what_diffusers_samples_there_and_back():
    lesson = runpy.run_path(str(LEARN / "dit_grouped.py"))
    torch.manual_seed(0)
    dit = lesson["network"](depth=1).eval()
    for parameter in dit.parameters():  # many are zero at the start
        torch.nn.init.normal_(parameter, std=0.05)
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 0])
    decoder = lesson["load_dit"](dit, latents=False)
    ours = decoder.decode(label, noise=noise, steps=4).image
    for network in (dit, lesson["to_diffusers"](decoder)):
        theirs = lesson["ddim"](network, noise, label, steps=4)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
