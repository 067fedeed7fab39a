import math

import numpy as np
import pytest
import torch

from rolldiff.errors import UsageError, finite_number, reason, whole_number


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such file"), "no such file"),
        (
            RuntimeError("Error(s) for Net:\n\tMissing key(s): a"),
            "Error(s) for Net: Missing key(s): a",
        ),
        (RuntimeError("x" * 1000), "x" * 200),
        (OSError(), "OSError"),
        (EOFError("\n"), "EOFError"),
    ],
)
def test_a_reason_is_one_line(error, words):
    assert reason(error) == words


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_any_library(value):
    assert type(whole_number(value, "steps")) is int
    assert whole_number(value, "steps") == 3
    assert finite_number(value, "overlap") == 3.0


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 3.0, np.float32(3), "3", None, torch.zeros(2), 0]
)
def test_what_is_no_whole_number(value):
    with pytest.raises(UsageError, match="^steps must be a whole number of 1 or more, got "):
        whole_number(value, "steps")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_real_numbers_of_any_library(value):
    assert type(finite_number(value, "overlap", minimum=0, maximum=1)) is float


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, True, "1", None, torch.zeros(2), 1.5, 10**400]
)
def test_what_is_no_real_number(value):
    with pytest.raises(UsageError, match=r"^overlap must be a number in \[0, 1\], got "):
        finite_number(value, "overlap", minimum=0, maximum=1)


def test_a_long_value_is_shortened():
    with pytest.raises(UsageError) as error:
        whole_number("x" * 1000, "steps")
    assert len(str(error.value)) < 200
