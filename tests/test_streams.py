import pytest
import torch

from rolldiff.streams import Streams


def test_a_sample_has_its_own_stream():
    together = Streams(3, 4).normal(5, 2)
    for i in range(4):
        assert torch.equal(Streams(3, 1, first=i).normal(5, 2)[0], together[i])
    assert len({row.sum().item() for row in together}) == 4
    assert not torch.equal(Streams(4, 4).normal(5, 2), together)


def test_later_draws_are_new_and_reproducible():
    a, b = Streams(0, 2), Streams(0, 2)
    first = a.normal(3)
    assert torch.equal(first, b.normal(3))
    assert not torch.equal(first, a.normal(3))


def test_neighbouring_streams_are_independent_unit_noise():
    draws = Streams(0, 200).normal(500)
    assert abs(draws.mean()) < 4 / 1e5**0.5
    assert abs(draws.var() - 1) < 4 * (2 / 1e5) ** 0.5
    neighbours = (draws[1:] * draws[:-1]).mean()
    assert abs(neighbours) < 4 / 1e5**0.5


def test_no_seed_is_a_new_seed():
    assert not torch.equal(Streams(None, 1).normal(4), Streams(None, 1).normal(4))


@pytest.mark.parametrize(("seed", "first"), [(-1, 0), (0, -1), ("a", 0), (1.5, 0)])
@pytest.mark.usefixtures("unchecked")
def test_bad_seed(seed, first):
    with pytest.raises(ValueError, match="seed"):
        Streams(seed, 1, first=first)
