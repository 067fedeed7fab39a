"""A run folder: killed, moved, damaged, resumed, asked to end, and somebody else's."""

import csv
import datetime
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from runs import ALLOWED, composed
from safetensors.torch import load_file

from rolldiff import Decoder
from rolldiff.cli import main
from rolldiff.data import Digits
from rolldiff.errors import UsageError
from rolldiff.files import locked
from rolldiff.hub import read_checkpoint
from rolldiff.objective import objective
from rolldiff.signals import Interrupted
from rolldiff.training import AveragedWeights, LitDecoder, run, train
from rolldiff.training.run import resumed_config

pytestmark = ALLOWED
TINY = [
    "max_steps=4",
    "max_time=null",
    "batch_size=4",
    "progress=false",
    "nn.width=16",
    "nn.depth=1",
    "nn.heads=1",
    "training.num_groups=[1,2]",
    "report.samples=8",
    "report.steps=1",
    "lit.warmup_steps=1",
    "trainer.log_every_n_steps=1",
    "callbacks.samples=null",
    "callbacks.checkpoint.every_n_train_steps=2",
]


class KilledError(BaseException):
    """Not an Exception, so that nobody handles it."""


def config(*overrides):
    return composed(*TINY, *overrides)


def resume(folder, **settings):
    cfg = config(f"resume={folder}")
    for name, value in settings.items():
        cfg[name] = value
    return train(resumed_config(cfg))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(f"run_dir={folder}"))
    return folder


@pytest.fixture
def stopped(tmp_path):
    """A run that stopped after its first step."""
    folder = tmp_path / "stopped"
    assert train(config(f"run_dir={folder}", "time_limit=00:00:00:00")) is None
    return folder


