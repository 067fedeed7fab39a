"""Quality against cost: what is swept, resumed, distributed and reported."""

import json
import math
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from safetensors import safe_open

from rolldiff import (
    AdamsBashforth2,
    DecodeConfig,
    Decoder,
    Euler,
    Heun,
    Midpoint,
    Patches,
    Training,
)
from rolldiff.cli import config_dir
from rolldiff.data import Digits
from rolldiff.decoder import Cost, DecodeOutput
from rolldiff.errors import UsageError
from rolldiff.evaluation import report, sweep
from rolldiff.evaluation.features import Classifier, Pixels
from rolldiff.evaluation.images import save_images
from rolldiff.evaluation.measure import (
    Evaluator,
    Processes,
    _Batch,
    expected_cost,
    extract_features,
    random_halves,
)
from rolldiff.evaluation.metrics import frechet_distance
from rolldiff.evaluation.plots import plot_costs
from rolldiff.evaluation.report import config_label, pareto_front
from rolldiff.evaluation.results import SETTINGS, Results, Timings
from rolldiff.evaluation.sweep import bench, grid, match_cost
from rolldiff.files import locked
from rolldiff.likelihood import LikelihoodConfig

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
    "bench.likelihood=bound",
    "bench.likelihood_images=30",
    "likelihood.levels=17",
    "likelihood.samples=2",
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
    data = {"_target_": "rolldiff.data.Digits", "image_size": 8, "channels": 1, "held_out": 0.5}
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
def whole(run, once):
    """A bench that ran through."""

    def fill(folder):
        assert bench(ask(run, folder), conf=config_dir()) == folder

    return once("whole", fill)


def command(run, folder):
    rolldiff = Path(sys.executable).with_name("rolldiff")
    return [str(rolldiff), "bench", f"ckpt={run}", f"run_dir={folder}", *TINY]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_one_group_may_take_more_steps():
    settings = grid(Patches(4), **ASK, joint_steps=[4, 8])
    assert {s.steps for s in settings if s.num_groups == 1} == {2, 4, 8}
    assert {s.steps for s in settings if s.num_groups == 4} == {2, 4}


def test_a_setting_is_swept_once():
    settings = grid(Patches(4), **ASK)
    assert len(settings) == len(set(settings)) == 2 + 2 * 2 * 2
    assert [s for s in settings if s.num_groups == 1] == [
        DecodeConfig(num_groups=1, steps=steps) for steps in (2, 4)
    ]
    # 0.3 and 0.5 of two steps both round to a stagger of one.
    assert (
        len(grid(Patches(4), **ASK | {"overlap": [0.3, 0.5], "steps": [2], "num_groups": [4]})) == 2
    )


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
        grid(Patches(4), **ASK | wrong)


@pytest.mark.parametrize("match", ["nfe", "tokens", "seconds"])
def test_matched_configurations_cost_the_same(match):
    configs = grid(Patches(16), **ASK | {"num_groups": [1, 2, 8, 64], "steps": [32]})

    def cost(config):
        nfe, tokens = expected_cost(config, Patches(16))
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

    configs = grid(Patches(4), **ASK)
    for _ in range(2):
        found = match_cost(configs, Timings(tmp_path / "timings.json", measure=measure))
        assert set(found) == set(configs)
    assert len(measured) == len(set(measured)) == len({replace(c, steps=1) for c in configs})


@pytest.mark.slow
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


def test_likelihoods_are_those_of_images_that_are_held_out(run, whole):
    data = Digits(image_size=8, channels=1, held_out=0.5)
    image, label = data.held_out_images
    assert len(image) == 1797 // 2
    assert not (image.flatten(1)[:, None] == data.image.flatten(1)[:50]).all(-1).any()
    chosen = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))[:30]
    how = LikelihoodConfig(method="bound", levels=17, samples=2)
    decoder = Decoder.from_pretrained(run)
    with torch.no_grad():
        found = decoder.log_likelihood(
            image[chosen], label[chosen], num_groups=2, overlap=0.5, likelihood=how, seed=1
        )
    records = map(json.loads, lines(whole))
    here = next(r for r in records if (r["num_groups"], r["overlap"]) == (2, 0.5))
    assert here["likelihood"]["images"] == 30
    bits = here["metrics"]["bits_per_dim_bound"]
    assert bits["values"][1] == pytest.approx(float(found.bits_per_dim.mean()), rel=1e-5)
    assert "bits_per_dim_bound" in (whole / "report.md").read_text()


