"""Every snippet and command of the README runs."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from checkouts import COMMANDS, PYTHON, shell
from PIL import Image
from test_cli import TINY, rolldiff

CHAIN = (
    "rolldiff train experiment=tokenizer",
    "rolldiff train experiment=prior",
    "rolldiff generate",
)


@pytest.mark.parametrize("code", PYTHON)
def test_python(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_commands_are_known():
    """What is printed as a command is run here, below, or by the gate."""
    kinds = (
        "pip install -c constraints",
        "rolldiff decode ckpt=RUN ",
        "rolldiff bench ckpt=RUN",
        "rolldiff train -m ",
        "rolldiff train data=folder ",
        "rolldiff train experiment=photo_tokenizer ",
        "rolldiff reconstruct ",
        "rolldiff serve ckpt=RUN ",
        *CHAIN,
    )
    assert COMMANDS
    for command in COMMANDS:
        assert command.startswith(kinds) or command == ".ci/run", command


@pytest.mark.slow
def test_decode_commands(tmp_path):
    assert rolldiff("train", *TINY, "run_dir=RUN", cwd=tmp_path).returncode == 0
    for command in COMMANDS:
        if command.startswith("rolldiff decode"):
            done = rolldiff(*command.split()[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert (tmp_path / re.search(r"out=(\S+)", command)[1]).stat().st_size


@pytest.mark.slow
def test_chain_commands(tmp_path):
    short = ["max_steps=10", "report.samples=40", "report.steps=1"]
    for start in CHAIN:
        (command,) = (c for c in COMMANDS if c.startswith(start))
        more = short if "train" in start else ["steps=1"]
        done = rolldiff(*command.split()[1:], *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "stream.gif").stat().st_size


@pytest.mark.slow
def test_photo_commands(tmp_path):
    pytest.importorskip("skimage")
    Image.new("RGB", (200, 130), "orange").save(tmp_path / "FILE", "PNG")
    (train,) = (c for c in COMMANDS if c.startswith("rolldiff train experiment=photo_tokenizer"))
    (show,) = (c for c in COMMANDS if c.startswith("rolldiff reconstruct"))
    short = ["max_steps=2", "batch_size=4", "report.samples=4", "data.crops=200", "nn.depth=1"]
    done = rolldiff(*train.split()[1:], *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = rolldiff(*show.split()[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "beyond" not in done.stderr  # the printed settings are those of the training
    assert "200 x 130 pixels" in done.stdout
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.size, film.n_frames) == ((200, 130), 5)


@pytest.mark.slow
def test_bench_commands(tmp_path):
    assert rolldiff("train", *TINY, "run_dir=RUN", cwd=tmp_path).returncode == 0
    short = ["bench.samples=40", "bench.seeds=[0]", "bench.features=[pixels]", "bench.steps=[2]"]
    for number, command in enumerate(c for c in COMMANDS if c.startswith("rolldiff bench")):
        done = rolldiff(*command.split()[1:], *short, f"run_dir=bench{number}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"bench{number}/report.md").stat().st_size
    assert number == 1


@pytest.mark.slow
def test_sweep_command(tmp_path):
    (command,) = (c for c in COMMANDS if c.startswith("rolldiff train -m"))
    quick = [a for a in command.split()[1:] if not a.startswith("max_steps")]
    done = rolldiff(*quick, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*-sweep/*/summary.json"))) == 2


@pytest.mark.slow
def test_photographs_command(tmp_path):
    (command,) = (c for c in COMMANDS if c.startswith("rolldiff train data=folder"))
    for name in ("cat", "dog"):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("RGB", (90, 60 + number), (name == "cat" and "red") or "blue")
            picture.save(tmp_path / "PHOTOS" / name / f"{number}.jpg")
    done = rolldiff(*command.split()[1:], *TINY, "run_dir=RUN", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = rolldiff("decode", "ckpt=RUN", "label=dog", "steps=1", "num_images=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_first_command_as_printed(default_training):
    """A fresh copy, a new environment, the whole default training."""
    run, printed = default_training
    names = {path.name for path in run.iterdir()}
    assert names >= {"last.ckpt", "samples.png", "stream.gif", "summary.json"}
    found = dict(re.findall(r"^ +(\d+) +([\d.]+)$", printed, re.MULTILINE))
    # Twice what two idle cores reach in the time, and more if this machine was so busy that it saw
    # fewer images: at 120,000 the distances are about 0.95.
    seen = json.loads((run / "summary.json").read_text())["images_seen"]
    slack = max(1, 200_000 / seen) ** 2
    assert all(float(found[g]) < 0.8 * slack for g in ("1", "2", "4", "8")), printed
    assert float(found["16"]) < 1.2 * slack


@pytest.mark.slow
def test_the_packages_are_whole(checkout):
    """Wheel and source: what an index accepts, and what a bare environment needs to decode."""
    source = checkout / "checkout"
    build = (
        "pip install -q build twine && python -m build -o ../dist && twine check --strict ../dist/*"
    )
    done = shell(build, checkout, source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("PASSED") == 2
    (wheel,) = (checkout / "dist").glob("*.whl")
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    assert "rolldiff/conf/experiment/digits.yaml" in zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"conf/train.yaml", "tests/conftest.py", "docs/index.md", "constraints.txt"}

    bare = checkout / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare / "venv"], check=True)
    constrained = f"-c {source}/constraints.txt"
    done = shell(f"pip install -q {constrained} {wheel}", bare, bare)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(
        [bare / "venv/bin/python", "-W", "error", "-c", PYTHON[0]],
        cwd=bare,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    done = shell("rolldiff train --cfg job", bare, bare)
    assert done.returncode == 2, done.stderr
    assert "rolldiff[train]" in done.stderr
    command = f"pip install -q {constrained} '{wheel}[train]' && rolldiff train --cfg job"
    done = shell(command, bare, bare)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rolldiff.Decoder" in done.stdout
