import pytest

from rolldiff import progress as module
from rolldiff.progress import ProgressLog, progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_line_per_tenth_or_half_minute(clock, capsys):
    log = ProgressLog("training", 1000)
    for done in range(1, 1001):
        clock.now = 0.5 * done  # a tenth takes 50 s
        log.update(done, lambda: "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 60/1000 (6 %), 30 s, loss 1"
    assert lines[-1] == "training: 1000/1000 (100 %), 500 s, loss 1"
    assert len(lines) == 17


def test_fast_loops_print_little(clock, capsys):
    log = ProgressLog("training", 1000)
    for done in range(1, 1001):
        clock.now = 0.003 * done
        log.update(done)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_resumed_loop_counts_from_where_it_was(clock, capsys):
    log = ProgressLog("training", 10, done=9)
    log.update(9)
    assert capsys.readouterr().err == ""
    clock.now = 2.0
    log.update(10)
    assert capsys.readouterr().err == "training: 10/10 (100 %), 2 s\n"


@pytest.mark.parametrize("items", [[3, 1, 2], iter([3, 1, 2])], ids=["list", "iterator"])
def test_items_pass_through_unchanged(items, capsys):
    assert list(progress(items, "measuring")) == [3, 1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\r" not in printed.err


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), "measuring", unit="setting")) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err