def test_samples_are_compared_with_images_of_the_training_too(run, tmp_path):
    one = ["bench.num_groups=1", "bench.steps=2", "bench.seeds=[3]", "bench.likelihood=null"]
    asked = ask(run, tmp_path, "data=digits", "bench.training_images=100", *one)
    bench(asked, conf=config_dir())
    (record,) = map(json.loads, lines(tmp_path))
    seen = Digits(image_size=8, channels=1, held_out=0.5, reference_images=100).image.flatten(1)
    data = Digits(image_size=8, channels=1)
    order = torch.randperm(len(data.image), generator=torch.Generator().manual_seed(0))[:50]
    decoder = Decoder.from_pretrained(run)
    fake = decoder.decode(data.label[order], num_groups=1, steps=2, seed=3).image.flatten(1)
    real = data.image.flatten(1)

    def distance(a, b):
        return pytest.approx(float(frechet_distance(a, b)), rel=1e-4)

    assert record["metrics"]["fd_pixels_train"]["mean"] == distance(seen, fake)
    assert record["metrics"]["fd_pixels"]["mean"] == distance(real, fake)
    assert record["real"] == {"fd_pixels": distance(real, seen)}
    halves = random_halves(real, 5)
    found = statistics.fmean(float(frechet_distance(a, b)) for a, b in halves)
    assert record["floors"]["fd_pixels"] == pytest.approx(found, rel=1e-4)
    report = (tmp_path / "report.md").read_text()
    assert "is a distance from 100 images of the training" in report
    ratio = record["metrics"]["fd_pixels"]["mean"] / found
    assert f"{record['metrics']['fd_pixels']['mean']:.3g} ({ratio:.1f})" in report
    # Other images of the training are another benchmark.
    with pytest.raises(UsageError, match="results of the same training"):
        bench(
            ask(run, tmp_path, "data=digits", "bench.training_images=99", *one), conf=config_dir()
        )


def test_the_classifier_is_trained_on_images_of_the_training(run, tmp_path, monkeypatch):
    """Not on those that samples are compared with, if there are others."""
    given = []

    def classifier(image, label):
        given.append((image, label))
        return Pixels()

    monkeypatch.setattr(sweep, "instantiate", lambda *a, **k: instantiated(classifier, *a, **k))
    features = ["bench.features=[classifier]", "bench.training_images=100", "data=digits"]
    one = ["bench.num_groups=1", "bench.steps=2", "bench.seeds=[3]", "bench.likelihood=null"]
    bench(ask(run, tmp_path, *features, *one), conf=config_dir())
    ((image, label),) = given
    seen = Digits(image_size=8, channels=1, held_out=0.5, reference_images=100)
    assert torch.equal(image, seen.image)
    assert torch.equal(label, seen.label)


def instantiated(classifier, cfg, **settings):
    target = cfg.get("_target_", "") if hasattr(cfg, "get") else ""
    return classifier if target.endswith("train_classifier") else instantiate(cfg, **settings)


def test_operations_are_those_of_the_tokens(whole):
    rows = [json.loads(line) for line in lines(whole) if json.loads(line)["num_groups"] == 1]
    twice, four = sorted(row["flops"] for row in rows)
    # Width 16, one block: 12 w^2 and the linear layers at both ends, 2 operations a weight; the
    # scores and sums of attention, 4 N w. The times are embedded once a decode.
    token = 2 * (12 * 16**2 + 2 * 4 * 16) + 4 * 16 * 16
    assert (four - twice) / (2 * 16) == pytest.approx(token, rel=0.35)
    assert (four - twice) / (2 * 16) >= token


