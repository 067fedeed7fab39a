"""Corrupted inputs are refused in one line, or accepted because they are right."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faults
import faults_cases

from rolldiff.errors import UsageError

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_no_input_of_a_kind_is_a_fault(kind):
    """No traceback, nothing wrongly accepted or refused, and no hang."""
    counts, found = faults.run([kind], share=0.1)
    assert found == []
    assert counts[kind]["plain error"] > 10
    assert counts[kind]["rightly accepted"] > 0


def test_the_oracle_tells_the_outcomes_apart():
    def usage(message="steps must be 1"):
        raise UsageError(message)

    def fails(error):
        raise error

    cases = {
        "plain error": faults.Case("", usage),
        "rightly accepted": faults.Case("", lambda: 1, "either", lambda result: result == 1),
        "wrongly refused": faults.Case("", usage, "accept"),
        "wrongly accepted": faults.Case("", lambda: 1),
        "bare type error": faults.Case("", lambda: None + 1),
        "traceback": faults.Case("", lambda: fails(ValueError("no UsageError"))),
        "hang": faults.Case("", lambda: fails(faults_cases.Hang())),
    }
    for outcome, case in cases.items():
        assert faults.outcome(case)[0] == outcome
    wrong = faults.Case("", lambda: 2, "either", lambda result: result == 1)
    assert faults.outcome(wrong)[0] == "wrongly accepted"
    assert set(faults.OUTCOMES) == set(cases)


@pytest.mark.parametrize(
    ("said", "found", "same"),
    [
        (True, 1, False),
        (1.0, 1, False),
        (1, 1.0, True),
        (4, [4, 4], True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1, "c": 1}, {"a": 1}, False),
        ([1], [1, 2], False),
        ("1", 1, False),
        (None, 0, False),
    ],
)
def test_what_a_file_says(said, found, same):
    assert faults.within(said, found) is same
