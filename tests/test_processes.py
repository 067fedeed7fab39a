"""A training on several devices: what one process would train, and an end with a message."""

import csv
import json
import multiprocessing.util
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ALLOWED, composed
from safetensors.torch import load_file

from rolldiff import slurm
from rolldiff.diffusion.process import Shard
from rolldiff.errors import UsageError
from rolldiff.processes import OtherProcessError, Processes, processes, start
from rolldiff.training import run, train
from rolldiff.training.run import resumed_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from reliability import children

pytestmark = ALLOWED
TINY = [
    "max_steps=20",
    "max_time=null",
    "batch_size=8",
    "data.held_out=0.5",  # a number of images that two processes share equally
    "progress=false",
    "nn.width=16",
    "nn.depth=2",
    "nn.heads=1",
    "training.num_groups=[1,2]",
    "report.samples=9",
    "report.steps=1",
    "lit.warmup_steps=4",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=5",
    "callbacks.checkpoint.every_n_train_steps=5",
    "trainer.accelerator=cpu",
]
TWO = "trainer.devices=2"
COMMAND = [sys.executable, "-m", "rolldiff", "train"]


def config(*overrides):
    return composed(*TINY, *overrides)


def resume(folder, **settings):
    cfg = config(f"resume={folder}", TWO)
    for name, value in settings.items():
        cfg[name] = value
    return train(resumed_config(cfg))