@pytest.mark.slow
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
        expected = expected_cost(config, Patches(4), causal=causal, cache=cache)
        assert (cost.nfe, cost.tokens) == expected

    agree()


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(Decoder, "decode", lambda *_, **__: pytest.fail("something was decoded"))


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bench.features=[colour]", "bench.features must be among"),
        ("bench.features=[resnet56_cifar10]", "path"),
        ("bench.training_images=100", "bench.training_images must be null without data=…"),
        ("bench.training_images=1", "bench.training_images must be a whole number of 4"),
        ("bench.features=[]", "bench.features must hold at least one value, got none"),
        ("bench.features=[1]", "bench.features must be among"),
        ("bench.features=null", "bench.features must be among"),
        ("bench.solver=[leap]", "bench.solver must be among"),
        ("bench.solver=../solver/euler", "bench.solver must be among"),
        ("bench.solver=[]", "bench.solver must hold"),
        ("+solvers.mine=3", "solvers.mine must have a _target_"),
        ("+solvers.mine._target_=builtins.str", "solvers.mine must be a Solver"),
        ("+solvers.heun._target_=rolldiff.Euler", "solvers.heun must have a name of its own"),
        ("solvers=null", "solvers must be a group"),
        ("bench.samples=1", "bench.samples must be a whole number of 4"),
        ("bench.samples=nan", "bench.samples must be a whole number"),
        ("bench.samples=1e2", "bench.samples must be a whole number"),
        ("bench.pairs=1", "bench.pairs must be a whole number of 4"),
        ("bench.pairs=null", "bench.pairs"),
        ("bench.batch_size=true", "bench.batch_size"),
        ("bench.seeds=[1,1]", "bench.seeds must be different"),
        ("bench.seeds=[1.5]", "bench.seeds"),
        ("bench.seeds=[-1]", "bench.seeds"),
        ("bench.seeds=[]", "bench.seeds must hold"),
        ("bench.match=money", "bench.match must be among nfe, tokens, seconds"),
        ("bench.match=[]", "bench.match"),
        ("bench.num_groups=[17]", r"bench.num_groups must be a whole number in 1 … 16"),
        ("bench.num_groups=[]", "bench.num_groups must hold"),
        ("bench.steps=[4,nan]", "bench.steps"),
        ("bench.steps=0", "bench.steps"),
        ("bench.steps=[{a:1}]", "bench.steps"),
        ("bench.joint_steps=[x]", "bench.joint_steps"),
        ("bench.overlap=2", r"bench.overlap must be a number in \[0, 1\], got 2"),
        ("bench.overlap=[0,x]", "bench.overlap"),
        ("bench.guidance=nan", "bench.guidance must be a finite number, got nan"),
        ("bench.order=diagonal", "bench.order must be one of .*, got 'diagonal'"),
        ("bench.order=[cells:0]", "bench.order 'cells' takes a whole number"),
        ("bench.order='random:²'", "bench.order 'random' takes a whole number"),
        ("bench.order=3", "bench.order must be a permutation"),
        ("bench.order=[[0,1]]", "bench.order must be a permutation"),
        ("bench.order=[[a,b]]", "bench.order must be a whole number"),
        ("bench=null", "bench must be a group of settings"),
        ("features=3", "features must be a group of settings"),
        ("features.pixels=3", "features.pixels must have a _target_"),
        ("features.pixels._target_=builtins.str", "features.pixels must make a module"),
        ("progress=maybe", "progress must be true or false"),
        ("run_dir=''", "run_dir must be a folder"),
        ("data=folder", "image_size|path"),
        ("ckpt=null", "ckpt"),
    ],
)
def test_bad_settings(run, tmp_path, override, words):
    with pytest.raises(Exception, match=words) as caught:
        bench(ask(run, tmp_path / "new" / "er", override), conf=config_dir())
    error = caught.value.__cause__ if type(caught.value).__name__ == "InstantiationException" else 0
    assert isinstance(error or caught.value, UsageError | MissingMandatoryValue)
    assert not list(tmp_path.iterdir())


def test_one_value_stands_for_a_list_of_it(run, tmp_path):
    settings = ["num_groups=2", "overlap=0.5", "steps=3", "order=top_to_bottom", "solver=heun"]
    settings += ["seeds=1", "features=pixels"]
    bench(ask(run, tmp_path, *(f"bench.{setting}" for setting in settings)), conf=config_dir())
    (line,) = map(json.loads, lines(tmp_path))
    assert [line[name] for name in SETTINGS] == [2, 0.5, 3, "top_to_bottom", "equal", "heun", 0.0]
    assert (line["seeds"], list(line["extractors"])) == ([1], ["pixels"])


@pytest.mark.filterwarnings("ignore:decoding beyond what this checkpoint was trained for")
def test_an_order_may_be_a_permutation(run, tmp_path):
    order = [*range(16)]
    short = ("bench.num_groups=[2]", "bench.steps=[1]", "bench.overlap=[0]")
    for _ in range(2):
        bench(ask(run, tmp_path, *short, f"bench.order={order}"), conf=config_dir())
    (line,) = map(json.loads, lines(tmp_path))
    assert line["order"] == order
    (picture,) = re.findall(
        r"cost-permutation_[0-9a-f]{6}\.png", (tmp_path / "report.md").read_text()
    )
    assert (tmp_path / picture).is_file()


