"""Sweeps: the number that they search by, their jobs wherever these run, and the table of them."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from rolldiff import cli, jobs
from rolldiff.cli import main
from rolldiff.errors import UsageError
from rolldiff.jobs import LOST, Outcome, Sweep
from rolldiff.objective import check_objective, flat, objective

VALUES = {
    "device": "cpu",
    "seconds": 2,
    "fd_pixels": {"1": 0.5, "4": 0.25, "16": None},
    "psnr": {"1": 20.0, "4": 10.0},
    "few": {"1": None},
}
COMMAND = [sys.executable, "-m", "rolldiff"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ["max_steps=4", "batch_size=8", "nn.width=16", "nn.depth=1", "nn.heads=1"]
TINY += ["report.steps=1", "report.num_groups=[1,2]", "report.samples=40", "progress=false"]
TINY += ["callbacks.samples=null"]
WIDTH_OF_17 = "width must be a multiple of 4 heads, got width 17 and heads 1"


def rolldiff(*arguments, cwd):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT
    )


@pytest.fixture
def quiet(monkeypatch):
    """Restores what a command in this process changes."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield


def rows(folder):
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What a sweep searches by


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("fd_pixels", 0.25),
        ("fd_pixels.1", 0.5),
        ("fd_pixels.16", math.inf),
        ("few", math.inf),
        ("psnr", 10.0),
        ("seconds", 2.0),
    ],
)
def test_the_objective_is_a_number_or_the_smallest_of_a_group(name, number):
    assert objective(VALUES, name) == number


@pytest.mark.parametrize("name", ["fd", "fd_pixels.", "fd_pixels.2", "device", "", "1"])
def test_a_name_that_is_not_reported_is_refused_with_those_that_are(name):
    with pytest.raises(UsageError, match=r"optimized_metric must be among fd_pixels, few, psnr, s"):
        objective(VALUES, name)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [None, 4])
def test_the_objective_must_be_a_name(name):
    with pytest.raises(UsageError, match="optimized_metric must be a name such as fd_pixels, got"):
        check_objective(name, flat(VALUES))


@pytest.mark.usefixtures("quiet")
def test_a_wrong_objective_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *TINY, "optimized_metric=fd_pixels.4", "run_dir=run"])
    assert stop.value.code == 2
    assert "got 'fd_pixels.4'; did you mean fd_pixels.2?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# The table


def sweep_of(folder, numbers, metric="fd_pixels", **options):
    """A sweep whose jobs have come to these numbers."""
    sweep = Sweep(folder=folder, command="train", **options)
    for i, number in enumerate(numbers):
        job = sweep.begin(i, [f"seed={i}", "+x=y z"], folder / str(i))
        sweep.end(job, Outcome(metric=metric, objective=number, values={"fd": {"1": number}}))
    return sweep


def test_a_table_holds_every_job(tmp_path):
    sweep = sweep_of(tmp_path, [0.5, 0.25, math.inf])
    sweep.break_off(sweep.begin(3, ["seed=3", "~recipe"], tmp_path / "3"), "no: why", stopped=False)
    sweep.break_off(sweep.begin(4, ["seed=4"], tmp_path / "4"), "Ctrl-C", stopped=True)
    sweep.end(sweep.begin(5, ["seed=5"], tmp_path / "5"), Outcome(finished=False))
    sweep.begin(10, ["seed=10"], tmp_path / "10")
    sweep.write_table(sweep.jobs())
    table = rows(tmp_path)
    assert [row["job"] for row in table] == ["0", "1", "2", "3", "4", "5", "10"]
    states = ["finished"] * 3 + ["failed", "stopped", "stopped", "failed"]
    assert [row["state"] for row in table] == states
    assert [row["error"] for row in table] == ["", "", "", "no: why", "Ctrl-C", "", LOST]
    assert [row["objective"] for row in table[:4]] == ["0.5", "0.25", "inf", ""]
    assert [row["reported.fd.1"] for row in table[:2]] == ["0.5", "0.25"]
    assert [row["seed"] for row in table[:2]] == ["0", "1"]
    assert [row["x"] for row in table[2:4]] == ["y z", ""]
    text = sweep.table(sweep.jobs())
    assert "fd_pixels" in text.splitlines()[0]
    assert "job 3 failed: no: why" in text
    assert text.endswith("Best: job 1, fd_pixels 0.25; again by:\n  rolldiff train seed=1 '+x=y z'")


