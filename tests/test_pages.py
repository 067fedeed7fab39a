"""The cards of photographs: their scripts go on where they stopped, and say what was measured."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CARDS = Path(__file__).parents[1] / "benchmarks"
SETS = {"cifar10": ("img", 32, 3), "fashion_mnist": ("image", 28, 1)}
# The lines of each bench at scale=smoke.
SMOKE = {
    "cifar10": {"cifar10-smoke": 2},
    "fashion_mnist": {"universal-s0": 2, "seven_half-s0": 1, "fashion_mnist-pixels-smoke": 2},
}
# What `rolldiff` and `timeout` are to the scripts; each piece is over before its work is done.
ROLLDIFF = """#!/usr/bin/env bash
echo "rolldiff $*" >> calls
for word in "$@"; do case $word in run_dir=*|resume=*|ckpt=*) run=${word#*=} ;; esac; done
case "$1 $2" in
  "train run_dir="*) mkdir -p "$run/checkpoints" && touch "$run/checkpoints/step-1.ckpt" ;;
  "train resume="*) touch "$run/summary.json" ;;
  "bench "*) mkdir -p "$run/bench"; [[ -f $run/begun ]] || { touch "$run/begun"; exit 124; } ;;
esac
"""
TIMEOUT = """#!/usr/bin/env bash
shift 3
"$@"
"""


def run(card, *arguments, cwd, path=None):
    """The script of a card, or another one beside the cards."""
    script = CARDS / card / "run.sh" if card in SETS else CARDS / card
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{path or Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pretended(tmp_path):
    """A folder whose `rolldiff` stops after each piece."""
    for name, text in (("rolldiff", ROLLDIFF), ("timeout", TIMEOUT)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_a_card_goes_on_where_a_piece_stopped(pretended):
    done = run("cifar10", "scale=smoke", "minutes=3", cwd=pretended, path=pretended / "bin")
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = calls(pretended)
    assert first.startswith(
        "rolldiff train run_dir=runs/cifar10-smoke time_limit=00:00:03:00 experiment="
    )
    assert second == "rolldiff train resume=runs/cifar10-smoke time_limit=00:00:03:00"
    assert third.startswith("rolldiff bench ckpt=runs/cifar10-smoke")
    assert fourth == third, "the bench knows itself what is done"


def test_a_card_stops_after_one_piece_if_asked(pretended):
    for count in (1, 3, 4, 4):  # the second call ends the training, and the bench begins
        once = run("cifar10", "scale=smoke", "once=true", cwd=pretended, path=pretended / "bin")
        assert once.returncode == (75 if count < 4 else 0), once.stderr
        assert len(calls(pretended)) == count
        assert ("goes on" in once.stdout) == (count < 4)


def test_a_training_without_a_checkpoint_begins_again(pretended):
    (pretended / "runs/cifar10-smoke").mkdir(parents=True)
    (pretended / "runs/cifar10-smoke/config.yaml").touch()
    run("cifar10", "scale=smoke", "once=true", cwd=pretended, path=pretended / "bin")
    assert calls(pretended)[0].startswith("rolldiff train run_dir=runs/cifar10-smoke ")
    aside = next(pretended.glob("runs/cifar10-smoke-killed-*"))
    assert [file.name for file in aside.iterdir()] == ["config.yaml"]


def test_a_failure_ends_a_card(pretended):
    (pretended / "bin" / "rolldiff").write_text("#!/bin/sh\nexit 3\n")
    for card in SETS:
        assert run(card, "scale=tiny", cwd=pretended, path=pretended / "bin").returncode == 3


@pytest.mark.parametrize("wrong", ["scale=huge", "minutes=0", "once=maybe", "train", "data="])
def test_a_wrong_argument_ends_a_card(wrong, tmp_path):
    done = run("fashion_mnist", wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert wrong in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_day_on_a_gpu_goes_on_piece_by_piece(pretended):
    python = pretended / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\necho "python $*" >> calls\n')
    python.chmod(0o755)
    status = 75
    while status == 75:
        day = run("gpu.sh", "scale=smoke", "once=true", cwd=pretended, path=pretended / "bin")
        status, before = day.returncode, len(calls(pretended))
        assert before < 40, "it never ends"
    assert status == 0, day.stderr
    tests, engine, *cards = calls(pretended)
    assert tests.startswith("python -m pytest -n 0 -m gpu ")
    assert "engine.py --quick --out runs/results/engine.json" in engine
    runs = list(dict.fromkeys(re.search(r"(?:run_dir|ckpt|resume)=(\S+)", c)[1] for c in cards))
    assert [Path(run).name for run in runs] == [
        "cifar10-smoke",
        "universal-s0",
        "seven_half-s0",
        "fashion_mnist-pixels-smoke",
    ]
    # Nothing is done again.
    assert run("gpu.sh", "scale=smoke", cwd=pretended, path=pretended / "bin").returncode == 0
    assert len(calls(pretended)) == before


def test_a_day_on_a_gpu_needs_one(pretended):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("gpu.sh", cwd=pretended)
    assert done.returncode == 2
    assert done.stderr == "gpu.sh: scale must be smoke where torch sees no GPU, got full\n"


@pytest.mark.slow
def test_a_day_on_a_gpu_runs_end_to_end(tmp_path):
    for card in SETS:
        images(card, tmp_path / "data" / card)
    done = run("gpu.sh", "scale=smoke", f"data={tmp_path / 'data'}", "out=kept", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = {path.parent.name for path in (tmp_path / "kept").glob("*/results.jsonl")}
    assert kept == {name for found in SMOKE.values() for name in found}
    for folder in (tmp_path / "kept").glob("*/"):
        assert {path.name for path in folder.iterdir()} == {
            "report.md",
            "results.jsonl",
            "summary.json",
        }
    assert json.loads((tmp_path / "kept" / "engine.json").read_text())["machine"]


def images(card, folder):
    """Twenty random images in the schema of a card."""
    datasets = pytest.importorskip("datasets")
    column, size, channels = SETS[card]
    pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, channels), np.uint8)
    stored = []
    for image in pixels.squeeze():
        Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
        stored.append({"bytes": buffer.getvalue(), "path": None})
    rows = {column: stored, "label": [i % 10 for i in range(20)]}
    features = {column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("card", SETS)
def test_a_card_runs_end_to_end(card, tmp_path):
    images(card, tmp_path / "data")
    done = run(card, "scale=smoke", f"data={tmp_path / 'data'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {bench.parent.name: bench for bench in (tmp_path / "runs").rglob("bench")}
    assert {name: len(lines(bench)) for name, bench in found.items()} == SMOKE[card]
    assert all((bench / "report.md").is_file() for bench in found.values())


def lines(bench):
    return (bench / "results.jsonl").read_text().splitlines()


@pytest.mark.parametrize("report", sorted(CARDS.glob("*/tiny*/report.md")), ids=str)
def test_a_card_holds_the_tables_of_its_report(report):
    card = (report.parents[1] / "README.md").read_text(encoding="utf-8")
    text = report.read_text(encoding="utf-8")
    for title in ("The best, at any cost", "What grouping costs"):
        table = text.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert "\n".join(rows) in card
    rows = [json.loads(line) for line in (report.parent / "results.jsonl").read_text().splitlines()]
    assert {row["samples"] * len(row["seeds"]) for row in rows} == {1000}
    assert all(row["commit"] for row in rows)