def sorted_evaluator(**others):
    """A set whose images come class by class, as a folder gives them."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(2).repeat_interleave(150)
    noise = torch.randn(300, 1, 8, 8, generator=generator)
    image = (label * 1.0 - 0.5)[:, None, None, None] + 0.1 * noise
    decoder = Decoder.build(image_size=8, channels=1, patch=2, width=16, depth=1, num_classes=2)
    settings = {
        "decoder": decoder,
        "image": image,
        "label": label,
        "extractors": {"pixels": Pixels()},
        "features": {"pixels": image.flatten(1)},
        "samples": 300,
        "seeds": [0],
        "batch_size": 300,
        "pairs": 150,
        "dtype": None,
        "processes": Processes(),
    }
    return Evaluator(**settings | others)


@pytest.mark.parametrize("pairs", [2000, 150])
def test_metrics_of_a_part_of_sorted_images_are_those_of_a_random_part(pairs):
    """Samples that are the images themselves, shuffled, are as good as the data."""
    evaluator = sorted_evaluator(pairs=pairs)
    samples = evaluator.image[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    batch = _Batch(samples, {"pixels": samples.flatten(1)}, 1, 1, 0.0, 0.0)
    found = evaluator._metrics(DecodeConfig(steps=1), [batch])
    assert abs(found["kd_pixels"]) < 0.01  # 0.5 between the two classes
    assert found["precision_pixels"] > 0.7  # at most 0.5 of one class against two
    assert found["recall_pixels"] > 0.7
    assert max(found["by_band"]) < 0.5  # 16 between the two classes


def test_fewer_samples_than_sorted_images_are_of_all_classes(monkeypatch):
    labels = []
    output = DecodeOutput(torch.zeros(0, 1, 8, 8), Cost(1, 1, 1.0, 1.0, True), 0.0)
    monkeypatch.setattr(
        Decoder, "decode", lambda _, cond, *__, **___: labels.extend(cond.tolist()) or output
    )
    evaluator = sorted_evaluator(samples=100)
    evaluator.decode(DecodeConfig(steps=1), seed=0, count=100)
    assert 30 < sum(labels) < 70
    # Sample i has the same label in any batch, and those of all images are those of the set.
    for start in range(0, 100, 25):
        evaluator.decode(DecodeConfig(steps=1), seed=1, start_index=start, count=25)
    assert labels[:100] == labels[100:]
    labels.clear()
    evaluator.decode(DecodeConfig(steps=1), seed=0, count=600)
    assert sum(labels[:300]) == 150
    assert labels[:300] == labels[300:]


@cache
def solvers():
    leaves = (config_dir() / "solver").glob("*.yaml")
    return {leaf.stem: instantiate(OmegaConf.load(leaf)) for leaf in leaves}


def read(path, same=None):
    results = Results(path, layout=Patches(8, channels=1, patch=2), solvers=solvers())
    results.require(same or {}, metrics=["fd_pixels", "kd_pixels", "precision_pixels", "by_band"])
    return results


def damaged(whole, folder, change, count=6):
    """The first results of a bench, with a change of the second line."""
    found = (whole / "results.jsonl").read_bytes().splitlines(keepends=True)[:count]
    found[1] = change(found[1])
    (folder / "results.jsonl").write_bytes(b"".join(found))
    return folder / "results.jsonl"


def with_value(*keys, value):
    def change(line):
        record = json.loads(line)
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(record).encode() + b"\n"

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"[]\n",
        lambda line: b"\n",
        lambda line: b"hello\n",
        lambda line: line[:100] + b"\n",
        lambda line: line[:100] + line,
        lambda line: line.replace(b"pixels", b"p\xffxels"),
        lambda line: b"[" * 10**5 + b"]" * 10**5 + b"\n",
        lambda line: line.replace(b'"nfe": ', b'"nfe": 1, "nfe": '),
        lambda line: line.replace(b'"tokens": ', b'"tokens": ' + 5000 * b"1"),
        lambda line: line.replace(b'"seconds": ', b'"seconds": 1e999, "s": '),
        with_value("note", value=math.nan),
        lambda line: line * 2,
        lambda line: line + with_value("nfe", value=3)(line),
        with_value("num_groups", value=17),
        with_value("overlap", value=1.5),
        with_value("order", value="diagonal"),
        with_value("order", value=[0, 1]),
        with_value("solver", value="leap"),
        with_value("metrics", "fd_pixels", value={}),
        with_value("metrics", "fd_pixels", "mean", value=0.25),
        with_value("metrics", "fd_pixels", "std", value=None),
        with_value("metrics", "fd_pixels", "values", value=[1.0]),
        with_value("metrics", "by_band", "values", value=[[1.0], [1.0, 2.0]]),
        with_value("metrics", value={}),
        with_value("device", value="a\nb \ud800"),
        with_value("versions", value={}),
    ],
)
def test_a_damaged_line_is_named(whole, tmp_path, change):
    path = damaged(whole, tmp_path, change)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"^line [23] of {path} is damaged: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def without(key):
    def change(line):
        record = json.loads(line)
        del record[key]
        return json.dumps(record).encode() + b"\n"

    return change


WRONG = [None, True, "", "x\ny", [], {}, [[]], -1, 0.5, math.nan, math.inf, 10**400, "1", [1.5]]


@pytest.mark.slow
def test_no_value_of_a_wrong_type_is_read(whole, tmp_path):
    """Every key of a line with values that it cannot have."""
    record = json.loads(lines(whole)[1])
    change = partial(damaged, whole, tmp_path, count=2)
    fine = {("match", None), ("match", "1"), ("commit", None), ("commit", "1"), ("overlap", 0.5)}
    fine |= {(key, 0.5) for key in ("guidance", "seconds", "seconds_to_first_group")}
    fine |= {("guidance", -1)}
    fine |= {(key, text) for key in record for text in ("", "1") if isinstance(record[key], str)}
    fine -= {(key, text) for key in ("order", "grouping", "solver") for text in ("", "1")}
    fine |= {("match", ""), ("commit", ""), ("likelihood", None)}
    fine |= {("training", value) for value in (None, "", "1")}
    refused = 0
    for key in record:
        for value in WRONG:
            if not isinstance(value, list | dict) and (key, value) in fine:
                continue
            if (key, value) in [(name, {}) for name in ("extractors", "floors", "real")]:
                continue
            path = change(with_value(key, value=value))
            with pytest.raises(UsageError, match=f"line 2 of {path}"):
                read(path)
            refused += 1
        path = change(without(key))
        if key in ("grouping", "likelihood", "training", "floors", "real"):  # older lines: none
            assert read(path).records[1][key] in ("equal", None, {})
            continue
        words = "method None" if key == "method" else f"is damaged: {key} must be given"
        with pytest.raises(UsageError, match=words):
            read(path)
    assert refused > 300


@pytest.mark.usefixtures("nothing_is_decoded")
def test_damaged_results_are_refused_before_anything_is_measured(run, whole, tmp_path):
    path = damaged(whole, tmp_path, lambda line: b"[]\n")
    with pytest.raises(UsageError, match=f"line 2 of {path}"):
        bench(ask(run, tmp_path, "bench.steps=[2,4,5]"), conf=config_dir())
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="run_dir must be a folder that can be written"):
        bench(ask(run, tmp_path), conf=config_dir())


def test_results_of_an_older_version_are_refused_with_what_to_do(run, whole, tmp_path):
    old = (line.replace('"method": 2, ', "") for line in lines(whole))
    (tmp_path / "results.jsonl").write_text("".join(f"{line}\n" for line in old))
    with pytest.raises(UsageError, match="of this version.*line 1.*say run_dir=FOLDER"):
        bench(ask(run, tmp_path), conf=config_dir())


def test_a_line_that_is_not_equal_by_type_is_not_the_same(whole):
    assert len(read(whole / "results.jsonl", {"samples": 50}).records) == 6
    for other in (50.0, "50", True):
        with pytest.raises(UsageError, match="run_dir must be empty or hold results of the same"):
            read(whole / "results.jsonl", {"samples": other})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"a": 1}',
        '{"a": [1]}',
        '{"a": [1, NaN]}',
        '{"a": [1, 0]}',
        '{"a": [-1, 1]}',
        '{"a": [true, 1]}',
        '{"a": [1, 1], "a": [1, 1]}',
        '{"a": ["1", 1]}',
        "[" * 10**5,
    ],
)
def test_damaged_timings_are_named(tmp_path, text):
    path = tmp_path / "timings.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"^{path} is damaged: .*remove the file"):
        Timings(path, measure=lambda config: pytest.fail("measured"))
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=f"^{path} is damaged"):
        Timings(path, measure=lambda config: pytest.fail("measured"))


@pytest.mark.usefixtures("nothing_is_decoded")
def test_a_folder_belongs_to_one_bench(run, tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="run_dir must be a folder that no othe"):
        bench(ask(run, tmp_path), conf=config_dir())


@pytest.mark.usefixtures("nothing_is_decoded")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_decoded(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="run_dir must be a folder that can be written"):
        bench(ask(run, tmp_path / "file" / "new"), conf=config_dir())


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize("name", ["results.jsonl", "timings.json", "report.md", ".lock", "bench"])
def test_nothing_is_written_through_links(run, tmp_path, name):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (theirs / file.name).write_bytes(file.read_bytes())
    target = tmp_path / "target"
    if name == "bench":
        target.mkdir()
        (theirs / "bench").symlink_to(target)
    else:
        target.touch()
        (theirs / "bench").mkdir()
        (theirs / "bench" / name).symlink_to(target)
    with pytest.raises(UsageError, match="through a link.*run_dir=FOLDER"):
        bench(ask(theirs, "null"), conf=config_dir())
    assert not target.is_dir() or not list(target.iterdir())
    assert target.is_dir() or not target.read_bytes()


@pytest.mark.slow
def test_an_interrupted_bench_leaves_whole_files_and_goes_on(run, whole, tmp_path, monkeypatch):
    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    measure = Evaluator.measure
    with monkeypatch.context() as patch:  # in the third configuration
        patch.setattr(
            Evaluator,
            "measure",
            lambda self, config: (
                interrupt() if len(lines(tmp_path)) == 2 else measure(self, config)
            ),
        )
        (tmp_path / "results.jsonl").touch()
        with pytest.raises(KeyboardInterrupt):
            bench(ask(run, tmp_path), conf=config_dir())
    assert set(files()) == {"results.jsonl", ".lock"}
    assert len(lines(tmp_path)) == 2
    with monkeypatch.context() as patch:  # while a line is written
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench(ask(run, tmp_path), conf=config_dir())
    bench(ask(run, tmp_path), conf=config_dir())
    assert numbers(tmp_path) == numbers(whole)
    before = files()
    assert b"steps" in before["report.md"]
    short = ask(run, tmp_path, "bench.steps=[2,3,4]", "bench.num_groups=[1]")
    for name in ("plot_costs", "plot_matrices", "labelled_rows", "write_text"):
        with monkeypatch.context() as patch:  # in the report
            patch.setattr(report, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                bench(short, conf=config_dir())
        assert files()["report.md"] == before["report.md"]
        assert set(files()) == set(before)
    bench(short, conf=config_dir())
    assert "1 group, 3 steps" in (tmp_path / "report.md").read_text()


def test_what_is_left_of_a_line_is_removed_by_the_next(whole, tmp_path):
    path = damaged(whole, tmp_path, lambda line: line)
    sound = path.read_bytes()
    path.write_bytes(sound + sound[:50])
    results = read(path)
    assert path.read_bytes() == sound + sound[:50], "reading writes nothing"
    config = DecodeConfig(num_groups=4, steps=3)
    rest = {key: value for key, value in results.records[0].items() if key not in SETTINGS}
    results.append(config, rest)
    assert path.read_bytes().startswith(sound + b'{"num_groups": 4')
    assert len(read(path).records) == 7
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append(config, rest | {"seconds": math.nan})
    assert len(read(path).records) == 7


def photos(folder, count=12):
    """Images of one class, as a folder without subfolders gives them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_images([torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1], folder)
    data = ["data=folder", f"data.path={folder}", "data.image_size=8", "data.channels=1"]
    return [*data, "bench.num_groups=1", "bench.steps=1", "bench.samples=8"]


