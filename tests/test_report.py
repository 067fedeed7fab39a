import json
import shlex

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from rolldiff import Decoder, Training
from rolldiff.errors import UsageError
from rolldiff.evaluation.report import DecoderReport, PriorReport, TokenizerReport, _chosen


@pytest.mark.parametrize("num_groups", [[1], [16], [2, 16]])
def test_pictures_of_any_group_counts(make, num_groups, tmp_path):
    image, label = torch.zeros(40, 1, 8, 8), torch.arange(40) % 10
    report = DecoderReport(num_groups=num_groups, steps=1)
    report.pictures(make(), image, label=label, folder=tmp_path, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "stream.gif"}


def test_pictures_of_few_images(make, tmp_path):
    image, label = torch.zeros(7, 1, 8, 8), torch.arange(7) % 3
    report = DecoderReport(num_groups=[2], steps=1)
    report.pictures(make(), image, label=label, folder=tmp_path, seed=0)
    report.pictures(make(num_classes=0), image, label=None, folder=tmp_path, seed=0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_groups": [1, 17]}, "in 1 … 16"),
        ({"num_groups": []}, "num_groups must hold at least one value"),
        ({"steps": 0}, "steps must be"),
        ({"samples": 3}, "samples must be a whole number of 4 or more"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(make, wrong, words):
    DecoderReport(num_groups=[1, 16]).validate(make())
    with pytest.raises(ValueError, match=words):
        DecoderReport(**({"num_groups": [1]} | wrong)).validate(make())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [DecoderReport, TokenizerReport, PriorReport])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (0, True, 1.5, float("nan"), "16", None)),
        *(("samples", value) for value in (3, True, 1e3, float("nan"), None)),
        *(("num_groups", value) for value in (0, True, 1.5, "4", None, [], [0], [2.0], ["4"])),
    ],
    ids=str,
)
def test_settings_are_refused_by_the_name_that_was_typed(kind, name, value):
    others = {PriorReport: {"tokenizer": "somewhere"}}.get(kind, {"num_groups": [1]})
    with pytest.raises(UsageError, match=f"^report.{name} must"):
        kind(**others | {name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [-0.1, 2, float("nan"), "0", None])
def test_an_overlap_is_refused_by_the_name_that_was_typed(value):
    with pytest.raises(UsageError, match=r"^report.overlap must be a number in \[0, 1\]"):
        PriorReport(tokenizer="somewhere", overlap=value)


@pytest.mark.usefixtures("unchecked")
def test_one_group_count_stands_for_a_list_of_it():
    assert DecoderReport(num_groups=4).num_groups == (4,)
    assert DecoderReport(num_groups=[4, 2]).num_groups == (4, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_images_have_no_distance(make, tmp_path, count):
    image, label = torch.rand(count, 1, 8, 8) * 2 - 1, torch.arange(count)
    report = DecoderReport(num_groups=[1, 2], steps=1)
    found = report(make(), image, label=label, folder=tmp_path, seed=0)
    values = json.loads(json.dumps(found.values))
    distances = [*values["fd_pixels"].values(), values["fd_pixels_floor"]]
    assert len(distances) == 3
    if count < 4:
        assert distances == [None] * 3
        assert found.table.count("too few images") == 3
    else:
        assert min(distances) > 0
        assert "too few" not in found.table
    assert " num_groups=2 " in found.try_next


@pytest.mark.parametrize("name", ["run", "my run", "o'clock [1,2]={a}", '"$HOME" ~ été'])
def test_the_next_command_can_be_pasted(make, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    image, label = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    report = DecoderReport(num_groups=[1], steps=1)
    line = report(make(), image, label=label, folder=folder, seed=0).try_next
    _, _, *words = shlex.split(line)
    overrides = OverridesParser.create().parse_overrides(words)
    assert {o.key_or_group: o.value() for o in overrides} == {
        "ckpt": str(folder),
        "num_groups": 1,
        "overlap": 0.5,
        "steps": 16,
        "num_images": 64,
        "out": "images.png",
    }


@pytest.mark.parametrize(
    ("training", "drawn", "printed"),
    [
        (Training(num_groups=(4,), overlap=(0.25, "0.5..0.75")), 0.25, "overlap=0.5 "),
        (Training(num_groups=(4,), overlap=(0.0, "0.1..0.2")), 0.0, "overlap=0.2 "),
        (Training(num_groups=(4,), overlap=(0.8,), orders=("random:1",)), 0.8, "overlap=0.8 "),
    ],
)
def test_a_report_asks_for_what_was_trained(training, drawn, printed, tmp_path, monkeypatch):
    """Its decodings would warn, and tests turn warnings into errors."""
    decoder = Decoder.build(image_size=8, channels=1, patch=2, training=training, width=16, depth=1)
    seen = []

    def decode(self, cond=None, config=None, **rest):
        seen.append((config.overlap, config.order))
        return real(self, cond, config, **rest)

    real = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", decode)
    image, label = torch.rand(4, 1, 8, 8) * 2 - 1, torch.zeros(4, dtype=torch.long)
    report = DecoderReport(num_groups=[4], steps=1)
    line = report(decoder, image, label=label, folder=tmp_path, seed=0).try_next
    assert set(seen) == {(drawn, training.orders[0])}
    assert printed in line
    assert ("random:1" in line) == (training.orders[0] == "random:1")


def test_pictures_show_random_images_of_all_classes():
    label = torch.arange(3).repeat_interleave(100)
    shown = _chosen(label, 300, count=20, seed=0)
    assert label[shown].bincount().tolist() == [7, 7, 6]
    assert len(shown.unique()) == 20
    assert len(set(range(7)) & set(shown.tolist())) < 7, "not the first ones"
    assert not torch.equal(shown, _chosen(label, 300, count=20, seed=1))
    assert torch.equal(shown, _chosen(label, 300, count=20, seed=0))
    unlabelled = _chosen(None, 300, count=20, seed=0)
    assert len(label[unlabelled].unique()) == 3
    many = _chosen(torch.arange(300), 300, count=20, seed=0)
    assert many.max() > 100, "more classes than pictures: not the first classes"
    few = _chosen(torch.tensor([5, 5, 2]), 3, count=8, seed=0).tolist()
    assert few[::2] == [2] * 4
    assert {few[1], few[3]} == {0, 1}


def test_counts_that_are_drawn_more_often_are_reported_once():
    assert DecoderReport(num_groups=[1, 1, 4, 1]).num_groups == (1, 4)
