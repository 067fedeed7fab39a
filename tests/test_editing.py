"""Images drawn anew in part: what is kept stays, and what is drawn depends on it."""

import pytest
import torch

from rolldiff import Decoder, Guidance, Heun, Training

ASK = {"steps": 3, "seed": 0}


def image(count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1


def hole(*where):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[where] = True
    return mask


HOLES = {
    "a corner": hole(slice(0, 4), slice(0, 2)),
    "below": hole(slice(4, 8)),
    "one pixel": hole(3, 5),
    "all": hole(slice(0, 8)),
}


@pytest.mark.parametrize("mask", HOLES.values(), ids=HOLES)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_known_pixels_come_back(make, mask, num_groups):
    decoder = make(dtype=torch.float64)
    if num_groups > 1 and mask.sum() == 1:
        return
    found = decoder.inpaint(image(), mask, [1, 2], num_groups=num_groups, **ASK).image
    assert torch.equal(found[..., ~mask], image().double()[..., ~mask])
    assert (found[..., mask] != image().double()[..., mask]).all()


def test_a_mask_of_everything_is_a_decode(make):
    decoder = make()
    for step in (None, Heun()):
        ask = ASK | {"num_groups": 4, "overlap": 0.5} | ({"step": step} if step else {})
        found = decoder.inpaint(image(), HOLES["all"], [1, 2], **ask).image
        assert torch.equal(found, decoder.decode([1, 2], **ask).image)


def test_rows_below_are_drawn_as_after_a_decode(make):
    """The lower half, given the upper half of a decode, is the lower half of that decode."""
    decoder = make(dtype=torch.float64)
    whole = decoder.decode([1, 2], num_groups=2, **ASK).image
    found = decoder.regenerate(whole, (4, 8), [1, 2], **ASK).image
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_rows_above_are_drawn_as_after_a_decode_from_below(make):
    decoder = make(dtype=torch.float64)
    ask = ASK | {"order": "bottom_to_top"}
    whole = decoder.decode([1, 2], num_groups=2, **ask).image
    found = decoder.regenerate(whole, (0, 4), [1, 2], **ask).image
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_drawn_depends_on_what_is_kept(make, causal):
    decoder = make(causal=causal)
    mask = HOLES["a corner"]
    other = image()
    other[..., 7, 7] += 0.5
    found = [decoder.inpaint(x, mask, [1, 2], **ASK).image for x in (image(), other)]
    assert not torch.allclose(found[0][..., mask], found[1][..., mask])


def test_kept_tokens_are_shown_once(make):
    cost = make().inpaint(image(), HOLES["below"], [1, 2], num_groups=2, steps=4, seed=0).cost
    # Eight kept tokens and four finished ones written, eight drawn in four steps.
    assert (cost.nfe, cost.tokens) == (8, 8 + 4 + 8 * 4)


def test_orders_that_were_not_trained_are_told():
    torch.manual_seed(0)
    ask = {"image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 1}
    decoder = Decoder.build(**ask, training=Training((1, 2)))
    with pytest.warns(UserWarning, match="what is known comes first"):
        decoder.inpaint(image(), HOLES["a corner"], **ASK)
    decoder.inpaint(image(), HOLES["below"], **ASK)  # the upper rows come first anyway


def test_variations_keep_the_noise_of_other_groups(make):
    decoder = make(dtype=torch.float64, prediction="velocity")
    ask = {"num_groups": 4, "steps": 4, "seed": 0, "iterations": 40}
    whole = decoder.decode([1, 2], num_groups=4, steps=4, seed=5).image
    same = decoder.variations(whole, [], [1, 2], **ask).image
    torch.testing.assert_close(same, whole, rtol=1e-6, atol=1e-6)
    found = decoder.layout.tokens(decoder.variations(whole, [1], [1, 2], **ask).image)
    before = decoder.layout.tokens(whole)
    torch.testing.assert_close(found[:, :4], before[:, :4], rtol=1e-6, atol=1e-6)
    moved = (found - before).abs().mean((0, 2)).view(4, 4).mean(1)
    # New noise changes its own group most; the others follow it, with their own noise.
    assert moved[1] > 5 * moved[2] > 0
    assert moved[1] > 5 * moved[3] > 0


def test_a_variation_of_every_group_is_a_decode(make):
    decoder = make(dtype=torch.float64)
    found = decoder.variations(image(), range(4), [1, 2], num_groups=4, **ASK).image
    assert torch.equal(found, decoder.decode([1, 2], num_groups=4, **ASK).image)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(make):
    decoder = make()
    with pytest.raises(ValueError, match="groups must be in 0 … 3"):
        decoder.variations(image(), [4], num_groups=4)
    with pytest.raises(ValueError, match="iterations"):
        decoder.variations(image(), [0], num_groups=4, iterations=0)
    for mask in (torch.zeros(8, 7, dtype=torch.bool), torch.ones(8, 8)):
        with pytest.raises(ValueError, match="mask must have shape"):
            decoder.inpaint(image(), mask, **ASK)
    with pytest.raises(ValueError, match="True somewhere"):
        decoder.inpaint(image(), torch.zeros(8, 8, dtype=torch.bool), **ASK)
    with pytest.raises(ValueError, match="num_groups"):
        decoder.inpaint(image(), HOLES["one pixel"], num_groups=2, **ASK)
    with pytest.raises(ValueError, match="rows must be"):
        decoder.regenerate(image(), (4, 9), **ASK)
    with pytest.raises(ValueError, match="image"):
        decoder.inpaint(image()[:, :, :4], HOLES["below"], **ASK)


def test_guidance_by_group_and_time(make):
    decoder = make(dtype=torch.float64)
    ask = ASK | {"num_groups": 4, "steps": 4}

    def drawn(guidance):
        return decoder.layout.tokens(decoder.decode([1, 2], guidance=guidance, **ask).image)

    plain, full = drawn(0.0), drawn(2.0)
    assert torch.equal(drawn(Guidance(2.0)), full)
    rising = drawn(Guidance(2.0, first=0.0))
    torch.testing.assert_close(rising[:, :4], plain[:, :4], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(rising[:, 4:8], plain[:, 4:8])
    # The first of four steps is at t = 1, the last at t = 1/4.
    torch.testing.assert_close(drawn(Guidance(2.0, interval=(0.0, 0.2))), plain)
    torch.testing.assert_close(drawn(Guidance(2.0, interval=(0.2, 1.0))), full)
    early = drawn(Guidance(2.0, interval=(0.8, 1.0)))
    assert not torch.allclose(early, plain)
    assert not torch.allclose(early, full)
    for wrong in ({"interval": (0.5, 0.2)}, {"interval": (0.0, 1.5)}, {"first": float("nan")}):
        with pytest.raises(ValueError, match=r"must be"):
            Guidance(1.0, **wrong)