def test_a_classifier_of_one_class_does_not_lead_a_report(run, tmp_path):
    data = [*photos(tmp_path / "photos"), "likelihood.levels=256"]
    with pytest.warns(UserWarning, match="leaves out classifier.*two classes"):
        bench(
            ask(run, tmp_path / "new", *data, "bench.features=[classifier,pixels]"),
            conf=config_dir(),
        )
    (line,) = map(json.loads, lines(tmp_path / "new"))
    assert list(line["extractors"]) == ["pixels"]
    page = (tmp_path / "new" / "report.md").read_text()
    assert "Pareto front of `fd_pixels`" in page
    assert "`fd_pixels` has 64 features and 8 images" in page
    with pytest.raises(UsageError, match="bench.features must hold another than classifier"):
        bench(ask(run, tmp_path / "newer", *data, "bench.features=classifier"), conf=config_dir())
    assert not (tmp_path / "newer").exists()


def test_the_report_says_how_good_its_classifier_is(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = ["bench.features=classifier", "+features.classifier.steps=5", "bench.steps=1"]
    bench(ask(run, tmp_path / "new", *short, "bench.num_groups=1"), conf=config_dir())
    (path,) = (tmp_path / "cache" / "rolldiff").iterdir()
    with safe_open(path, framework="pt") as file:
        accuracy = float(file.metadata()["accuracy"])
    page = (tmp_path / "new" / "report.md").read_text()
    assert f"The classifier is right on {accuracy:.1%} of the images" in page


@pytest.mark.usefixtures("nothing_is_decoded")
def test_data_that_do_not_fit_the_decoder(run, tmp_path):
    few = photos(tmp_path / "photos", count=3)
    with pytest.raises(UsageError, match="data must hold 4 images or more, got 3"):
        bench(ask(run, tmp_path / "new", *few), conf=config_dir())
    torch.manual_seed(0)
    small = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1, num_classes=3)
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(UsageError, match="data must have labels in 0 … 2"):
        bench(ask(tmp_path / "small", tmp_path / "new"), conf=config_dir())
    assert not (tmp_path / "new").exists()


