"""The page about files names every file and key that the commands write, and no other."""

import csv
import json
import re
from pathlib import Path

import pytest
from test_cli import TINY, rolldiff

PAGE = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
MINE = ["bench.num_groups=[1,2]", "bench.steps=[1]", "bench.joint_steps=[]", "bench.samples=20"]
SWEEP = ["max_steps=2,3", "hydra.sweep.dir=SWEEP", "seed=0,x"]


def named(title):
    """What the first columns of the tables of a section name."""
    section = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def header(path):
    return next(csv.reader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.slow
def test_the_page_names_what_commands_write(tmp_path):
    often = ["trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=2"]
    assert rolldiff("train", *TINY, *often, "run_dir=RUN", cwd=tmp_path).returncode == 0
    run = tmp_path / "RUN"
    files = {re.sub(r"step-\d+", "step-N", str(p.relative_to(run))) for p in run.rglob("*.*")}
    summary = json.loads((run / "summary.json").read_text())
    described = named("A run of `rolldiff train`") | named("A saved model")
    assert files - {".lock"} | set(summary) == described
    columns = header(run / "logs/metrics.csv")
    report = [name for name in columns if not name.startswith("report/")]
    assert all(f"`{name}`" in PAGE for name in report)

    assert rolldiff("bench", "ckpt=RUN", *MINE, cwd=tmp_path).returncode == 0
    files = {path.name for path in (run / "bench").iterdir()}
    row = json.loads((run / "bench/results.jsonl").read_text().splitlines()[0])
    assert files - {".lock"} | set(row) == named("A benchmark")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = code.replace("RUN/bench", str(run / "bench"))
    exec(code, {})


@pytest.mark.slow
def test_the_page_names_what_a_sweep_writes(tmp_path):
    done = rolldiff("train", "-m", *TINY[1:], *SWEEP, cwd=tmp_path)
    assert done.returncode == 1, "a seed of x is refused, so its jobs fail"
    sweep = tmp_path / "SWEEP"
    files = {path.name for path in sweep.iterdir()} - {".lock", ".jobs", "2", "3"}
    assert files | {".jobs/N.json"} == {name.rstrip("/") for name in named("A sweep")}
    assert (sweep / ".jobs/0.json").is_file()
    columns = header(sweep / "sweep.csv")
    described = re.search(r"^Columns of `sweep.csv`:(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)[1]
    assert all(
        f"`{name}`" in described
        for name in columns
        if name not in ("max_steps", "seed") and not name.startswith("reported.")
    )
