"""The commands as a user meets them, in a process of their own."""

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from safetensors.torch import load_file

from rolldiff import DDIM, DecodeConfig, Decoder
from rolldiff.cli import main
from rolldiff.data import Digits
from rolldiff.errors import UsageError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def rolldiff(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "rolldiff", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture
def quiet(monkeypatch):
    """Restores what a command in this process changes."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield


TINY = ["max_steps=4", "batch_size=8", "nn.width=16", "nn.depth=1", "nn.heads=1", "report.steps=1"]


@pytest.fixture(scope="module")
def trained(once):
    """The folder of a short training, and what its command printed."""

    def fill(folder):
        done = rolldiff("train", *TINY, "run_dir=run", "trainer.val_check_interval=2", cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / "printed.json").write_text(json.dumps([done.stdout, done.stderr]))

    folder = once("trained", fill)
    return folder / "run", *json.loads((folder / "printed.json").read_text())


@pytest.mark.slow
def test_an_interrupted_training_is_the_uninterrupted_one(trained, tmp_path):
    """Stopped by its time limit again and again, with averaged weights, it ends with equal ones."""
    run, *_ = trained
    ask = [*TINY, "run_dir=run", "trainer.val_check_interval=2", "time_limit=00:00:00:00"]
    done = rolldiff("train", *ask, cwd=tmp_path)
    slices = 1
    while "resume=run" in done.stdout:
        assert not (tmp_path / "run/summary.json").exists()
        done = rolldiff("train", "resume=run", "time_limit=00:00:00:00", cwd=tmp_path)
        slices += 1
    assert done.returncode == 0, done.stderr
    assert slices == 4
    ours, theirs = (
        json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", run)
    )
    for key in ("images_seen", "steps", "fd_pixels"):
        assert ours[key] == theirs[key]
    weights = [load_file(path / "model.safetensors") for path in (tmp_path / "run", run)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    again = rolldiff("train", "resume=run", cwd=tmp_path)
    assert (again.returncode, "not finished" in again.stderr) == (2, True)


def test_train_leaves_everything(trained):
    run, out, _ = trained
    names = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert names >= {
        "last.ckpt",
        "model.safetensors",
        "config.json",
        "config.yaml",
        "samples.png",
        "stream.gif",
        "summary.json",
        "logs/metrics.csv",
        "samples/step-000002.png",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["fd_pixels"]) == ["1", "2", "4", "8", "16"]
    assert summary["images_seen"] == 4 * 8
    assert 0.2 < summary["fd_pixels_floor"] < 0.35
    assert "num_groups  fd_pixels" in out
    assert "rolldiff decode ckpt=run" in out
    for name in ("samples.png", "stream.gif"):
        with Image.open(run / name) as picture:
            picture.verify()


@pytest.mark.usefixtures("quiet")
def test_an_older_run_is_never_overwritten(trained, monkeypatch, capsys):
    run, *_ = trained
    before = (run / "summary.json").read_bytes()
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as stop:
        main(["train", *TINY, "run_dir=run"])
    refused(stop.value.code, capsys.readouterr().err, "run_dir must be a new or an empty folder")
    assert (run / "summary.json").read_bytes() == before


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("ckpt", ["run", "run/last.ckpt"])
def test_decode_writes_a_picture(trained, ckpt, monkeypatch, capsys):
    run, *_ = trained
    monkeypatch.chdir(run.parent)
    settings = "num_groups=4 overlap=0.5 steps=2 num_images=6 out=digits.png"
    main(["decode", f"ckpt={ckpt}", *settings.split()])
    assert "5 network calls in series" in capsys.readouterr().out
    with Image.open("digits.png") as picture:
        assert picture.width > 96


@pytest.mark.usefixtures("quiet", "unchecked")
def test_decode_writes_a_film(trained, monkeypatch):
    run, *_ = trained
    monkeypatch.chdir(run.parent)
    settings = "num_groups=2 steps=2 num_images=4 label=3 guidance=1 solver=heun out=digits.gif"
    main(["decode", "ckpt=run", *settings.split()])
    with Image.open("digits.gif") as film:
        assert film.format == "GIF"


def refused(status, stderr, words):
    assert status == 2, stderr
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1, stderr
    assert words in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "COMMAND must be one of train, decode"),
        (["train", "experiment=nothing"], "experiment/nothing"),
        (["train", "speed=9"], "speed"),
        (["train", "layout.patch=3"], "patch must divide image_size"),
        (["train", "training.num_groups=[17]"], "num_groups must be a whole number in 1 … 16"),
        (["train", "report.num_groups=[17]"], "num_groups must be a whole number in 1 … 16"),
        (["train", "report.steps=0"], "steps must be a whole number"),
        (["train", "nn.width=17"], "width must be a multiple"),
        (["train", "batch_size=0"], "batch_size"),
        (["train", "max_steps=["], "no viable alternative"),
        (["train", "+nn.colour=red", "run_dir=run"], "unexpected keyword argument 'colour'"),
        (["train", "time_limit=soon", "run_dir=run"], "time_limit must be a time DD:HH:MM:SS"),
        (
            ["train", "+trainer.enable_progress_bar=false", "run_dir=run"],
            "`enable_progress_bar=False`",
        ),
        (
            ["train", "callbacks.samples.num_groups=[17]", "run_dir=good"],
            "run_dir must be a new or",
        ),
        (["train", "resume=good", "max_steps=9"], "resume must come without other settings"),
        (["train", "resume=nowhere"], "with a checkpoint"),
        (["train", "trainer.accelerator=gpu"], "No supported gpu backend"),
        (["decode"], "ckpt must be"),
        (["decode", "ckpt=nowhere"], "does not exist"),
        (["decode", "ckpt=good", "solver=ancestral"], "solver/ancestral"),
        (["decode", "ckpt=good", "solver=ddim", "solver.eta=2"], "eta must be a number in [0, 1]"),
        (["generate"], "prior must be a run folder"),
        (["generate", "prior=good"], "must describe a Prior"),
        (["generate", "prior=good", "decoder=good"], "decoder"),
        (["decode", "ckpt=good", "num_groups=0"], "num_groups must be a whole number of 1 or more"),
        (["decode", "ckpt=good", "num_groups=17"], "num_groups must be a whole number in 1 … 16"),
        (["decode", "ckpt=good", "num_groups=four"], "num_groups must be a whole number"),
        (["decode", "ckpt=good", "overlap=2"], "overlap must be a number in [0, 1]"),
        (["decode", "ckpt=good", "steps=0"], "steps must be a whole number"),
        (["decode", "ckpt=good", "label=10"], "label must be in 0 … 9"),
        (["decode", "ckpt=good", "num_images=0"], "num_images"),
        (["decode", "ckpt=good", "order=sideways"], "order must be one of"),
        (
            ["decode", "ckpt=good", "num_groups=4", "overlap=0.5", "decode=magi"],
            "overlap must be left to rolldiff.presets.magi, which gives 0.75, got 0.5",
        ),
        (
            ["decode", "ckpt=good", "out=a.jpg"],
            ".npz, .safetensors or be a folder",
        ),
        (["decode", "ckpt=good", "out=no/such/a.png"], "out must be in a folder that exists"),
        (["decode", "ckpt=good", "dtype=fast"], "dtype must be float32, bfloat16"),
        (["decode", "ckpt=good", "dtype=float64"], "dtype must be torch.bfloat16 or"),
        (["likelihood"], "ckpt must be"),
        (["likelihood", "ckpt=good", "data=digits"], "image must hold 256 levels"),
        (["likelihood", "ckpt=good", "data=digits", "images=0"], "images must be"),
        (["likelihood", "ckpt=good", "data=digits", "overlap=2"], "overlap must be"),
        (["likelihood", "ckpt=good", "data=digits", "num_groups=[17]"], "num_groups must be"),
        (["likelihood", "ckpt=good", "data=digits", "likelihood.probes=0"], "probes must be"),
        (["likelihood", "ckpt=good", "data=digits", "likelihood.method=exact"], "method must be"),
        (["decode", "ckpt=cut"], "damaged"),
        (["decode", "ckpt=foreign.ckpt"], "not a checkpoint of this library"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("unchecked", "quiet")
def test_mistakes_are_one_line_and_leave_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1, num_classes=10)
    for name in ("good", "cut"):
        decoder.save_pretrained(tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    torch.save({}, tmp_path / "foreign.ckpt")
    before = sorted(tmp_path.rglob("*"))
    # In this process, for the imports alone take seconds.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    refused(stop.value.code, printed.err, words)
    assert sorted(tmp_path.rglob("*")) == before


def refuse(self):
    raise UsageError("data.path must be a folder")


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.usefixtures("quiet")
def test_a_training_refused_by_its_data_leaves_nothing(existed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if existed:
        (tmp_path / "run").mkdir()
    monkeypatch.setattr(Digits, "build_dataset", refuse)
    with pytest.raises(SystemExit) as stop:
        main(["train", *TINY, "run_dir=run"])
    refused(stop.value.code, capsys.readouterr().err, "data.path must be a folder")
    assert [p.name for p in tmp_path.rglob("*")] == ["run"] * existed


@pytest.mark.usefixtures("quiet")
def test_an_error_that_is_not_for_users_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("after ten hours")

    Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1).save_pretrained(tmp_path)
    monkeypatch.setattr(Decoder, "decode", fail)
    with pytest.raises(ValueError, match="after ten hours"):
        main(["decode", f"ckpt={tmp_path}", f"out={tmp_path}/a.png"])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1).save_pretrained(tmp_path)
    monkeypatch.setattr(Decoder, "decode", fail)
    with pytest.raises(SystemExit) as stop:
        main(["decode", f"ckpt={tmp_path}", f"out={tmp_path}/a.png"])
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert printed.startswith("rolldiff: out of memory")
    assert "\n" not in printed


@pytest.mark.usefixtures("quiet")
def test_full_errors_are_shown_if_asked_for(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UsageError, match="ckpt must be"):
        main(["decode"])


@pytest.mark.usefixtures("quiet", "unchecked")
def test_every_setting_of_a_decoding_reaches_it(tmp_path, monkeypatch):
    seen = {}

    def decode(self, cond, config, **options):
        seen.update(cond=cond, config=config, **options)
        raise UsageError("enough")

    decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1, num_classes=10)
    decoder.save_pretrained(tmp_path)
    monkeypatch.setattr(Decoder, "decode", decode)
    words = "num_groups=4 overlap=0.5 steps=7 order=random:1 solver=ddim solver.eta=0.5 guidance=2"
    with pytest.raises(SystemExit):
        main(
            ["decode", f"ckpt={tmp_path}", f"out={tmp_path}/a.png", "num_images=2", *words.split()]
        )
    assert seen["config"] == DecodeConfig(
        num_groups=4, overlap=0.5, steps=7, order="random:1", solver=DDIM(0.5), guidance=2
    )
    assert (seen["cond"].tolist(), seen["num_images"], seen["seed"]) == ([0, 1], 2, 0)


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("quiet")
def test_likelihood_prints_a_table(trained, capsys):
    run, *_ = trained
    settings = "num_groups=[1,4,16] overlap=[0,0.5] images=4 batch_size=3 likelihood.levels=17"
    main(["likelihood", f"ckpt={run}", "likelihood.samples=2", *settings.split()])
    printed = capsys.readouterr()
    assert "data.held_out=0.1" in printed.err  # the run's data hold none out
    rows = [line.split(" | ") for line in printed.out.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == [
        "| 1 group",
        "| 4 groups, overlap 0",
        "| 16 groups, overlap 0",
        "| 4 groups, overlap 0.5",
        "| 16 groups, overlap 0.5",
    ]
    assert all(0 < float(row[1].split()[0]) < 20 for row in rows)


def test_a_training_is_quiet_in_a_pipe(trained):
    _, out, err = trained
    assert "training: 4/4 (100 %)" in err
    assert "\r" not in out + err
    assert len(err) < 2000
    for word in ("Tip", "litlogger", "GPU", "TPU", "weights_only", "num_workers"):
        assert word not in out + err


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_its_own_folder(tmp_path):
    done = rolldiff("train", "-m", *TINY, "noise=rectified,cosine", "progress=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training:" not in done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("runs/*-sweep/*/summary.json"))
    assert [folder.name for folder in folders] == ["0", "1"]
    noises = [json.loads((path / "config.json").read_text())["noise"] for path in folders]
    assert [noise["_target_"] for noise in noises] == ["rolldiff.Rectified", "rolldiff.Cosine"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "usage: rolldiff COMMAND"), (["--version"], "0.2.0\n"), (["decode", "--help"], "ckpt")],
)
def test_help_and_version(arguments, words, capsys):
    with contextlib.suppress(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().out
    assert not HydraConfig.initialized(), "the next command in this process is no job of this one"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("hydra", "the command needs pip install 'rolldiff[train]', for hydra is missing"),
        (
            "lightning",
            "train needs the extra `train`, pip install 'rolldiff[train]', and lightning",
        ),
    ],
)
def test_an_installation_without_the_extra_says_so_in_one_line(missing, words, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from rolldiff.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rolldiff: {words}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    poison = ["optimizer.lr=1e30", "callbacks.checkpoint.every_n_train_steps=1", "max_steps=20"]
    done = rolldiff("train", *TINY, *poison, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("rolldiff: the loss"))
    assert re.search(r"the loss is \S+ at step \d+; the last checkpoint is kept", line)
    (kept,) = (tmp_path / "run/checkpoints").glob("*.ckpt")
    assert rolldiff("decode", f"ckpt={kept}", "steps=1", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "run/summary.json").exists()
