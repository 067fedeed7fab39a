"""The cards run, and what the README says of them is what they printed."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import engine  # noqa: E402
import engine_card  # noqa: E402

CARD = json.loads((ROOT / "benchmarks/results/engine-cpu.json").read_text(encoding="utf-8"))


def test_the_card_of_the_engine_is_complete():
    for key in engine_card.REACH:
        low, high = CARD["spread"][key]
        assert low <= CARD[key] <= high
    assert {"device", "threads", "torch", "commit"} <= set(CARD["machine"])
    assert CARD["sizes"]["side"] == engine.Sizes().side, "not the quick one"


def test_the_readme_holds_the_table_of_the_card():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert engine_card.markdown(CARD) in readme


@pytest.mark.slow
def test_the_card_of_the_engine_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "card.json"
    monkeypatch.setattr(sys, "argv", ["engine.py", "--quick", "--json", "--out", str(out)])
    engine.main()
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == written
    assert set(engine_card.REACH) <= set(written)
    assert written["max_relative_difference"] < 1e-5
    assert all(math.isfinite(written[key]) for key in engine_card.REACH)
    grouped = [row for row in written["table"] if row["cache"] and row["overlap"] == 0]
    assert [row["nfe"] for row in grouped] == [2 * row["num_groups"] for row in grouped]
