"""Quality against cost: what is swept, resumed, distributed and reported."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from rolldiff import AdamsBashforth2, DecodeConfig, Decoder, Euler, Heun, Midpoint, Training
from rolldiff.cli import config_dir
from rolldiff.errors import UsageError
from rolldiff.evaluation.measure import Processes, expected_cost
from rolldiff.evaluation.report import config_label, pareto_front
from rolldiff.evaluation.sweep import SETTINGS, Results, Timings, bench, grid, match_cost

ASK = {
    "num_groups": [1, 4],
    "overlap": [0.0, 0.5],
    "steps": [2, 4],
    "order": ["top_to_bottom", "bottom_to_top"],
    "solver": [Euler()],
    "guidance": [0.0],
}
TINY = [
    "bench.joint_steps=[]",
    "bench.num_groups=[1,2]",
    "bench.overlap=[0,0.5]",
    "bench.steps=[2,4]",
    "bench.samples=50",
    "bench.batch_size=20",
    "bench.seeds=[0,1]",
    "bench.features=[pixels]",
    "bench.pairs=40",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=8,
        channels=1,
        width=16,
        depth=1,
        heads=1,
        num_classes=10,
        training=Training(num_groups=(1, 2)),
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    decoder.save_pretrained(folder)
    data = {"_target_": "rolldiff.data.Digits"}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml({"data": data}))
    return folder


def ask(run, folder, *overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("bench", [f"ckpt={run}", f"run_dir={folder}", *TINY, *overrides])


def lines(folder):
    return (folder / "results.jsonl").read_text().splitlines()


def numbers(folder):
    """All that must not depend on the machine's mood."""
    kept = ("nfe", "tokens", "flops", "metrics", "reference", "checkpoint", "extractors")
    rows = map(json.loads, lines(folder))
    return {tuple(row[k] for k in SETTINGS): {k: row[k] for k in kept} for row in rows}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A bench that ran through."""
    folder = tmp_path_factory.mktemp("whole")
    assert bench(ask(run, folder), conf=config_dir()) == folder
    return folder


def command(run, folder):
    rolldiff = Path(sys.executable).with_name("rolldiff")
    return [str(rolldiff), "bench", f"ckpt={run}", f"run_dir={folder}", *TINY]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_one_group_may_take_more_steps():
    settings = grid(16, **ASK, joint_steps=[4, 8])
    assert {s.steps for s in settings if s.num_groups == 1} == {2, 4, 8}
    assert {s.steps for s in settings if s.num_groups == 4} == {2, 4}


def test_a_setting_is_swept_once():
    settings = grid(16, **ASK)
    assert len(settings) == len(set(settings)) == 2 + 2 * 2 * 2
    assert [s for s in settings if s.num_groups == 1] == [
        DecodeConfig(num_groups=1, steps=steps) for steps in (2, 4)
    ]
    # 0.3 and 0.5 of two steps both round to a stagger of one.
    assert len(grid(16, **ASK | {"overlap": [0.3, 0.5], "steps": [2], "num_groups": [4]})) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_groups": [17]}, "num_groups"),
        ({"overlap": [1.5]}, "overlap"),
        ({"overlap": [1.5], "num_groups": [1]}, "overlap"),
        ({"steps": [0]}, "steps"),
        ({"order": []}, "order must hold"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong, words):
    with pytest.raises(ValueError, match=words):
        grid(16, **ASK | wrong)


@pytest.mark.parametrize("match", ["nfe", "tokens", "seconds"])
def test_matched_configurations_cost_the_same(match):
    configs = grid(256, **ASK | {"num_groups": [1, 2, 8, 64], "steps": [32]})

    def cost(config):
        nfe, tokens = expected_cost(config, 256)
        seconds = 0.1 * config.num_groups + 0.05 * config.steps
        return {"nfe": nfe, "tokens": tokens, "seconds": seconds}[match]

    found = match_cost(configs, cost)
    budget = {"nfe": 32, "tokens": 32 * 256, "seconds": 0.1 + 0.05 * 32}[match]
    reached = {config.num_groups: cost(config) for config in found}
    # 64 groups take 64 calls, or 6.4 seconds, with a single step.
    assert set(reached) == ({1, 2, 8, 64} if match == "tokens" else {1, 2, 8})
    for value in reached.values():
        assert abs(math.log(value / budget)) < math.log(1.2)
    with pytest.raises(ValueError, match="num_groups 1"):
        match_cost(configs[1:], cost)


def test_a_cheaper_configuration_gets_more_steps_and_an_expensive_one_is_left_out():
    configs = [DecodeConfig(num_groups=g, steps=8) for g in (1, 2, 4)]

    def seconds(config):
        offset, slope = {1: (0.0, 1.0), 2: (0.0, 0.5), 4: (15.0, 1.0)}[config.num_groups]
        return offset + slope * config.steps

    found = match_cost(configs, seconds)
    assert [(c.num_groups, c.steps) for c in found] == [(1, 8), (2, 16)]


def test_matched_seconds_are_measured_once(tmp_path):
    measured = []

    def measure(config):
        measured.append(replace(config, steps=1))
        return 0.5, 0.25

    configs = grid(16, **ASK)
    for _ in range(2):
        found = match_cost(configs, Timings(tmp_path / "timings.json", measure=measure))
        assert set(found) == set(configs)
    assert len(measured) == len(set(measured)) == len({replace(c, steps=1) for c in configs})


def test_a_bench_at_matched_calls(run, tmp_path):
    bench(ask(run, tmp_path, "bench.match=nfe", "bench.steps=[6]"), conf=config_dir())
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert [row["nfe"] for row in rows] == [6, 6, 6]
    assert len({row["steps"] for row in rows}) == 3


def test_a_bench_leaves_results_a_report_and_pictures(whole):
    rows = [json.loads(line) for line in lines(whole)]
    assert len(rows) == 2 + 2 * 2
    for row in rows:
        groups = row["num_groups"]
        assert row["nfe"] == row["steps"] * (1 + (groups - 1) * (1 - row["overlap"]))
        assert 0 < row["seconds_to_first_group"] <= row["seconds"]
        assert {"fd_pixels", "kd_pixels", "precision_pixels", "by_band"} <= set(row["metrics"])
        assert ("seams" in row["metrics"]) == (groups > 1)
        assert len(row["metrics"]["fd_pixels"]["values"]) == 2
        assert len(row["metrics"]["by_band"]["mean"]) == 4
        assert row["versions"]["torch"] == torch.__version__
    report = (whole / "report.md").read_text()
    for name in ("cost.png", "samples_equal_nfe.png", "samples_equal_tokens.png", "matrices.png"):
        assert f"({name})" in report
        assert (whole / name).stat().st_size > 5000
    rows = [line for line in report.splitlines() if line.startswith(("| 1 group", "| 2 groups"))]
    assert len(rows) == 2 + 2 * 2
    assert all(re.search(r"\| \**\d+\** \| \**\d+\** \| .* ± ", row) for row in rows)
    assert "**" in rows[0], "the cheapest configuration is on the front"


def test_operations_are_those_of_the_tokens(whole):
    rows = [json.loads(line) for line in lines(whole) if json.loads(line)["num_groups"] == 1]
    twice, four = sorted(row["flops"] for row in rows)
    # Width 16, one block: 12 w^2 and the linear layers at both ends, 2 operations a weight; the
    # scores and sums of attention, 4 N w. The times are embedded once a decode.
    token = 2 * (12 * 16**2 + 2 * 4 * 16) + 4 * 16 * 16
    assert (four - twice) / (2 * 16) == pytest.approx(token, rel=0.35)
    assert (four - twice) / (2 * 16) >= token


def test_a_killed_bench_goes_on_with_the_same_numbers(run, whole, tmp_path):
    process = subprocess.Popen(command(run, tmp_path), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    results = tmp_path / "results.jsonl"
    while not (results.exists() and results.read_text().count("\n")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_text()
    assert 1 <= before.count("\n") < 6
    with results.open("a") as file:
        file.write('{"num_groups": 2, "over')  # killed while it wrote
    bench(ask(run, tmp_path), conf=config_dir())
    assert results.read_text().startswith(before[: before.rfind("\n") + 1])
    assert numbers(tmp_path) == numbers(whole)
    # Once more, with one setting more: nothing that is done is done again.
    done = lines(tmp_path)
    bench(ask(run, tmp_path, "bench.steps=[2,3,4]"), conf=config_dir())
    assert lines(tmp_path)[: len(done)] == done
    assert len(lines(tmp_path)) == 9


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", *command(run, tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {json.loads(line)["processes"] for line in lines(tmp_path)} == {2}
    assert numbers(tmp_path) == numbers(whole)
    assert (tmp_path / "report.md").exists()


def test_batches_are_dealt_in_turn():
    assert [list(Processes(r, 3).shard(7)) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def record(num_groups, nfe, mean, std=0.01):
    settings = {"num_groups": num_groups, "overlap": 0.0, "steps": 4, "order": "top_to_bottom"}
    metrics = {"fd": {"mean": mean, "std": std}}
    return settings | {"solver": "euler", "guidance": 0.0, "nfe": nfe, "metrics": metrics}


def test_the_front_holds_what_nothing_cheaper_beats():
    records = [record(1, 4, 3.0), record(1, 8, 2.0), record(2, 8, 2.5), record(2, 16, 2.1)]
    front = pareto_front(records, cost="nfe", metric="fd")
    assert [r["metrics"]["fd"]["mean"] for r in front] == [3.0, 2.0]
    tie = [record(1, 8, 2.0), record(1, 4, 2.0)]
    assert pareto_front(tie, cost="nfe", metric="fd") == [tie[1]]


def test_labels_leave_out_the_defaults():
    assert config_label(record(1, 4, 1.0)) == "1 group, 4 steps"
    other = record(4, 4, 1.0) | {"order": "random:0", "solver": "heun", "guidance": 0.5}
    assert config_label(other) == "4 groups, overlap 0, 4 steps, random:0, heun, guidance 0.5"


@pytest.mark.parametrize(("causal", "cache"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("solver", [Euler(), Heun(), Midpoint(), AdamsBashforth2()], ids=repr)
def test_the_expected_cost_is_the_measured_cost(make, solver, causal, cache):
    decoder = make(causal=causal)

    @run_settings(max_examples=15)
    @given(st.integers(1, 16), st.floats(0, 1), st.integers(1, 5), st.booleans())
    def agree(num_groups, overlap, steps, guidance):
        config = DecodeConfig(
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            solver=solver,
            guidance=1.0 if guidance else 0.0,
        )
        cost = decoder.decode([1], config, cache=cache, seed=0).cost
        expected = expected_cost(config, 16, causal=causal, cache=cache)
        assert (cost.nfe, cost.tokens) == expected

    agree()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bench.features=[colour]", "bench.features must be among"),
        ("bench.features=[resnet56_cifar10]", "path"),
        ("bench.solver=[leap]", "bench.solver must be among"),
        ("bench.samples=1", "bench.samples"),
        ("bench.seeds=[1,1]", "bench.seeds"),
        ("bench.match=money", "bench.match"),
        ("data=folder", "image_size|path"),
        ("ckpt=null", "ckpt"),
    ],
)
def test_bad_settings(run, tmp_path, override, words):
    with pytest.raises(Exception, match=words) as caught:
        bench(ask(run, tmp_path / "new", override), conf=config_dir())
    error = caught.value.__cause__ or caught.value
    assert isinstance(error, UsageError | MissingMandatoryValue)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_results_is_refused(run, whole):
    before = lines(whole)
    with pytest.raises(ValueError, match="same samples, got 50"):
        bench(ask(run, whole, "bench.samples=40"), conf=config_dir())
    assert lines(whole) == before


def test_results_are_compared_as_printed():
    folder = Path(__file__).parents[1] / "benchmarks"
    files = (f"{name}={folder / 'digits' / name}.jsonl" for name in ("results", "joint"))
    command = [sys.executable, str(folder / "compare.py"), "fd_classifier", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, *rows = done.stdout.splitlines()
    page = (folder / "digits/README.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    assert "\n".join(rows) in page


def test_a_folder_may_hold_results_of_other_solvers(run, tmp_path):
    for solver in ("heun", "euler"):
        bench(ask(run, tmp_path, f"bench.solver=[{solver}]", "bench.steps=[2]"), conf=config_dir())
    assert [json.loads(line)["solver"] for line in lines(tmp_path)] == ["heun"] * 3 + ["euler"] * 3
    assert "## Heun" in (tmp_path / "report.md").read_text()


def test_every_configuration_prints_a_line(run, tmp_path, capsys):
    for steps, earlier in ((2, 0), (3, 1)):
        short = ("bench.num_groups=[1]", f"bench.steps=[2,{steps}]")
        bench(ask(run, tmp_path, *short), conf=config_dir())
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 1 + earlier
        assert printed[-1].startswith(f"1 group, {steps} steps: nfe {steps}, tokens {16 * steps}, ")
        assert "fd_pixels" in printed[-1]
    assert printed[0] == "1 of 2 configurations were measured earlier"


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"samples": 1}\nhello\n')
    with pytest.raises(ValueError, match="line 2"):
        Results(tmp_path / "results.jsonl", same={"samples": 1}, solvers={})


def test_the_data_of_a_run_of_version_0_1_are_read(run, tmp_path):
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = {"_target_": "rolldiff.data.Digits", "reference": 60, "corrupt": "skip"}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"data": data}))
    short = ("bench.num_groups=[1]", "bench.steps=[2]")
    bench(ask(tmp_path, tmp_path / "new", *short), conf=config_dir())
    (line,) = lines(tmp_path / "new")
    assert json.loads(line)["reference_images"] == 60


def test_data_of_others_are_not_called(run, tmp_path):
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.yaml").write_text("data:\n  _target_: os.system\n  command: ls\n")
    with pytest.raises(ValueError, match="must be of rolldiff"):
        bench(ask(tmp_path, tmp_path / "new"), conf=config_dir())
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="data must be given"):
        bench(ask(tmp_path, tmp_path / "new"), conf=config_dir())