def test_settings_that_are_the_same_in_all_jobs_are_left_out(tmp_path):
    sweep = sweep_of(tmp_path, [0.5, 0.25])
    sweep.write_table(sweep.jobs())
    assert "x" not in rows(tmp_path)[0]
    assert "y z" not in sweep.table(sweep.jobs()).partition("Best")[0]


@pytest.mark.parametrize(
    ("metric", "larger", "best"),
    [("fd_pixels", None, 1), ("fd_pixels", True, 0), ("psnr.4", None, 0), ("psnr.4", False, 1)],
)
def test_the_best_job_is_that_of_the_search_or_the_metric(metric, larger, best, tmp_path):
    sweep = sweep_of(tmp_path, [0.5, 0.25, math.inf], metric, larger=larger)
    assert sweep.best(sweep.jobs()).number == best


def test_nothing_is_the_best_of_jobs_that_have_failed(tmp_path):
    sweep = sweep_of(tmp_path, [math.inf, None])
    assert sweep.best(sweep.jobs()) is None
    assert "Best" not in sweep.table(sweep.jobs())


def test_a_job_of_a_queue_may_outlive_its_sweep(tmp_path, monkeypatch):
    sweep = Sweep(folder=tmp_path, command="train")
    sweep.begin(0, [], tmp_path)
    for interrupted, state in ((True, "stopped"), (False, "failed")):
        assert [job.state for job in sweep.jobs(interrupted=interrupted)] == [state]
    monkeypatch.setattr(jobs.platform, "node", lambda: "another machine")
    assert [job.state for job in sweep.jobs(interrupted=True)] == ["running"]


def test_a_single_job_of_a_search_does_not_search_again(tmp_path):
    sweep = Sweep(folder=tmp_path, command="train")
    job = sweep.begin(0, ["hparams_search=mine", "seed=1"], tmp_path)
    command = sweep.command_of(job)
    assert command == "rolldiff train hparams_search=mine seed=1 hydra.mode=RUN"


# The folder


def test_a_folder_belongs_to_one_sweep(tmp_path):
    sweep = Sweep(folder=tmp_path / "a" / "b", command="train")
    with sweep.held():
        with pytest.raises(UsageError, match=r"hydra.sweep.dir must be a folder that no other"):
            sweep.held().__enter__()
        sweep.begin(0, [], tmp_path)
    with pytest.raises(UsageError, match=r"hydra.sweep.dir must be a new or an empty folder"):
        sweep.held().__enter__()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("existed", [False, True])
