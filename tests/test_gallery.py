"""The gallery of the documentation: its page, its commands and its films."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import TINY, rolldiff

from rolldiff import GroupSchedule, Patches

DOCS = Path(__file__).parents[1] / "docs"
GALLERY = runpy.run_path(str(DOCS / "gallery.py"))
ITEMS = GALLERY["items"]()
PAGE = (DOCS / "gallery.md").read_text(encoding="utf-8")


def test_the_page_is_the_scripts():
    assert GALLERY["page"]() == PAGE


def test_every_preset_is_shown():
    presets = {path.stem for path in (DOCS.parent / "conf/decode").glob("*.yaml")} - {"default"}
    assert presets == set(re.findall(r" decode=(\w+)", PAGE))


@pytest.mark.slow
def test_the_films_are_those_of_the_page():
    films = {path.stem: path for path in (DOCS / "pictures/gallery").iterdir()}
    assert set(films) == {item.name for item in ITEMS}
    for item in ITEMS:
        schedule = GALLERY["decode_config"](item).schedule(Patches(8, channels=1, patch=2))
        with Image.open(films[item.name]) as film:
            assert film.n_frames == min(24, schedule.num_steps), item.name
            film.seek(film.n_frames - 1)
            shown = np.asarray(film.convert("RGB")).astype(int)
        # The matrix is in the film: a row in the middle of each group, without the frame around it.
        height = shown.shape[0] - 44
        expected = np.asarray(GALLERY["matrix"](schedule, height=height, width=2 * height))
        inside = slice(12, 8 + height), slice(12, 8 + 2 * height)
        difference = np.abs(shown[inside] - expected[2 : height - 2, 2 : 2 * height - 2])
        assert difference.max() <= 8, item.name  # the palette has 32 blues


def test_the_matrix_is_drawn_from_noise_to_data():
    schedule = GroupSchedule(num_tokens=4, num_groups=2, steps=2)
    drawn = np.asarray(GALLERY["matrix"](schedule, height=2, width=5))
    noise = drawn[..., 0] == 255
    data = drawn[..., 0] == GALLERY["DATA"][0]
    assert noise.tolist() == [[True] + 4 * [False], [True, True, True, False, False]]
    assert data.tolist() == [[False, False, True, True, True], 4 * [False] + [True]]


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    orders = "training.orders=[top_to_bottom,bottom_to_top,left_to_right,random:0]"
    groups = "training.num_groups=[1,2,4,8,16]"
    assert rolldiff("train", *TINY, groups, "run_dir=RUN", cwd=tmp_path).returncode == 0
    assert rolldiff("train", *TINY, groups, orders, "run_dir=ORDERS", cwd=tmp_path).returncode == 0
    commands = re.findall(r"^    rolldiff (decode .*)$", PAGE, re.MULTILINE)
    assert len(commands) == len(ITEMS)
    for command in commands:
        done = rolldiff(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "beyond what" not in done.stderr, command
        assert (tmp_path / re.search(r"out=(\S+)", command)[1]).stat().st_size