# Killed


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_writes_ends_with_the_same_weights(whole, tmp_path, monkeypatch):
    """Whatever it was about to write, also between the last checkpoint and the summary."""
    replace, left = os.replace, 0

    def replace_or_die(source, target):
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    kills = 0
    while True:
        folder = tmp_path / f"run{kills}"
        left = kills
        try:
            train(config(f"run_dir={folder}"))
        except KilledError:
            left = -1
        else:
            break
        assert not (folder / "summary.json").exists()
        if folder.exists() and run._checkpoint_files(folder):
            resume(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            train(config(f"run_dir={folder}"))
        assert weights(folder) == weights(whole), kills
        reports = [json.loads((f / "summary.json").read_text()) for f in (folder, whole)]
        assert reports[0]["fd_pixels"] == reports[1]["fd_pixels"]
        assert reports[0]["images_seen"] == reports[1]["images_seen"] == 16
        kills += 1
    assert kills >= 7  # config, two checkpoints, the last, weights, config.json, …, summary


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(whole, tmp_path):
    """By SIGKILL, so that nothing is tidied up; half-written files are gone at the end."""
    command = [sys.executable, "-m", "rolldiff", "train"]
    folder = tmp_path / "run"
    kills, wait = 0, 2.0
    while not (folder / "summary.json").exists():
        begun = folder.is_dir() and run._checkpoint_files(folder)
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        ask = [f"resume={folder}"] if begun else [*TINY, f"run_dir={folder}"]
        with subprocess.Popen([*command, *ask], stderr=subprocess.PIPE) as job:
            try:
                _, stderr = job.communicate(timeout=wait)
                assert job.returncode == 0, stderr
            except subprocess.TimeoutExpired:
                job.kill()
        kills, wait = kills + 1, wait + 0.37
        assert kills < 60
    assert weights(folder) == weights(whole)
    assert not list(folder.rglob(".part-*"))


def test_half_a_summary_is_not_a_finished_run(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    summary = (folder / "summary.json").read_bytes()
    with pytest.raises(UsageError, match="not finished"):
        resume(folder)
    (folder / "summary.json").write_bytes(summary[: len(summary) // 2])
    resume(folder)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    assert weights(folder) == weights(whole)


# Moved, copied, damaged, shared


def test_a_copied_run_goes_on_where_it_is(stopped, whole, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere" / "copy [1], it's=ü"
    shutil.copytree(stopped, copy)
    before = contents(stopped)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    os.utime(copy / "last.ckpt", (0, 0))  # a copy may lose the times
    cfg = config()
    cfg.resume = "../elsewhere/copy [1], it's=ü"
    train(resumed_config(cfg))
    assert contents(stopped) == before
    assert weights(copy) == weights(whole)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.slow
def test_the_newest_whole_checkpoint_is_taken(whole, tmp_path):
    folder = tmp_path / "run"
    train(config(f"run_dir={folder}", "time_limit=00:00:00:00", "max_steps=4"))
    for _ in range(2):
        resume(folder, time_limit="00:00:00:00")
    older = folder / "checkpoints/step-2.ckpt"
    assert older.is_file()
    assert run.newest_checkpoint(folder).step == 3
    data = bytearray((folder / "last.ckpt").read_bytes())
    for damage in (
        data[: len(data) // 2],
        data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
        b"",
    ):
        (folder / "last.ckpt").write_bytes(damage)
        with pytest.warns(UserWarning, match=r"left out: .*last\.ckpt is damaged"):
            assert run.newest_checkpoint(folder).path == older
    with pytest.warns(UserWarning, match="left out"):
        resume(folder)
    assert weights(folder) == weights(whole)


def test_a_run_without_a_whole_checkpoint(stopped):
    (stopped / "last.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"whole checkpoint.*last\.ckpt is damaged"):
        resume(stopped)


def test_a_folder_belongs_to_one_job(stopped, tmp_path):
    before = contents(stopped)
    with locked(stopped), pytest.raises(UsageError, match="no other job"):
        resume(stopped)
    assert contents(stopped) == before
    (tmp_path / "new").mkdir()
    with locked(tmp_path / "new"), pytest.raises(UsageError, match="no other job"):
        train(config(f"run_dir={tmp_path / 'new'}"))
    assert (tmp_path / "new/.lock").exists()


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfgs = [config() for _ in range(3)]
    folders = [run._made_folder(cfg)[0] for cfg in cfgs]
    assert len({str(folder.absolute()) for folder in folders}) == 3
    assert all(folder.is_dir() for folder in folders)


def test_links_are_not_written_through(stopped, tmp_path):
    (tmp_path / "theirs").mkdir()
    shutil.rmtree(stopped / "logs")
    (stopped / "logs").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"link, got .*logs"):
        resume(stopped)
    assert not list((tmp_path / "theirs").iterdir())


def test_the_log_goes_on(stopped, tmp_path):
    def steps():
        with (stopped / "logs/metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]

    assert steps() == [0]
    with (stopped / "logs/metrics.csv").open("a") as file:
        file.write("1,,")  # a row that a killed job began
    resume(stopped)
    assert steps() == [0, 1, 2, 3]


# Asked to end


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_signal_ends_a_training_with_a_checkpoint(signum, batch, whole, tmp_path, monkeypatch):
    class Ask(L.Callback):
        def on_train_batch_start(self, trainer, lit, batch_, batch_idx):
            if batch_idx == batch:
                os.kill(os.getpid(), signum)

    build = run._instantiate

    def with_signal(cfg, **others):
        if "callbacks" in others:
            others["callbacks"] = [Ask(), *others["callbacks"]]
        return build(cfg, **others)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_instantiate", with_signal)
        with pytest.raises(Interrupted) as stop:
            train(config(f"run_dir={folder}"))
    assert stop.value.status == 128 + signum
    assert {s: signal.getsignal(s) for s in before} == before
    assert run.newest_checkpoint(folder).step == batch + 1
    assert not (folder / "summary.json").exists()
    resume(folder)
    assert weights(folder) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_and_the_line_that_resumes(signum, status, tmp_path):
    folder = tmp_path / "a run, it's [1]"
    command = [sys.executable, "-m", "rolldiff", "train", *TINY[1:], "max_steps=100000"]
    command.append(f"run_dir='{str(folder).replace(chr(39), chr(92) + chr(39))}'")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        while not run._checkpoint_files(folder):
            time.sleep(0.1)
        job.send_signal(signum)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == status
    assert "Traceback" not in stderr
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("rolldiff: stopped by ")
    line = next(line for line in lines if line.startswith("rolldiff train "))
    again = [sys.executable, "-m", *shlex.split(line), "time_limit=00:00:00:00"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1].strip())[:2] == ["rolldiff", "train"]


# What is saved


def test_a_training_that_ends_in_the_warm_up_saves_what_it_trained(tmp_path):
    train(config(f"run_dir={tmp_path / 'run'}", "lit.warmup_steps=100"))
    head = load_file(tmp_path / "run/model.safetensors")["backbone.head.weight"]
    assert head.abs().sum() > 0  # where it starts at 0


def test_the_average_follows_the_weights_until_it_starts():
    decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1, num_classes=10)
    lit, seen = LitDecoder(decoder, warmup_steps=0), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, lit, *_):
            head = [m.model.backbone.head.weight for m in (lit, average._average_model.module)]
            seen.append([w.detach().clone() for w in head])

    average = AveragedWeights(decay=0.5, start=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **quiet,
        accelerator="cpu",
        enable_checkpointing=False,
        max_steps=4,
        callbacks=[average, Watch()],
    )
    trainer.fit(lit, Digits(batch_size=8, max_steps=4))
    for weight, mean in seen[:3]:
        torch.testing.assert_close(mean, weight, rtol=0, atol=0)
    torch.testing.assert_close(seen[3][1], (seen[2][1] + seen[3][0]) / 2)


def test_all_files_hold_the_averaged_weights(whole):
    saved = load_file(whole / "model.safetensors")
    last = read_checkpoint(whole / "last.ckpt", Decoder).state_dict()
    assert saved.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in saved.items())
    content = torch.load(whole / "last.ckpt", weights_only=True)
    assert content["callbacks"]["Clock"]["finished"]


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        (["+trainer.accumulate_grad_batches=3"], 48),
        (["+trainer.fast_dev_run=true"], 4),
        (["+trainer.limit_train_batches=2"], 16),
        (["+trainer.overfit_batches=2"], 16),
        (["+trainer.limit_val_batches=0", "trainer.val_check_interval=2"], 16),
        (["+trainer.detect_anomaly=true"], 16),
        (["+trainer.profiler=simple"], 16),
        (["trainer.gradient_clip_val=null"], 16),
        (["trainer.precision=bf16-mixed", "+trainer.gradient_clip_algorithm=value"], 16),
        (["data.held_out=0.1", "trainer.val_check_interval=2"], 16),
        (["callbacks.ema=null"], 16),
        (["callbacks.checkpoint=null", "+trainer.enable_checkpointing=false"], 16),
        (["~logger"], 16),
        (["seed=4294967296"], 16),
        (["+trainer.max_epochs=1", "data.max_steps=2"], 8),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # Lightning's own about these options
def test_options_of_the_trainer(overrides, images, tmp_path):
    summary = train(config(f"run_dir={tmp_path / 'run'}", *overrides))
    assert summary.images_seen == images
    assert json.loads((tmp_path / "run/summary.json").read_text())["images_seen"] == images


def test_loggers_get_what_sweeps_are_compared_by(tmp_path):
    train(config(f"run_dir={tmp_path / 'run'}", "logger=tensorboard", "optimizer.lr=0.003"))
    (file,) = (tmp_path / "run/logs").glob("hparams.yaml")
    logged = yaml.safe_load(file.read_text())
    assert logged["optimizer"]["lr"] == 0.003
    assert (logged["batch_size"], logged["seed"]) == (4, 0)
    assert logged["data"]["_target_"] == "rolldiff.data.Digits"


def test_the_report_is_logged(whole):
    with (whole / "logs/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    summary = json.loads((whole / "summary.json").read_text())
    for groups, value in summary["fd_pixels"].items():
        assert float(last[f"report/fd_pixels/{groups}"]) == pytest.approx(value)


def test_fused_optimizers_do_not_clip_in_half_precision():
    decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1)
    lit = LitDecoder(decoder, optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    lit._trainer = SimpleNamespace(precision="16-mixed", gradient_clip_val=1.0, callbacks=[])
    with pytest.raises(UsageError, match=r"optimizer\.fused must be false"):
        lit.configure_optimizers()


def test_the_seconds_are_those_of_the_training(tmp_path):
    start = time.perf_counter()
    seconds = train(config(f"run_dir={tmp_path / 'run'}")).seconds
    assert 0 < seconds < time.perf_counter() - start
    content = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert seconds == content["callbacks"]["Clock"]["seconds"]


def test_the_log_holds_images_per_second(whole):
    with (whole / "logs/metrics.csv").open() as file:
        rates = [float(row["images_per_second"] or 0) for row in csv.DictReader(file)]
    assert sum(rate > 0 for rate in rates) == 3  # from the second of four steps on


def test_a_checkpoint_never_holds_what_has_diverged():
    """On an accelerator the loss is not read after every step."""
    decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1)
    lit = LitDecoder(decoder)
    lit.on_save_checkpoint({})
    lit._trainer = SimpleNamespace(global_step=7)
    lit._last_loss = torch.tensor(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7; the last checkpoint"):
        lit.on_save_checkpoint({})


def test_the_objective_is_the_smallest_distance(tmp_path):
    summary = train(config(f"run_dir={tmp_path / 'run'}"))
    distances = json.loads((tmp_path / "run/summary.json").read_text())["fd_pixels"]
    assert objective(summary.values, "fd_pixels") == min(distances.values())


# Classes of the data


def test_classes_come_from_the_data(tmp_path):
    train(config(f"run_dir={tmp_path / 'run'}", "num_classes=null"))
    saved = Decoder.from_pretrained(tmp_path / "run")
    assert saved.conditioning.num_classes == 10
    with pytest.raises(UsageError, match=r"num_classes must be 10 or more.*got 9"):
        train(config(f"run_dir={tmp_path / 'few'}", "num_classes=9"))
    assert not (tmp_path / "few").exists()
    train(config(f"run_dir={tmp_path / 'none'}", "num_classes=0"))
    assert Decoder.from_pretrained(tmp_path / "none").conditioning.num_classes == 0


# Refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["max_steps=1e2"], "max_steps must be a whole number"),
        (["max_steps=.nan"], "max_steps"),
        (["data.batch_size=100000000000000000000"], "batch_size must be a whole number in 1"),
        (["+data.workers=100000"], "workers must be a whole number in 0 … 10000"),
        (["batch_size=true"], "batch_size must be a whole number"),
        (["callbacks.samples=[1,2]"], "callbacks.samples must be null or a callback"),
        (["max_steps=100000000000000000000"], "max_steps must be a whole number in 1 … 10000"),
        (["max_time=1e2"], "max_time must be a time DD:HH:MM:SS, got 100.0"),
        (["trainer.max_time=-1"], "trainer.max_time must be a time DD:HH:MM:SS, got -1"),
        (["trainer.log_every_n_steps=x"], "trainer.log_every_n_steps must be a whole number"),
        (["trainer.num_sanity_val_steps=x"], "trainer.num_sanity_val_steps must be a whole"),
        (["process_timeout=00:00:00:00"], "process_timeout must be above 0"),
        (["trainer.strategy=fsdp"], "trainer.strategy must be auto, ddp, or left to"),
        (["trainer.strategy=ddp_spawn"], "trainer.strategy must be auto, ddp, or left to"),
        (["trainer.devices=1000", "trainer.accelerator=cpu"], "trainer.devices must be a whole"),
        (["trainer.devices=200", "trainer.accelerator=cpu"], "at most on this CPU, got 200"),
        (["trainer.num_nodes=2"], "trainer.num_nodes must be 1 unless torchrun or srun"),
        (["optimizer._partial_=inf"], "_partial_ flag must be a bool"),
        (["seed=-1"], "seed must be a whole number of 0 or more"),
        (["seed=0.5"], "seed must be a whole number"),
        (["run_dir=''"], "run_dir must name a folder"),
        (["optimizer.lr=-1"], "optimizer must be one that fits"),
        (["optimizer.lr=fast"], "optimizer"),
        (["logger=null"], "~GROUP for none"),
        (["callbacks.ema.decay=2"], "callbacks.ema.decay must be a number in [0, 1]"),
        (["lit.warmup_steps=0.5"], "warmup_steps must be a whole number"),
        (["progress=1"], "progress must be true or false"),
        (["seed=${batch_size}", "batch_size=${seed}"], "Recursive interpolation"),
        (["trust=../x", "resume=."], "resume must be"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_settings_are_refused_in_one_line_and_leave_nothing(
    overrides, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "run_dir=deep/run", *overrides]
    if "resume=." in overrides:
        arguments = overrides
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert words in printed
    assert "\n" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no folder", "full disk"])
def test_what_cannot_be_written_is_one_line(kind, tmp_path):
    (tmp_path / "file").touch()
    target = "file/run" if kind == "no folder" else "run"

    def limit():
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "rolldiff", "train", *TINY, f"run_dir={target}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == (2 if kind == "no folder" else 1), done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("rolldiff: "))
    assert "run" in line
    assert "Traceback" not in done.stderr


# Somebody else's


PAYLOADS = {
    "a file": {"report.samples": {"_target_": "builtins.open", "file": "MARK", "mode": "w"}},
    "a process": {"callbacks.x": {"_target_": "os.system", "command": "touch MARK"}},
    "subprocess": {"lit.model": {"_target_": "subprocess.run", "args": ["touch", "MARK"]}},
    "a pickle": {"data.seed": {"_target_": "torch.load", "f": "MARK", "weights_only": False}},
    "through ours": {"data._target_": "rolldiff.data.sources.Path.touch"},
    "through a module": {"data.seed": {"_target_": "rolldiff.training.run.shutil.rmtree"}},
    "hub": {"data.seed": {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"}},
    "numpy": {"report": {"_target_": "rolldiff.evaluation.metrics.torch.hub.load"}},
    "get_method": {"lit.optimizer": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
    "a download": {"data.seed": {"_target_": "rolldiff.evaluation.networks.Inception"}},
    "a list": {"callbacks.x": {"y": [[{"_target_": "os.remove", "path": "MARK"}]]}},
    "no text": {"data._target_": ["os.system"]},
    "environment": {"seed": "${oc.env:HOME}"},
    "decode": {"seed": "${oc.decode:'1'}"},
    "a loop": {"seed": "${batch_size}", "batch_size": "${seed}"},
    "elsewhere": {"callbacks.checkpoint.dirpath": "/tmp/elsewhere"},
    "relative": {"callbacks.checkpoint.dirpath": "elsewhere"},
    "upwards": {"logger.folder": "${run_dir}/../elsewhere"},
    "a name": {"callbacks.checkpoint.filename": "../../elsewhere"},
    "home": {"trainer.default_root_dir": "~/elsewhere"},
    "arguments": {"lit.optimizer._args_": [1]},
    "not finite": {"optimizer.lr": float("nan")},
    "a date": {"seed": datetime.date(2020, 1, 1)},
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_foreign_configuration_runs_nothing(payload, stopped, tmp_path, monkeypatch):
    def no_socket(*_, **__):
        raise AssertionError("a connection")

    mark = tmp_path / "mark"
    path = stopped / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for key, value in payload.items():
        *parents, name = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[name] = value
    path.write_text(yaml.safe_dump(content).replace("MARK", str(mark)))
    before = contents(stopped)
    monkeypatch.setattr(socket.socket, "connect", no_socket)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        resume(stopped)
    assert not mark.exists()
    after = contents(stopped)
    assert {k: v for k, v in after.items() if k.name != ".lock"} == {
        k: v for k, v in before.items() if k.name != ".lock"
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [1]\nb: [*a, *a]\n", "aliases are not allowed"),
        ("[" * 3000, "readable YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "readable YAML"),
        ("- 1\n", "must hold a dictionary"),
        ("# " + "x" * 2**21, "at most 1 MiB"),
        ("\xff\xfe", "must"),
        ("1: {2: 3}\n", "must be texts"),
    ],
    ids=range(7),
)
def test_files_that_are_no_configuration(text, words, stopped):
    (stopped / "config.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=words):
        resume(stopped)


def test_a_model_is_that_of_the_checkpoint(stopped, whole):
    """A configuration that asks for a huge network is not followed."""
    path = stopped / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["lit"]["model"]["backbone"]["depth"] = 10**9
    path.write_text(yaml.safe_dump(content))
    resume(stopped)
    assert weights(stopped) == weights(whole)


@pytest.mark.parametrize("part", ["data", "lit", "report", "trainer"])
def test_parts_of_a_resumed_run_are_dictionaries(part, stopped):
    path = stopped / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {part: 10**20}))
    with pytest.raises(UsageError, match=f"{part} must be a dictionary with _target_, got 1000"):
        resume(stopped)


def test_ones_own_classes_are_trusted_by_name(stopped, tmp_path, monkeypatch):
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import lightning\nclass Mine(lightning.Callback):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = stopped / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["callbacks"]["mine"] = {"_target_": "mypackage.Mine"}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=r"say trust=mypackage\."):
        resume(stopped)
    with pytest.raises(UsageError, match="trust must be a package"):
        resume(stopped, trust="")
    with pytest.raises(UsageError, match="must name a class"):
        resume(stopped, trust="mypack")
    assert resume(stopped, trust="mypackage.").steps == 4


@pytest.mark.usefixtures("unchecked")
def test_a_network_of_ones_own_is_trained_resumed_decoded_and_measured(
    tmp_path, monkeypatch, capsys
):
    package = tmp_path / "ownnet"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os, subprocess\nfrom rolldiff import Transformer\n"
        "from rolldiff.data import Digits\nclass Net(Transformer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    stop = "time_limit=00:00:00:00"
    main(["train", *TINY, "nn._target_=ownnet.Net", "run_dir=run", stop])

    def refused(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        printed = capsys.readouterr().err.strip()
        assert end.value.code == 2
        assert "\n" not in printed
        return printed

    bench = ("bench.steps=[1]", "bench.joint_steps=[]", "bench.samples=8", "bench.seeds=[0]")
    bench += ("bench.features=[pixels]", "bench.num_groups=[1]", "bench.pairs=8")
    trust = "trust=ownnet."
    assert "say trust=ownnet." in refused("train", "resume=run")
    main(["train", "resume=run", trust, "progress=false"])
    for ckpt in ("run", "run/last.ckpt"):
        decode = ("decode", f"ckpt={ckpt}", "num_images=2", "steps=1", "out=a.png")
        assert "trust=mypackage." in refused(*decode)
        main([*decode, trust])
        measure = ("bench", f"ckpt={ckpt}", "run_dir=measured", "progress=false", *bench)
        assert "trust=mypackage." in refused(*measure)
        assert not (tmp_path / "measured").exists()
    main(["bench", "ckpt=run", "run_dir=measured", "progress=false", trust, *bench])

    # What a trusted package has imported is not its own.
    path = tmp_path / "run/config.json"
    content = json.loads(path.read_text())
    for target in ("ownnet.subprocess.Popen", "ownnet.Digits", "ownnet.os.system", "ownnet.none"):
        path.write_text(json.dumps(content | {"backbone": {"_target_": target}}))
        assert target in refused("decode", "ckpt=run", trust)
    (tmp_path / "run/summary.json").unlink()
    path = tmp_path / "run/config.yaml"
    content = yaml.safe_load(path.read_text())
    for target in ("ownnet.subprocess.Popen", "ownnet.os.system", "ownnet.none"):
        content["callbacks"]["more"] = {"_target_": target}
        path.write_text(yaml.safe_dump(content))
        assert target in refused("train", "resume=run", trust)


def test_the_saved_configuration_names_no_folder(whole):
    text = (whole / "config.yaml").read_text()
    assert str(whole) not in text
    assert "${run_dir}/checkpoints" in text
