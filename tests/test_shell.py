"""A printed command does what it says, whatever its paths are called."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rolldiff.shell import command_line, setting

# Any text that can be an argument; lone surrogates cannot be printed.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
HARD = st.lists(st.sampled_from([*"a1 '\"\\()[],=:;#~!*&|<>%@\t\n$}é", "${"])).map("".join)


def read(line):
    """The settings that a shell and Hydra make of a line."""
    program, command, *words = shlex.split(line)
    assert (program, command) == ("rolldiff", "decode")
    overrides = OverridesParser.create().parse_overrides(words)
    found = {override.key_or_group: override.value() for override in overrides}
    return OmegaConf.to_container(OmegaConf.create(found), resolve=True)


@given(TEXT | HARD)
@example("my run/o'clock [1,2]=a")
@example("\\")
@example("\\'")
@example("\\\\${a}\\")
@example("\\\n")
@example("null")
@example("1e5")
@example("été")
@example("..")
def test_any_text_survives_the_shell_and_hydra(text):
    assert read(command_line("decode", {"ckpt": text, "out": [text]})) == {
        "ckpt": text,
        "out": [text],
    }


@pytest.mark.parametrize(
    "value", [0, 0.5, 1e-5, True, None, [1, 2.5], ["a b", "true"], []], ids=str
)
def test_other_values_keep_their_type(value):
    found = read(command_line("decode", {"value": value}))["value"]
    assert (found, type(found)) == (value, type(value))


def test_plain_values_stay_plain():
    settings = {"ckpt": Path("runs/2026-01-02_03-04-05"), "num_groups": 4, "out": "images.png"}
    line = "rolldiff decode ckpt=runs/2026-01-02_03-04-05 num_groups=4 out=images.png"
    assert command_line("decode", settings) == line
    assert setting("time_limit", "00:01:00") == "time_limit='00:01:00'"
