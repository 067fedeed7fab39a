"""The lesson on your own photographs: its commands run, are killed and resume."""

import json
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_tables import heads, tables

LEARN = Path(__file__).parents[1] / "docs" / "learn"
PAGE = (LEARN / "own_photographs.md").read_text(encoding="utf-8")
TINY = ("nn.width=16", "nn.depth=1", "nn.heads=1", "callbacks.samples=null")


def commands(text):
    """The command and the names of the settings of each line after a prompt."""
    joined = text.replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"^ *\$ (.*)$", joined, re.MULTILINE)]
    return [[word.split("=")[0] for word in words] for words in found]


@pytest.mark.slow
def test_the_commands_and_tables_are_the_scripts(tmp_path, capfd, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main = runpy.run_path(str(LEARN / "own_photographs.py"))["main"]
    main(work=tmp_path / "work", out=tmp_path, steps=60, sweep_steps=2, seeds=(0,), more=TINY)
    out, err = capfd.readouterr()
    added = [setting.split("=")[0] for setting in TINY]
    printed = [[word for word in words if word not in added] for words in commands(out)]
    # The page shows the bench, which is called twice, once.
    assert printed[:-1] == commands(PAGE)
    assert printed[-1] == printed[-2]
    assert out.count("(killed)") == 2
    earlier = re.search(r"(\d+) of 11 configurations were measured earlier", err)
    assert 2 <= int(earlier[1]) <= 11

    summary = json.loads((tmp_path / "work/run/summary.json").read_text())
    assert summary["images_seen"] == 60 * 32
    assert len((tmp_path / "work/bench/results.jsonl").read_text().splitlines()) == 11
    assert heads(out) == heads(PAGE)
    sweep, bench, halves = tables(out)
    shown_sweep, shown_bench, shown_halves = tables(PAGE)
    assert [row[:2] for row in sweep] == [row[:2] for row in shown_sweep]
    assert all(float(row[3]) <= float(row[2]) for row in sweep)
    assert [row[:5] for row in bench] == [row[:5] for row in shown_bench]
    # The squares and the halves are the same everywhere, up to how a picture is scaled.
    assert [row[0] for row in halves] == [row[0] for row in shown_halves]
    distances = [float(row[1]) for row in halves]
    assert distances == pytest.approx([float(row[1]) for row in shown_halves], rel=0.02)
    assert all(few > 1.1 * many for many, few in pairwise(distances))
    for name in ("own_photographs.png", "own_photographs_samples.png"):
        assert (tmp_path / name).stat().st_size
