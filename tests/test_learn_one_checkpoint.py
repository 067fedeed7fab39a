"""The lesson on one checkpoint: its script runs, and its page says what it finds."""

import re
import runpy
from pathlib import Path

import pytest

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "one_checkpoint.md").read_text(encoding="utf-8")
NUMBER = r"([\d.]+)"
ROW = (
    rf"^\| (\d+) \| {NUMBER} \| (\d+) \| (\d+) \| (\d+) \| {NUMBER}x \| {NUMBER}x \| (\d+)% "
    rf"\| {NUMBER} ± {NUMBER} \|$"
)


def table(text):
    """For each setting: calls, tokens, both times, the share until the first group, distance."""
    rows = re.findall(ROW, text, re.MULTILINE)
    return {
        (int(g), float(o), int(s)): [float(value) for value in values[:6]]
        for g, o, s, *values in rows
    }


def test_the_costs_on_the_page_are_those_of_the_formula():
    for (groups, overlap, steps), (calls, tokens, *_) in table(PAGE).items():
        assert calls == steps + (groups - 1) * round((1 - overlap) * steps)
        one = groups == 1 or overlap == 1
        assert tokens == 16 * steps + (0 if one else 16 - 16 // groups)


@pytest.mark.slow
def test_the_script_finds_what_the_page_says(digits_run, tmp_path, capsys):
    lesson = runpy.run_path(str(LEARN / "one_checkpoint.py"))
    lesson["main"](digits_run, out=tmp_path, count=150, seeds=2, rounds=2)
    printed = capsys.readouterr().out
    made, page = table(printed), table(PAGE)
    assert len(page) == len(lesson["SETTINGS"])
    assert [(key, row[:2]) for key, row in made.items()] == [
        (key, row[:2]) for key, row in page.items()
    ]
    for sentence in re.findall(r"^    (At overlap.*|3 groups.*)$", PAGE, re.MULTILINE):
        assert sentence in printed
    rounding, cached, again = re.search(
        r"at most (\S+); they evaluate (\d+) and (\d+)", printed
    ).groups()
    assert float(rounding) < 1e-5  # see Decoder.decode
    assert (cached, again) == re.search(r"they evaluate (\d+) and (\d+)", PAGE).groups()

    for found in (made, page):
        one, many = found[1, 0, 16], found[16, 0, 16]
        assert found[4, 1, 16][5] == one[5]  # the images are equal
        assert one[4] == 100
        # More calls on almost as many tokens: a batch gets slower by less than a single image.
        assert many[3] < many[2]
        assert many[4] < found[2, 0, 16][4] < 80
    assert page[16, 0, 16][2] < 16  # times the calls
    floor = float(re.search(r"scans: ([\d.]+)", printed)[1])
    # Better than twice as far as scans are from scans, for every setting.
    assert all(row[5] < 2 * floor for row in made.values())
    for name in ("one_checkpoint.png", "one_checkpoint_training.png"):
        assert (tmp_path / name).stat().st_size
