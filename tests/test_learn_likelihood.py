"""The lesson on likelihood: its script runs, and its page says what it finds."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "likelihood.md").read_text(encoding="utf-8")
NUMBER = r"(\d+\.\d{3})"
CELL = rf"{NUMBER} ± \d+\.\d{{3}}"


def by_groups(text):
    """The number of groups, and three means of bits per dimension."""
    rows = re.findall(rf"^\| (\d+) \| {CELL} \| {CELL} \| {CELL} \|$", text, re.MULTILINE)
    return [(int(g), *map(float, means)) for g, *means in rows]


def by_change(text):
    """For each change: the bits per dimension, and how often the scan itself is more probable."""
    rows = re.findall(rf"^\| ([a-z ]+) \| {CELL} \| (?:(\d+)%|–) \|$", text, re.MULTILINE)
    return {name: (float(bits), int(share or 100)) for name, bits, share in rows}


def correct(text):
    """The correct labels by the number of samples and whether their noise is common."""
    rows = re.findall(r"^\| (\d+) \| (the same|different) for .* \| (\d+) \|$", text, re.MULTILINE)
    return {(int(samples), noise): int(number) for samples, noise, number in rows}


@pytest.mark.slow
def test_the_script_finds_what_the_page_says(digits_run, tmp_path, capsys):
    lesson = runpy.run_path(str(LEARN / "likelihood.py"))
    lesson["main"](digits_run, out=tmp_path, count=60, few=2, samples=16, tested=30)
    printed = capsys.readouterr().out
    assert "which were seen in the training" in printed
    alone = float(re.search(rf"each pixel alone: {CELL}", printed)[1])
    for text, tested in ((printed, 30), (PAGE, 100)):
        groups = by_groups(text)
        assert [g for g, *_ in groups] == [1, 4, 16]
        for _, bound, few, flow in groups:
            assert flow < few  # a lower bound of the likelihood, an upper one of the bits
            assert bound == pytest.approx(groups[0][1], abs=0.1)  # an ideal network: no difference
            assert bound < alone < math.log2(17)
        changes = by_change(text)
        assert list(changes) == list(lesson["changed"](torch.zeros(1, 1, 8, 8), torch.zeros(1)))
        bits, _ = changes.pop("as scanned")
        del changes["black"]  # unlike all that was trained on: trainings differ about it
        assert all(other > bits + 0.3 and share > 80 for other, share in changes.values())
        right = correct(text)
        assert list(right) == [(k, noise) for k in (4, 16) for noise in ("different", "the same")]
        assert right[4, "different"] < right[4, "the same"]
        assert right[16, "the same"] > 0.9 * tested
    assert (tmp_path / "likelihood.png").stat().st_size


@pytest.mark.slow
def test_each_pixel_alone():
    pixels_alone = runpy.run_path(str(LEARN / "likelihood.py"))["pixels_alone"]
    levels = torch.linspace(-1, 1, 17)[:, None, None, None].expand(17, 1, 2, 2)
    assert pixels_alone(levels, levels).tolist() == pytest.approx(17 * [math.log2(17)])
    # Black was seen 83 times, and each of 17 greys counts once more.
    black = -torch.ones(83, 1, 2, 2)
    assert pixels_alone(black, black[:1]).item() == pytest.approx(math.log2(100 / 84), rel=1e-5)
