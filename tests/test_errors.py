import pytest

from rolldiff.errors import reason


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
