"""Quality against cost: what is swept, resumed, shared and concluded."""

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
from omegaconf import OmegaConf

from rolldiff import Decoder, Training
from rolldiff.bench import bench
from rolldiff.bench.conclusions import Point, best, comparisons, front, prices
from rolldiff.bench.results import Results, Timings, setting_of
from rolldiff.bench.settings import Setting, counted, grid, matched
from rolldiff.bench.share import Share
from rolldiff.cli import config_dir

ASK = {
    "num_groups": [1, 4],
    "overlap": [0.0, 0.5],
    "steps": [2, 4],
    "order": ["top_to_bottom", "bottom_to_top"],
    "step": ["euler"],
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
    return {setting_of(row): {key: row[key] for key in kept} for row in rows}


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
        Setting(1, 0.0, steps, "top_to_bottom") for steps in (2, 4)
    ]
    # 0.3 and 0.5 of two steps both round to a stagger of one.
    assert len(grid(16, **ASK | {"overlap": [0.3, 0.5], "steps": [2], "num_groups": [4]})) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_groups": [17]}, "num_groups"),
        ({"overlap": [1.5]}, "overlap"),
        ({"steps": [0]}, "steps"),
        ({"order": []}, "order must hold"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong, words):
    with pytest.raises(ValueError, match=words):
        grid(16, **ASK | wrong)


@pytest.mark.parametrize("match", ["nfe", "tokens", "seconds"])
def test_matched_settings_cost_the_same(match):
    settings = grid(256, **ASK | {"num_groups": [1, 2, 8, 64], "steps": [32]})

    def counts(setting):
        return counted(setting, 256, calls=1, causal=True)

    def seconds(setting):
        return 0.1 * setting.num_groups, 0.05

    found = matched(settings, match, counts=counts, seconds=seconds if match == "seconds" else None)
    budget = {"nfe": 32, "tokens": 32 * 256, "seconds": 0.1 + 0.05 * 32}[match]
    reached = {
        s.num_groups: {
            "nfe": counts(s)[0],
            "tokens": counts(s)[1],
            "seconds": sum(c * f for c, f in zip(seconds(s), (1, s.steps), strict=True)),
        }[match]
        for s in found
    }
    # 64 groups take 64 calls, or 6.4 seconds, with a single step.
    assert set(reached) == ({1, 2, 8, 64} if match == "tokens" else {1, 2, 8})
    for cost in reached.values():
        assert abs(math.log(cost / budget)) < math.log(1.2)
    with pytest.raises(ValueError, match="num_groups 1"):
        matched(settings[1:], match, counts=counts)


def test_a_cheaper_setting_gets_more_steps_and_a_dear_one_is_left_out():
    cheap, dear = (Setting(g, 0.0, 8, "top_to_bottom") for g in (2, 4))
    settings = [Setting(1, 0.0, 8, "top_to_bottom"), cheap, dear]

    def seconds(setting):
        return {1: (0.0, 1.0), 2: (0.0, 0.5), 4: (15.0, 1.0)}[setting.num_groups]

    found = matched(settings, "seconds", counts=lambda s: (0, 0), seconds=seconds)
    assert [(s.num_groups, s.steps) for s in found] == [(1, 8), (2, 16)]


def test_matched_seconds_are_taken_once(tmp_path):
    asked = []

    def fitted(setting):
        asked.append(setting)
        return 0.5, 0.25

    settings = grid(16, **ASK)
    for _ in range(2):
        timings = Timings(tmp_path / "timings.json", fitted=fitted)
        found = matched(settings, "seconds", counts=lambda s: (0, 0), seconds=timings)
        assert set(found) == set(settings)
    assert len(asked) == len(set(asked)) == len({s.same_but_steps() for s in settings})


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
    assert "At equal seconds" in report
    assert re.search(r"Better: (several|one|no)", report)
    assert re.search(r"\| 2 groups, overlap 0 \| \d\.\d\d … \d\.\d\d \|", report)


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
    assert [list(Share(r, 3).mine(7)) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def point(num_groups, nfe, mean, std=0.01):
    return Point(Setting(num_groups, 0.0, 4, "top_to_bottom"), nfe, nfe, float(nfe), mean, std)


def test_the_front_holds_what_nothing_cheaper_beats():
    cells = [point(1, 4, 3.0), point(1, 8, 2.0), point(2, 8, 2.5), point(2, 16, 2.1)]
    assert [c.mean for c in front(cells, "nfe")] == [3.0, 2.0]
    assert front([point(1, 8, 2.0), point(1, 4, 2.0)], "nfe") == [point(1, 4, 2.0)]


def test_a_difference_counts_beyond_twice_the_spread():
    cells = [point(1, 4, 3.0), point(1, 8, 2.0), point(2, 8, 2.02), point(2, 16, 1.9)]
    found = [(c.budget, c.verdict) for c in comparisons(cells, "nfe")]
    assert found == [(8, "neither"), (16, "several")]
    assert comparisons([point(1, 4, 1.0), point(2, 4, 2.0)], "nfe")[0].verdict == "one"
    alone = comparisons([point(1, 4, 1.0, None), point(2, 4, 2.0, None)], "nfe")
    assert alone[0].verdict is None


def test_the_best_at_any_cost():
    cells = [point(1, 4, 3.0), point(1, 8, 2.0), point(2, 8, 1.7), point(4, 16, 1.9)]
    found = best(cells)
    assert (found.one.mean, found.several.mean, found.verdict) == (2.0, 1.7, "several")
    assert best(cells[:2]) is None
    assert best(cells[2:]) is None


def test_a_price_is_taken_at_equal_steps():
    cells = [point(1, 4, 1.0), point(2, 6, 1.0), point(2, 5, 1.0), point(4, 8, 1.0)]
    assert prices(cells) == {(2, 0.0): [1.5, 1.25], (4, 0.0): [2.0]}
    other = replace(cells[1], setting=replace(cells[1].setting, steps=8))
    assert prices([cells[0], other]) == {}, "no single group took as many steps"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bench.features=[colour]", "bench.features must be among"),
        ("bench.features=[resnet56_cifar10]", "path"),
        ("bench.step=[leap]", "bench.step must be among"),
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
    assert "ValueError" in repr(caught.getrepr("short")) or "Missing" in str(caught.type)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_results_is_refused(run, whole):
    before = lines(whole)
    with pytest.raises(ValueError, match="same samples, got 50"):
        bench(ask(run, whole, "bench.samples=40"), conf=config_dir())
    assert lines(whole) == before


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"samples": 1}\nhello\n')
    with pytest.raises(ValueError, match="line 2"):
        Results(tmp_path / "results.jsonl", same={"samples": 1})


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
