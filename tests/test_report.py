import pytest
import torch

from rolldiff.evaluation.report import DecoderReport


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