def test_samples_that_are_not_finite_are_no_figure(run, tmp_path):
    decoder = Decoder.from_pretrained(run)
    evaluator = sorted_evaluator(decoder=decoder, label=None, samples=8, batch_size=8)

    class Broken(Pixels):
        def features(self, image):
            return image.flatten(1) * torch.nan

    evaluator = replace(evaluator, extractors={"pixels": Broken()})
    with pytest.raises(UsageError, match="features of pixels must be finite"):
        evaluator.measure(DecodeConfig(steps=1))


def test_seams_that_are_undefined_are_left_out(monkeypatch):
    evaluator = sorted_evaluator(samples=8, batch_size=8, label=None)
    flat = DecodeOutput(torch.zeros(8, 1, 8, 8), Cost(1, 1, 1.0, 1.0, True), 0.0)
    monkeypatch.setattr(Evaluator, "decode", lambda *_, **__: flat)
    found = evaluator.measure(DecodeConfig(steps=1, num_groups=2)).metrics
    assert set(found) == set(evaluator.metric_names)


def test_the_features_of_many_images_are_those_of_each():
    image = torch.rand(1203, 1, 8, 8)
    assert extract_features(image, Pixels(), device=image.device).data_ptr() == image.data_ptr()
    torch.manual_seed(0)
    extractor = Classifier(1, 2)
    found = extract_features(image, extractor, device=image.device)
    assert found.shape == (1203, 64)
    torch.testing.assert_close(found[[0, 499, 500, 1202]], extractor(image[[0, 499, 500, 1202]]))