def test_a_sweep_without_a_job_leaves_nothing(existed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if existed:
        (tmp_path / "sweep").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["train", "-m", *TINY, "speed=1,2", "hydra.sweep.dir=sweep"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rolldiff: Could not override 'speed'")
    assert [path.name for path in tmp_path.rglob("*")] == ["sweep"] * existed


# Mistakes


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "-cd", "mine"], "-m must come without other flags, got -m -cd; hydra.searchpath"),
        (["-m", "experiment=nothing"], "experiment/nothing"),
        (
            ["hparams_search=digits_optuna", "hydra.sweeper.direction=[minimize]"],
            "hydra.sweeper.direction must be minimize or maximize, got ['minimize']",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("arguments", "group", "name"),
    [
        (["-m", "hydra/launcher=joblib"], "launcher", "joblib"),
        (["-m", "hydra/launcher=submitit_slurm"], "launcher", "submitit_slurm"),
        (["hparams_search=digits_optuna"], "sweeper", "optuna"),
    ],
)
def test_a_missing_extra_is_named(arguments, group, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Plugins.instance()  # registers them
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{name}.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    line = f"hydra/{group}={name} needs the extra `sweeps`, pip install 'rolldiff[sweeps]'"
    assert capsys.readouterr().err == f"rolldiff: {line}\n"


# One job


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that runs one job with another function for its command."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    hydra = {"job": {"num": 0}, "overrides": {"task": ["seed=1"], "hydra": []}}
    hydra["runtime"] = {"output_dir": str(tmp_path / "0")}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    sweep = Sweep(folder=tmp_path, command="train")
    (tmp_path / "0").mkdir()

    def run(command, parent=-1):
        monkeypatch.setitem(cli.COMMANDS, "train", command)
        cfg = OmegaConf.create({"run_dir": None, "resume": None})
        found = cli._job(sweep, parent, cfg)
        return found, sweep.jobs()[0]

    return run


def raising(error):
    def command(cfg):
        raise error

    return command


@pytest.mark.usefixtures("quiet")
def test_a_failed_job_returns_none_and_leaves_its_error(job):
    found, record = job(raising(UsageError("a must be b")))
    assert (found, record.state, record.error) == (None, "failed", "a must be b")


@pytest.mark.usefixtures("quiet")
def test_a_defect_in_a_job_shows_its_traceback_and_ends_no_sweep(job, capsys):
    found, record = job(raising(ValueError("after\nten hours")))
    assert (found, record.state, record.error) == (None, "failed", "ValueError: after ten hours")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet")
def test_an_interrupted_job_ends_the_sweep_if_it_is_the_sweep_that_was_interrupted(job, tmp_path):
    found, record = job(raising(KeyboardInterrupt()))  # in a process of its own
    assert (found, record.state, record.error) == (None, "stopped", "stopped by Ctrl-C")
    with pytest.raises(SystemExit) as stop:
        job(raising(KeyboardInterrupt()), parent=os.getpid())
    assert stop.value.code == 130
    assert json.loads((tmp_path / ".jobs/0.json").read_text())["state"] == "stopped"


@pytest.mark.usefixtures("quiet")
def test_a_job_that_a_queue_starts_again_resumes(job, tmp_path):
    seen = []

    def command(cfg):
        seen.append(cfg.resume)
        assert cfg.run_dir == str(tmp_path / "0")
        (tmp_path / "0/last.ckpt").touch()
        return Outcome(metric="fd_pixels", objective=0.5)

    assert [job(command)[0], job(command)[0]] == [0.5, 0.5]
    assert seen == [None, str(tmp_path / "0")]


# Whole sweeps


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local"],
    ],
    ids=["basic", "joblib", "submitit_local"],
)
def test_a_sweep_prints_and_writes_a_table_of_its_jobs(launcher, tmp_path):
    ask = [*TINY, "nn.width=17,16", "optimized_metric=fd_pixels.2", "hydra.sweep.dir=sweep"]
    done = rolldiff("train", "-m", *ask, *launcher, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "rolldiff: failed jobs of the sweep: 0"
    assert "Traceback" not in done.stderr
    failed, finished = rows(tmp_path / "sweep")
    assert (failed["nn.width"], failed["state"], failed["error"]) == ("17", "failed", WIDTH_OF_17)
    assert (finished["nn.width"], finished["state"]) == ("16", "finished")
    summary = json.loads((tmp_path / "sweep/1/summary.json").read_text())
    assert float(finished["objective"]) == summary["fd_pixels"]["2"]
    assert float(finished["reported.fd_pixels.1"]) == summary["fd_pixels"]["1"]
    assert finished["folder"] == str(tmp_path / "sweep/1")
    assert f"job 0 failed: {WIDTH_OF_17}" in done.stdout
    # What is printed for the best is a command that comes to the same.
    best = done.stdout.partition("again by:\n  rolldiff ")[2].splitlines()[0]
    again = rolldiff(*shlex.split(best), "run_dir=again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    values = json.loads((tmp_path / "again/summary.json").read_text())
    assert values["fd_pixels"] == summary["fd_pixels"]
    refused = rolldiff("train", "-m", *ask, cwd=tmp_path)
    assert refused.returncode == 2
    assert "hydra.sweep.dir must be a new or an empty folder" in refused.stderr


@pytest.mark.slow
def test_the_printed_command_finds_settings_of_another_folder(tmp_path):
    (tmp_path / "mine/nn").mkdir(parents=True)
    (tmp_path / "mine/nn/narrow.yaml").write_text("defaults: [tiny]\nwidth: 16\nheads: 1\n")
    ask = ["max_steps=1,2", "batch_size=8", "nn=narrow", "report.steps=1"]
    place = ["hydra.searchpath=[mine]", "hydra.sweep.dir=sweep"]
    done = rolldiff("train", "-m", *place, *ask, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = done.stdout.partition("again by:\n  rolldiff ")[2].splitlines()[0]
    again = rolldiff(*shlex.split(best), "run_dir=again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_search_goes_on_after_trials_that_fail(tmp_path):
    """With `maximize` too, where an infinite value of a failed trial would be the best."""
    ask = [setting for setting in TINY if not setting.startswith("nn.width")]
    ask += ["hparams_search=digits_optuna", "hydra.sweeper.n_trials=5", "nn.width=choice(16,17)"]
    ask += ["hydra.sweeper.direction=maximize", "optimized_metric=fd_pixels.2"]
    done = rolldiff("train", "-m", *ask, "hydra.sweep.dir=sweep", cwd=tmp_path)
    table = rows(tmp_path / "sweep")
    assert len(table) == 5, done.stderr
    assert {row["nn.width"]: row["state"] for row in table} == {"16": "finished", "17": "failed"}
    found = max((float(r["objective"]), r["job"]) for r in table if r["state"] == "finished")
    best = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    assert (best.best_value, best.best_params["nn.width"]) == (found[0], 16)
    assert f"Best: job {found[1]}, fd_pixels.2" in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "state"),
    [("nn.width=17", "failed"), ("time_limit=00:00:00:00", "stopped")],
)
def test_a_search_without_a_finished_trial_ends_in_one_line(setting, state, tmp_path):
    ask = [*TINY, "hparams_search=digits_optuna", "hydra.sweeper.n_trials=2", setting]
    ask += ["optimized_metric=fd_pixels", "trainer.val_check_interval=2"]
    done = rolldiff("train", *ask, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = "the sweep ended early: ValueError: No trials are completed yet.; unfinished jobs: 0, 1"
    assert done.stderr.splitlines()[-1] == f"rolldiff: {line}"
    assert [row["state"] for row in rows(tmp_path / "sweep")] == [state, state]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_an_interruption_ends_a_sweep_and_leaves_its_table(launcher, tmp_path):
    ask = [*TINY, "max_steps=1000000", "max_time=null", "seed=0,1,2", "hydra.sweep.dir=sweep"]
    ask += [f"hydra/launcher={launcher}"]
    ask += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    process = subprocess.Popen(
        [*COMMAND, "train", "-m", *ask],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begun = {"basic": ["0"], "joblib": ["0", "1"]}[launcher]
    while not all((tmp_path / "sweep" / job / "logs/metrics.csv").exists() for job in begun):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate()
    assert process.returncode == 130
    assert "rolldiff: stopped by Ctrl-C" in error
    table = rows(tmp_path / "sweep")
    assert [row["job"] for row in table] == begun
    assert {row["state"] for row in table} == {"stopped"}


# Benchmarks


BENCH = ["bench.steps=[2]", "bench.joint_steps=[]", "bench.seeds=[0]", "bench.samples=40"]
BENCH += ["bench.features=[pixels]", "bench.num_groups=[1,2,4]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trainings, of seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("runs")
    done = rolldiff("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=runs", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.slow
def test_a_sweep_of_benchmarks_writes_each_into_its_folder(runs, tmp_path):
    ask = [f"ckpt={runs / '0'},{runs / '1'},nowhere", "hydra.sweep.dir=sweep"]
    done = rolldiff("bench", "-m", *BENCH, *ask, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    table = rows(tmp_path / "sweep")
    assert [row["state"] for row in table] == ["finished", "finished", "failed"]
    for i, row in enumerate(table[:2]):
        folder = Path(row["folder"])
        assert folder == tmp_path / "sweep" / str(i)
        assert (folder / "report.md").is_file()
        lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        distances = {line["num_groups"]: line["metrics"]["fd_pixels"]["mean"] for line in lines}
        assert len(distances) == 3
        assert float(row["objective"]) == min(distances.values())
        assert distances[int(row["reported.num_groups"])] == float(row["reported.fd_pixels"])
        assert not (runs / str(i) / "bench").exists()
    assert "fd_pixels" in done.stdout


@pytest.mark.slow
def test_two_benchmarks_of_one_folder_do_not_mix(runs, tmp_path):
    """The second is refused while the first is at work, and adds its lines afterwards."""
    ask = ["bench", *BENCH, "run_dir=here", f"ckpt={runs / '0'}"]
    results = tmp_path / "here/results.jsonl"
    first = subprocess.Popen([*COMMAND, *ask], cwd=tmp_path, env=ENVIRONMENT)
    while not (results.exists() and results.read_text()):
        assert first.poll() is None
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # until the second has come to the folder
    try:
        before = results.read_text()
        assert 1 <= before.count("\n") < 3
        refused = rolldiff(*ask, "bench.steps=[3]", cwd=tmp_path)
        assert results.read_text() == before
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert refused.returncode == 2
    line = "rolldiff: run_dir must be a folder that no other job is writing to, got here\n"
    assert refused.stderr == line
    whole = results.read_text()
    assert whole.startswith(before)
    again = rolldiff(*ask, "bench.steps=[3]", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert results.read_text().startswith(whole)
    steps = [json.loads(line)["steps"] for line in results.read_text().splitlines()]
    assert steps == [2, 2, 2, 3, 3, 3]
