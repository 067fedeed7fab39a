"""The lessons of the documentation: their scripts run, and say what the pages say."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from rolldiff import GroupSchedule

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "sixty_lines.md").read_text(encoding="utf-8")
LESSONS = sorted(path.stem for path in LEARN.glob("*.py"))
SETTINGS = [(1, 1.0), (4, 0.0), (4, 0.5), (4, 1.0), (64, 0.0), (64, 0.5), (64, 1.0)]


def table(text):
    """Groups, overlap, steps and error of each row."""
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+)% \|$", text, re.MULTILINE)
    return [(int(g), float(o), int(n), float(error)) for g, o, n, error in rows]


@pytest.mark.parametrize("name", LESSONS)
def test_a_page_quotes_its_script(name):
    page = (LEARN / f"{name}.md").read_text(encoding="utf-8")
    script = (LEARN / f"{name}.py").read_text(encoding="utf-8")
    quotes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert quotes
    for quote in quotes:
        assert quote in script, quote


@pytest.mark.parametrize("name", LESSONS)
def test_a_page_shows_its_pictures(name):
    page = (LEARN / f"{name}.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[.*?\]\(pictures/(.*?)\)", page))
    assert shown
    assert shown == {path.name for path in (LEARN / "pictures").glob(f"{name}*")}


def test_sixty_lines_are_sixty_lines():
    script = (LEARN / "sixty_lines.py").read_text(encoding="utf-8")
    assert sum(map(bool, script.splitlines())) <= 60


@pytest.mark.slow
def test_the_table_and_the_picture_are_the_scripts(tmp_path, capsys):
    runpy.run_path(str(LEARN / "sixty_lines.py"))["main"](tmp_path)
    made, printed = table(capsys.readouterr().out), table(PAGE)
    assert len(printed) == len(SETTINGS)
    # The last digit that is printed may be rounded otherwise on another machine.
    assert made == [(*row, pytest.approx(error, abs=0.011)) for *row, error in printed]
    assert (tmp_path / "sixty_lines.png").stat().st_size


@pytest.mark.slow
def test_all_schedules_sample_the_data():
    lesson = runpy.run_path(str(LEARN / "sixty_lines.py"))
    covariance = lesson["natural_covariance"](8)

    def decoded(num_groups, overlap, steps):
        schedule = GroupSchedule(num_tokens=64, num_groups=num_groups, overlap=overlap, steps=steps)
        *_, (images, _) = lesson["decode"](torch.eye(64).double(), covariance, schedule)
        return images

    def error(images):
        return float((images.T @ images - covariance).norm() / covariance.norm())

    one = decoded(1, 1.0, 16)
    for num_groups, overlap in SETTINGS:
        images = decoded(num_groups, overlap, 16)
        assert error(images) < 0.01
        assert error(decoded(num_groups, overlap, 32)) < error(images) / 2
        if overlap == 1:
            assert torch.equal(images, one)
    # Equal numbers of solver steps.
    assert error(decoded(1, 1.0, 64)) == pytest.approx(0.0005, abs=5e-5)
    assert error(decoded(4, 0.0, 16)) == pytest.approx(0.0032, abs=5e-5)