@pytest.mark.usefixtures("nothing_is_decoded")
def test_extractors_have_different_names(run, tmp_path):
    twice = [
        "+features.mine._target_=rolldiff.evaluation.features.Pixels",
        "bench.features=[pixels,mine]",
    ]
    with pytest.raises(UsageError, match="bench.features must have different names, got pixels"):
        bench(ask(run, tmp_path, *twice), conf=config_dir())


def test_progress_may_be_off(run, tmp_path, capsys):
    for _ in range(2):
        short = ("bench.num_groups=[1]", "bench.steps=[2]", "progress=false")
        bench(ask(run, tmp_path, *short), conf=config_dir())
    assert capsys.readouterr().err == ""


def test_a_folder_of_other_results_is_refused(run, whole):
    before = lines(whole)
    with pytest.raises(ValueError, match="same samples, got 50"):
        bench(ask(run, whole, "bench.samples=40"), conf=config_dir())
    assert lines(whole) == before


def test_results_are_compared_as_printed(monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "benchmarks"
    files = (f"{name}={folder / 'digits' / name}.jsonl" for name in ("results", "joint"))
    monkeypatch.setattr(sys, "argv", ["compare.py", "fd_classifier", *files])
    runpy.run_path(str(folder / "compare.py"), run_name="__main__")
    _, _, *rows = capsys.readouterr().out.splitlines()
    page = (folder / "digits/README.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    assert "\n".join(rows) in page


@pytest.mark.parametrize("metric", ["fd_classifier", "fd_pixels"])
def test_the_page_of_fashion_mnist_holds_what_is_printed(metric, monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "benchmarks"
    results = f"one_stream={folder / 'fashion_mnist/one_stream.jsonl'}"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--all", metric, results])
    runpy.run_path(str(folder / "compare.py"), run_name="__main__")
    page = (folder / "fashion_mnist/likelihood.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


@pytest.mark.parametrize(("name", "count"), [("windows", 6), ("scales", 2)])
def test_the_pages_of_trainings_hold_what_is_printed(name, count, monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "benchmarks"
    where = folder / "digits" / name
    page = where.with_suffix(".md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| (fd_\w+) \| (.*) \|$", page, re.MULTILINE)
    assert len(tables) >= count
    for metric, heads in tables:
        columns = []
        for column in heads.split(" | "):
            base, _, _ = column.partition(" (two seeds)")
            files = [base, f"{base}_seed_1"] if column != base else [base]
            paths = (str(where / f"{file}.jsonl") for file in files)
            columns.append(f"{column}=" + ",".join(paths))
        monkeypatch.setattr(sys, "argv", ["compare.py", "--all", metric, *columns])
        runpy.run_path(str(folder / "compare.py"), run_name="__main__")
        assert capsys.readouterr().out.replace(", 16 steps", "") in page, heads


def test_the_page_of_solvers_holds_what_is_printed(monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "benchmarks"
    results = folder / "digits/solvers.jsonl"
    monkeypatch.setattr(sys, "argv", ["solvers.py", str(results)])
    runpy.run_path(str(folder / "solvers.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == (1 + 19) + (1 + 15)
    assert (
        (folder / "digits/solvers.md").read_text(encoding="utf-8").endswith(printed.rstrip() + "\n")
    )


def test_the_readme_holds_figures_of_the_page_of_windows():
    folder = Path(__file__).parents[1] / "benchmarks"
    page = (folder / "digits/windows.md").read_text(encoding="utf-8")
    readme = (folder.parent / "README.md").read_text(encoding="utf-8")
    results = readme.partition("## Does grouping help?")[2].partition("\n## ")[0]
    figures = re.findall(r"\d\.\d{3} ± \d\.\d{3}", results)
    assert len(figures) == 15
    assert all(figure in page for figure in figures)


@pytest.mark.slow
def test_a_solver_of_ones_own_has_a_name(run, tmp_path):
    mine = ["+solvers.mine._target_=rolldiff.DDIM", "+solvers.mine.eta=0.5"]
    short = ["bench.num_groups=[1]", "bench.steps=[2]"]
    both = ["bench.solver=[mine,euler]"]
    bench(ask(run, tmp_path, *mine, *short, *both), conf=config_dir())
    assert [json.loads(line)["solver"] for line in lines(tmp_path)] == ["mine", "euler"]
    assert "1 group, 2 steps, mine" in (tmp_path / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="solver must be among .*, got 'mine'"):
        bench(ask(run, tmp_path, *short), conf=config_dir())


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


def test_the_data_of_a_run_of_version_0_1_are_read(run, tmp_path):
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = {"_target_": "rolldiff.data.Digits", "reference": 60, "corrupt": "skip"}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"data": data}))
    short = ("bench.num_groups=[1]", "bench.steps=[2]", "bench.likelihood=null")
    bench(ask(tmp_path, tmp_path / "new", *short), conf=config_dir())
    (line,) = lines(tmp_path / "new")
    assert json.loads(line)["reference_images"] == 60


DIGITS = {"_target_": "rolldiff.data.Digits"}


@pytest.mark.parametrize(
    "data",
    [
        {"_target_": "os.system", "command": "touch MARK"},
        {"_target_": "rolldiff.data.sources.Path.touch", "self": "MARK"},
        {"_target_": "rolldiff.Patches", "image_size": 8},
        DIGITS | {"seed": {"_target_": "builtins.open", "file": "MARK", "mode": "w"}},
        DIGITS | {"seed": {"_target_": "torch.load", "f": "MARK", "weights_only": False}},
        DIGITS | {"seed": "${oc.env:HOME}"},
        DIGITS | {"seed": "${data.batch_size}", "batch_size": "${data.seed}"},
        DIGITS | {"_args_": [1]},
        [1],
        None,
    ],
    ids=str,
)
def test_data_of_others_run_nothing(data, run, tmp_path):
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text = OmegaConf.to_yaml({"data": data}).replace("MARK", str(tmp_path / "mark"))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        bench(ask(tmp_path, tmp_path / "new"), conf=config_dir())
    assert not (tmp_path / "mark").exists()


def test_data_must_come_from_somewhere(run, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UsageError, match="data must be given"):
        bench(ask(tmp_path, tmp_path / "new"), conf=config_dir())


@pytest.mark.parametrize("value", [0.3, 99.0, 100.0, 110.0])
def test_a_plot_of_a_single_configuration_has_room(value, tmp_path):
    """matplotlib gives a logarithmic axis with one value just above 100 no height."""
    record = {"num_groups": 1, "overlap": 0.0, "nfe": value, "tokens": 110, "seconds": value}
    record["metrics"] = {"fd_pixels": {"mean": value, "std": None}}
    plot_costs([record], tmp_path / "a.png", metrics=["fd_pixels"], title="", floors={})
    assert (tmp_path / "a.png").stat().st_size > 0
