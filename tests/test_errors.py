import math

import numpy as np
import pytest
import torch

from rolldiff.errors import (
    UsageError,
    boolean,
    finite_number,
    known_names,
    reason,
    whole_number,
    whole_numbers,
)


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


@pytest.mark.parametrize(
    "value", [np.array("3"), np.complex64(1), np.array([0.5]), torch.tensor(1j), np.array(True)]
)
def test_what_numpy_would_turn_into_a_number(value):
    with pytest.raises(UsageError, match="^overlap must be a finite number, got "):
        finite_number(value, "overlap")


@pytest.mark.parametrize("value", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2])])
def test_sequences_of_whole_numbers(value):
    assert whole_numbers(value, "levels") == (1, 2)
    assert all(type(number) is int for number in whole_numbers(value, "levels"))


@pytest.mark.parametrize(
    "value", [3, "12", {1, 2}, {1: 2}, None, b"12", np.ones((2, 2), int), iter([1]), np.array(1)]
)
def test_what_is_no_sequence(value):
    with pytest.raises(UsageError, match="^levels must be a sequence of whole numbers, got "):
        whole_numbers(value, "levels")


@pytest.mark.parametrize("value", [[1, 2.0], [True], ["1"], np.array([1.0]), [0], [None]])
def test_sequences_of_other_things(value):
    with pytest.raises(UsageError, match="^each of levels must be a whole number"):
        whole_numbers(value, "levels")


def test_true_and_false():
    assert boolean(np.True_, "cache") is True
    assert boolean(torch.tensor(False), "cache") is False
    for value in (1, 0, "True", None, [True], torch.ones(2, dtype=torch.bool)):
        with pytest.raises(UsageError, match="^cache must be True or False, got "):
            boolean(value, "cache")


def test_a_near_name_is_suggested():
    known_names(["steps"], ["steps", "order"], "arguments")
    with pytest.raises(UsageError, match="among steps, order, got 'step'; did you mean steps"):
        known_names(["step"], ["steps", "order"], "arguments")


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(UsageError("a\nb   c\n")) == "a b c"


def test_a_long_value_is_shortened():
    with pytest.raises(UsageError) as error:
        whole_number("x" * 1000, "steps")
    assert len(str(error.value)) < 200
