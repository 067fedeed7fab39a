"""One thread: on a busy machine two threads of small operations wait for each other."""

import json
import os
import shutil

import pytest
import torch
from checkouts import COMMANDS, check_out, shell
from filelock import FileLock
from hypothesis import settings
from jaxtyping import config

from rolldiff import Decoder, Training

torch.set_num_threads(1)
settings.register_profile("rolldiff", deadline=None, derandomize=True)
settings.load_profile("rolldiff")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Fills a folder in one of the processes that run the tests; each gets a copy of its own."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def filled(name, fill):
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                # Under another name while it is filled: an error leaves nothing to be copied.
                part = root / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                fill(part)
                part.rename(root / name)
        return shutil.copytree(root / name, tmp_path_factory.mktemp(name) / "copy")

    return filled


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A clean copy of what git tracks, and a new environment."""
    return check_out(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="session")
def default_training(checkout):
    """The run that the README's first command makes in about five minutes, and what it prints."""
    done = shell(COMMANDS[0], checkout, checkout / "checkout")
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (checkout / "checkout/runs").iterdir()
    return run, done.stdout


@pytest.fixture(scope="session")
def digits_run(checkout, default_training):
    """A run of the whole default training, also where its time did not suffice for it."""
    run, _ = default_training
    if json.loads((run / "summary.json").read_text())["images_seen"] == 320_000:
        return run
    # Two threads on a busy machine wait for each other; one does not.
    command = f"OMP_NUM_THREADS=1 rolldiff train max_time=null run_dir={checkout / 'whole'}"
    done = shell(command, checkout, checkout)
    assert done.returncode == 0, done.stderr[-2000:]
    return checkout / "whole"


@pytest.fixture
def make():
    """Decoders of 8 x 8 pixels with random weights, the zero-initialised ones too."""

    def build(*, dtype=torch.float32, patch=2, seed=0, **arguments):
        torch.manual_seed(seed)
        arguments = {"width": 32, "depth": 2, "heads": 2, "num_classes": 10} | arguments
        num_tokens = (8 // patch) ** 2
        training = Training(
            num_groups=tuple(range(1, num_tokens + 1)), orders=("top_to_bottom", "random:0")
        )
        decoder = Decoder.build(
            image_size=8, channels=1, patch=patch, training=training, **arguments
        )
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        return decoder.to(dtype)

    return build


@pytest.fixture
def unchecked():
    """Lets values of a wrong type through to the errors that users meet."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
