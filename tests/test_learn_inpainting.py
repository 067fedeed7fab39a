"""The lesson on inpainting: its script runs on the default training, and its page is true."""

import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_tables import heads, tables

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "inpainting.md").read_text(encoding="utf-8")


def number(cell):
    return float(re.match(r"[\d.]+", cell)[0])


@pytest.fixture(scope="module")
def lesson():
    return runpy.run_path(str(LEARN / "inpainting.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_what_the_page_says(lesson, digits_run, tmp_path, capsys):
    lesson["main"](digits_run, out=tmp_path, count=100)
    printed = capsys.readouterr().out
    assert (tmp_path / "inpainting.png").stat().st_size
    inpainted, relabelled, inverted, varied = made = tables(printed)
    shown = tables(PAGE)
    assert heads(printed) == heads(PAGE)
    assert [[row[:1] for row in t] for t in made] == [[row[:1] for row in t] for t in shown]

    # The cost is exact; so are the pixels that are kept.
    assert [row[4:] for row in inpainted] == [row[4:] for row in shown[0]]
    assert [row[2] for row in inpainted] == [row[2] for row in shown[0]]
    assert {row[2] for row in inpainted[2:]} == {"0"}
    # Over 100 digits the ratio of the seams varies by up to 0.1.
    assert all(0.85 < float(row[3]) < 1.2 for row in inpainted[2:])
    apart = r"its lower half again: (\S+) apart"
    # The page's 0 may be rounding elsewhere.
    assert float(re.search(apart, printed)[1]) < 1e-4
    assert re.search(apart, PAGE)[1] == "0"

    new = [number(row[2]) for row in relabelled]
    assert min(new[:2]) > 90 > max(new[2:])
    assert new[3] > new[2]
    assert new[5] > new[4]

    psnr = {(int(row[0]), int(row[1])): number(row[2]) for row in inverted}
    for groups in (1, 4, 16):
        assert psnr[groups, 64] > psnr[groups, 16] > 40
    assert psnr[1, 16] > psnr[16, 16]
    assert all(float(row[3]) == pytest.approx(1, abs=0.3) for row in inverted)

    change = [float(row[1]) for row in varied]
    assert change[0] < 0.02
    assert all(b > a + 0.05 for a, b in pairwise(change))
    assert all(number(row[2]) > 85 for row in varied)
    own, fresh = (re.fullmatch(r"([\d.]+), (\d+)%", varied[i][3]) for i in (0, -1))
    assert float(own[1]) < float(fresh[1]) - 0.05
    assert float(own[2]) > 70


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_more_iterations_and_fresh_noise_of_one_group(lesson, digits_run):
    decoder = lesson["Decoder"].from_pretrained(digits_run)
    digits = lesson["load_digits"]()
    image = torch.from_numpy(digits.images[:20]).float()[:, None] / 8 - 1
    label = torch.from_numpy(digits.target[:20]).long()

    def error(iterations):
        noise = lesson["invert"](decoder, image, label, iterations=iterations)
        return lesson["rms"](decoder.decode(label, noise=noise).image - image)

    assert error(16) < error(8) < error(4)
    *_, (name, varied, mask) = lesson["pictures"](decoder, image[:10], label[:10])
    assert name == "fresh in group 3 of 4"
    assert mask[4:6].all()
    assert mask.sum() == 16
    moved = (varied - image[:10]).square().mean((0, 1, 3)).sqrt()
    assert moved[:4].max() < 0.05
    assert moved[4:6].min() > 0.2
    assert moved[6:].mean() < moved[4:6].mean()


def test_mixed_noise_keeps_its_size(lesson):
    noise, fresh = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    for strength in (0, 0.25, 0.5, 0.75, 1):
        mixed = lesson["mixed"](noise, fresh, strength)
        assert lesson["rms"](mixed) == pytest.approx(1, abs=0.03)
    assert torch.allclose(lesson["mixed"](noise, fresh, 1), fresh)
