"""Sweeps: the number that they search by."""

import math
import warnings

import pytest

from rolldiff.cli import main
from rolldiff.errors import UsageError
from rolldiff.objective import check_objective, flat, objective

VALUES = {
    "device": "cpu",
    "seconds": 2,
    "fd_pixels": {"1": 0.5, "4": 0.25, "16": None},
    "psnr": {"1": 20.0, "4": 10.0},
    "few": {"1": None},
}
TINY = ["max_steps=4", "batch_size=8", "nn.width=16", "nn.depth=1", "nn.heads=1"]
TINY += ["report.steps=1", "report.num_groups=[1,2]", "report.samples=40", "progress=false"]
TINY += ["callbacks.samples=null"]


@pytest.fixture
def quiet(monkeypatch):
    """Restores what a command in this process changes."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield


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