def column(folder, name="loss"):
    with (folder / "logs/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_same(folder, other, *, rtol=1e-5, atol=1e-4):
    """The averaged weights, the trained ones and the optimizer's state.

    Adam divides a gradient by its size, so that a step may differ by a part of the learning rate
    where the gradient is nothing but rounding.
    """
    a, b = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, other))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert a.get(key, {}).keys() == b.get(key, {}).keys()
        for name, value in a.get(key, {}).items():
            torch.testing.assert_close(value, b[key][name], rtol=rtol, atol=atol, msg=name)
    moments, others = (c["optimizer_states"][0]["state"] for c in (a, b))
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        torch.testing.assert_close(
            state["exp_avg"], others[number]["exp_avg"], rtol=1e-3, atol=atol
        )
    saved, whole = (load_file(f / "model.safetensors") for f in (folder, other))
    assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in whole.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process trains with some settings, each trained once."""
    found = {}

    def trained(*overrides):
        if overrides not in found:
            folder = tmp_path_factory.mktemp("one") / "run"
            train(config(f"run_dir={folder}", *overrides))
            found[overrides] = folder
        return found[overrides]

    return trained


# The mathematics


@pytest.mark.parametrize("count", [2, 3, 4, 12])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_shards_of_a_batch_have_its_loss_and_its_gradient(make, count, drop):
    """Also where a process begins in the middle of a slice."""
    decoder = make(dtype=torch.float64)
    object.__setattr__(decoder.training_distribution, "drop_cond", drop)
    image = torch.rand(12, 1, 8, 8, dtype=torch.float64) * 2 - 1
    label = torch.arange(12) % 10

    def loss(shard):
        generator = torch.Generator().manual_seed(3)
        return decoder.loss(shard.rows(image), shard.rows(label), generator=generator, shard=shard)

    def gradient(value):
        decoder.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in decoder.parameters()])

    whole = loss(Shard())
    parts = torch.stack([loss(Shard(i, count)) for i in range(count)])
    torch.testing.assert_close(parts.mean(), whole)
    assert parts.detach().std() > 0
    torch.testing.assert_close(gradient(parts.mean()), gradient(whole))


def test_shards_need_a_generator_that_all_have(make):
    with pytest.raises(UsageError, match="generator must be given beside shard"):
        make().loss(torch.zeros(2, 1, 8, 8), [0, 1], shard=Shard(0, 2))
    with pytest.raises(UsageError, match="index must be a whole number in 0 … 1, got 2"):
        Shard(2, 2)


# The same training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ([], 1e-5),
        (["+trainer.accumulate_grad_batches=2", "max_steps=6"], 1e-5),
        (["nn.gradient_checkpointing=true", "max_steps=6"], 1e-5),
        (["trainer.precision=bf16-mixed", "max_steps=6"], 2e-2),
        (["trainer=fsdp"], 1e-5),
        (["trainer=fsdp", "+trainer.accumulate_grad_batches=2", "max_steps=6"], 1e-5),
        (["trainer=fsdp", "trainer.precision=bf16-mixed", "max_steps=6"], 2e-2),
        (["trainer=fsdp", "callbacks.samples=null", "max_steps=6"], 1e-5),
        (["freeze=[*.mlp,backbone.embed]", "max_steps=6"], 1e-5),
        (["trainer=fsdp", "freeze=[*.mlp,backbone.embed]", "max_steps=6"], 1e-5),
    ],
    ids=str,
)
def test_two_processes_train_what_one_does(overrides, tolerance, one, tmp_path):
    alone = one(*(o for o in overrides if o != "trainer=fsdp"))
    folder = tmp_path / "run"
    summary = train(config(*overrides, f"run_dir={folder}", TWO))
    assert column(folder) == pytest.approx(column(alone), rel=tolerance, abs=tolerance)
    assert column(folder, "val_loss") == pytest.approx(
        column(alone, "val_loss"), rel=10 * tolerance
    )
    assert_same(folder, alone, rtol=tolerance, atol=10 * tolerance)
    found, whole = (json.loads((f / "summary.json").read_text()) for f in (folder, alone))
    assert found["fd_pixels"] == pytest.approx(whole["fd_pixels"], rel=10 * tolerance)
    assert found["images_seen"] == whole["images_seen"] == summary.images_seen
    assert found["parameters"] == whole["parameters"]
    names = {p.relative_to(f) for f in (folder,) for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(alone) for p in alone.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_a_tokenizer_and_a_prior(strategy, one, tmp_path):
    tokens = ["experiment=tokenizer", "max_steps=6", "callbacks.samples=null"]
    tokenizer = one(*tokens)
    codes = ["experiment=prior", f"tokenizer={tokenizer}", "max_steps=6"]
    codes += ["prior_model.width=16", "prior_model.heads=1", "report.num_groups=2"]
    for number, kind in enumerate((tokens, codes)):
        folder = tmp_path / str(number)
        train(config(*kind, f"trainer={strategy}", f"run_dir={folder}", TWO))
        assert column(folder) == pytest.approx(column(one(*kind)), rel=1e-5)
        assert_same(folder, one(*kind))
        found, whole = (json.loads((f / "summary.json").read_text()) for f in (folder, one(*kind)))
        assert found["fd_pixels"] == pytest.approx(whole["fd_pixels"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_training_goes_on_with_other_devices(strategy, one, tmp_path):
    """Two processes, then one, then two."""
    folder = tmp_path / "run"
    stop = "time_limit=00:00:00:00"
    assert train(config(f"run_dir={folder}", f"trainer={strategy}", TWO, stop)) is None
    for devices in (1, 2):
        cfg = config(f"resume={folder}", f"trainer.devices={devices}")
        cfg.time_limit = "00:00:00:00" if devices == 1 else None
        done = train(resumed_config(cfg, given=["trainer.devices"]))
        assert (done is None) == (devices == 1)
    assert column(folder) == pytest.approx(column(one()), rel=1e-5)
    assert_same(folder, one())


@pytest.mark.slow
def test_torchrun_and_slurm_start_the_same_training(one, tmp_path):
    """A run by torchrun, and one as two tasks of a step of srun see it."""
    folders = [tmp_path / name for name in ("torchrun", "slurm")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "-m", "rolldiff", "train"]
    done = subprocess.run(
        [*torchrun, *TINY, f"run_dir={folders[0]}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next:") == 1
    step = {
        "SLURM_JOB_ID": str(10000 + os.getpid() % 10000),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    tasks = [
        subprocess.Popen(
            [*COMMAND, *TINY, f"run_dir={folders[1]}"],
            env=os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    for folder in folders:
        assert column(folder) == pytest.approx(column(one()), rel=1e-5)
        assert_same(folder, one())


# Its end


def begun(folder, job):
    """Wait until a training has a checkpoint."""
    while not list(folder.glob("checkpoints/step-*.ckpt")):
        assert job.poll() is None, "it ended"
        time.sleep(0.05)
    return children(job.pid)


@pytest.fixture
def endless(tmp_path):
    """A training on two devices that does not end by itself, and its folder."""
    jobs = []

    def started(*overrides):
        folder = tmp_path / "run"
        command = [*COMMAND, *TINY[1:], "max_steps=100000", TWO, f"run_dir={folder}", *overrides]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return jobs[-1], folder

    yield started
    for job in jobs:
        for child in children(job.pid) if job.poll() is None else ():
            os.kill(child, signal.SIGKILL)
        job.kill()
        job.wait()
        job.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_training_with_a_message(rank, endless):
    job, folder = endless()
    processes_ = begun(folder, job)
    os.kill(processes_[rank], signal.SIGKILL)
    start_time = time.monotonic()
    _, stderr = job.communicate(timeout=60)
    assert time.monotonic() - start_time < 60
    assert job.returncode == 1
    (line,) = (line for line in stderr.splitlines() if line.startswith("rolldiff: "))
    assert f"process {rank} of 2 was ended by SIGKILL" in line
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes_)
    assert run.newest_checkpoint(folder).step >= 5
    again = resume(folder, time_limit="00:00:00:00")
    assert again is None


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes_with_a_checkpoint(signum, status, endless):
    job, folder = endless()
    begun(folder, job)
    job.send_signal(signum)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == status
    assert "Traceback" not in stderr
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("rolldiff: stopped by ")
    line = next(line for line in lines if line.startswith("rolldiff train "))
    assert shlex.split(line)[2] == f"resume={folder}"
    newest = run.newest_checkpoint(folder)
    assert newest.path.name == "last.ckpt"
    assert len(column(folder)) == newest.step


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "training"])
def test_processes_end_with_the_one_that_started_them(moment, endless):
    job, folder = endless()
    if moment == "training":
        processes_ = begun(folder, job)
    else:
        while len(processes_ := children(job.pid)) < 2:
            assert job.poll() is None
    job.kill()
    job.wait()
    deadline = time.monotonic() + 40
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in processes_):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if moment == "training":
        assert run.newest_checkpoint(folder).path.name == "last.ckpt"


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_training(endless):
    job, folder = endless("process_timeout=00:00:00:05")
    processes_ = begun(folder, job)
    os.kill(processes_[1], signal.SIGSTOP)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 1, stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("rolldiff: "))
    assert "process_timeout" in line
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes_)


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    def line(*overrides, limit=None):
        def limited():
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = subprocess.run(
            [*COMMAND, *TINY, TWO, *overrides],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=limited,
        )
        assert "Traceback" not in done.stderr, done.stderr
        (found,) = (row for row in done.stderr.splitlines() if row.startswith("rolldiff: "))
        return done.returncode, found

    status, text = line("batch_size=7", "run_dir=deep/run")
    assert status == 2
    assert "batch_size must be a multiple of the 2 processes" in text
    assert not list(tmp_path.iterdir())
    status, text = line("nn.heads=5")
    assert status == 2
    assert "heads" in text
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "runs").iterdir())
    status, text = line("run_dir=full", limit=20_000)
    assert status == 1
    assert "full" in text


@pytest.mark.parametrize("size", [1, 3])
def test_errors_are_heard_by_all(size, monkeypatch):
    """Without other processes; what three say is put into their mouths."""

    def all_gather(texts, text, group):
        texts[:] = [text, None, "no disk"]

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    group = Processes(rank=0, size=size)

    def fail():
        raise UsageError("mine")

    with pytest.raises(UsageError, match="mine"):
        group.together(fail)
    if size == 1:
        assert group.together(lambda: 3) == group.on_main(lambda: 3) == 3
    else:
        with pytest.raises(OtherProcessError, match="process 2: no disk"):
            group.together(lambda: 3)


def shares(number):
    with processes() as group:
        values = group.gather([number * i for i in group.shard(5)])
        largest = group.largest(group.rank)
        if number < 0 and group.rank == 1:
            raise UsageError("number must be 0 or more")
        return values, largest, group.broadcast(group.rank)


def killed_after_its_end(number):
    with processes() as group:
        if group.rank == 1:  # called when the process has sent its result
            ask = (os.getpid(), signal.SIGKILL)
            multiprocessing.util.Finalize(None, os.kill, args=ask, exitpriority=1)
        return number


@pytest.mark.slow
def test_started_processes_return_and_raise():
    assert start(killed_after_its_end, 1, count=2) == 1  # all had been done
    assert start(shares, 2, count=3) == ([0, 2, 4, 6, 8], 2, 0)
    with pytest.raises(UsageError, match="number must be 0 or more"):
        start(shares, -1, count=2)


# SLURM


@pytest.mark.slow
def test_slurm_queues_a_training_again_before_its_end(one, tmp_path):
    """Asked by SIGUSR1; the same command goes on with the run of the same job."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [*COMMAND, *TINY, "max_steps=500", "callbacks.samples=null", TWO]
    folder = tmp_path / "runs/slurm-77"

    def started(restarts):
        environment = os.environ | job | {"SLURM_RESTART_COUNT": str(restarts)}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE
        )

    with started(0) as first:
        begun(folder, first)
        first.send_signal(signal.SIGUSR1)
        first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert 5 <= run.newest_checkpoint(folder).step < 500
    for restarts in (1, 2):
        with started(restarts) as again:
            printed, _ = again.communicate(timeout=300)
        assert again.returncode == 0
        assert ("finished before" in printed) == (restarts == 2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["slurm-77"]
    assert len(column(folder)) == 500
    assert_same(folder, one("max_steps=500", "callbacks.samples=null"), rtol=1e-3, atol=1e-4)


def test_a_job_that_had_no_checkpoint_yet_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("max_steps: 20\n")
    (folder / "logs").mkdir()
    quick = ["max_steps=2", "callbacks.samples=null", f"run_dir={folder}", "trainer.devices=1"]
    with pytest.raises(UsageError, match="run_dir must be a new or an empty folder"):
        train(config(*quick))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (folder / ".slurm").write_text("77")
    with pytest.raises(UsageError, match="run_dir must be a new or an empty folder"):
        train(config(*quick))  # another job's
    assert (folder / "logs").is_dir()
    (folder / ".slurm").write_text("78")
    assert train(config(*quick)).steps == 2
    assert train(config(*quick)).report.table == "finished before"


STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}


def test_what_slurm_says_of_a_task(monkeypatch):
    assert slurm.job() is None
    assert not slurm.is_task()
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert slurm.is_task()
    monkeypatch.delenv("SLURM_STEP_ID")  # the script of a batch job
    assert not slurm.is_task()
    assert slurm.task_environment(STEP) == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "17345",
    }
    with pytest.raises(UsageError, match="got 15 tasks on 2 nodes; say --ntasks-per-node"):
        slurm.task_environment(STEP | {"SLURM_STEP_NUM_TASKS": "15"})
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert slurm.job() == "9_4"
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="not queued again: scontrol requeue 9_4: No such file"):
        slurm.requeue()
