"""Inpainting, inversion and variations: known pixels stay, and the others depend on them."""

import pytest
import torch

from rolldiff import Decoder, Guidance, Heun, Training
from rolldiff.editing import group_mask, invert, row_mask

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
    found = decoder.decode([1, 2], image=image(), mask=mask, num_groups=num_groups, **ASK).image
    assert torch.equal(found[..., ~mask], image().double()[..., ~mask])
    assert (found[..., mask] != image().double()[..., mask]).all()


def test_a_mask_of_everything_is_a_decode(make):
    decoder = make()
    for step in (None, Heun()):
        ask = ASK | {"num_groups": 4, "overlap": 0.5} | ({"solver": step} if step else {})
        found = decoder.decode([1, 2], image=image(), mask=HOLES["all"], **ask).image
        assert torch.equal(found, decoder.decode([1, 2], **ask).image)


def test_rows_below_are_drawn_as_after_a_decode(make):
    """The lower half, given the upper half of a decode, is the lower half of that decode."""
    decoder = make(dtype=torch.float64)
    whole = decoder.decode([1, 2], num_groups=2, **ASK).image
    found = decoder.decode([1, 2], image=whole, mask=row_mask(whole, 4, 8), **ASK).image
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_rows_above_are_drawn_as_after_a_decode_from_below(make):
    decoder = make(dtype=torch.float64)
    ask = ASK | {"order": "bottom_to_top"}
    whole = decoder.decode([1, 2], num_groups=2, **ask).image
    found = decoder.decode([1, 2], image=whole, mask=row_mask(whole, 0, 4), **ask).image
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_drawn_depends_on_what_is_kept(make, causal):
    decoder = make(causal=causal)
    mask = HOLES["a corner"]
    other = image()
    other[..., 7, 7] += 0.5
    found = [decoder.decode([1, 2], image=x, mask=mask, **ASK).image for x in (image(), other)]
    assert not torch.allclose(found[0][..., mask], found[1][..., mask])


def test_kept_tokens_are_shown_once(make):
    cost = (
        make()
        .decode([1, 2], image=image(), mask=HOLES["below"], num_groups=2, steps=4, seed=0)
        .cost
    )
    # Eight kept tokens and four finished ones written, eight drawn in four steps.
    assert (cost.nfe, cost.tokens) == (8, 8 + 4 + 8 * 4)


def test_orders_that_were_not_trained_are_told():
    torch.manual_seed(0)
    ask = {"image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 1}
    decoder = Decoder.build(**ask, training=Training((1, 2)))
    with pytest.warns(UserWarning, match="known tokens come first"):
        decoder.decode(image=image(), mask=HOLES["a corner"], **ASK)
    decoder.decode(image=image(), mask=HOLES["below"], **ASK)  # the upper rows come first anyway


def test_inversion_gives_the_noise_and_the_image_back(make):
    decoder = make(dtype=torch.float64, prediction="velocity")
    ask = {"num_groups": 4, "steps": 4}
    noise = decoder.layout.image(torch.randn(2, 16, 4, dtype=torch.float64))
    whole = decoder.decode([1, 2], noise=noise, **ask).image
    found = invert(decoder, whole, [1, 2], iterations=60, **ask)
    torch.testing.assert_close(found, noise, rtol=1e-6, atol=1e-6)
    again = decoder.decode([1, 2], noise=found, **ask).image
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=1e-6)


def test_variations_keep_the_noise_of_other_groups(make):
    decoder = make(dtype=torch.float64, prediction="velocity")
    ask = {"num_groups": 4, "steps": 4}
    whole = decoder.decode([1, 2], seed=5, **ask).image
    noise = invert(decoder, whole, [1, 2], iterations=40, **ask)
    mask = group_mask(decoder, [1], **ask)
    assert mask.sum() == 16
    fresh = torch.randn(
        whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    varied = decoder.decode([1, 2], noise=torch.where(mask, fresh, noise), **ask).image
    found, before = decoder.layout.tokens(varied), decoder.layout.tokens(whole)
    torch.testing.assert_close(found[:, :4], before[:, :4], rtol=1e-6, atol=1e-6)
    moved = (found - before).abs().mean((0, 2)).view(4, 4).mean(1)
    # New noise changes its own group most; the others follow it, with their own noise.
    assert moved[1] > 5 * moved[2] > 0
    assert moved[1] > 5 * moved[3] > 0


@pytest.mark.parametrize("order", ["top_to_bottom", "random:0"])
def test_inpainting_streams(make, order):
    """Known pixels are final in every frame, and the last frame is the decoded image."""
    decoder, mask = make(), HOLES["below"]
    ask = ASK | {"image": image(), "mask": mask, "num_groups": 2, "order": order}
    frames = list(decoder.stream([1, 2], **ask))
    for frame in frames:
        assert frame.finished[~mask].all()
        assert torch.equal(frame.image[..., ~mask], image()[..., ~mask])
    assert not frames[0].finished.all()
    assert torch.equal(frames[-1].image, decoder.decode([1, 2], **ask).image)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(make):
    decoder = make()
    with pytest.raises(ValueError, match="groups must be in 0 … 3"):
        group_mask(decoder, [4], num_groups=4)
    with pytest.raises(ValueError, match="iterations"):
        invert(decoder, image(), num_groups=4, iterations=0)
    with pytest.raises(ValueError, match="overlap 0"):
        invert(decoder, image(), num_groups=4, overlap=0.5)
    for mask in (torch.zeros(8, 7, dtype=torch.bool), torch.ones(8, 8)):
        with pytest.raises(ValueError, match="mask must have (shape|type)"):
            decoder.decode(image=image(), mask=mask, **ASK)
    with pytest.raises(ValueError, match="True somewhere"):
        decoder.decode(image=image(), mask=torch.zeros(8, 8, dtype=torch.bool), **ASK)
    with pytest.raises(ValueError, match="num_groups"):
        decoder.decode(image=image(), mask=HOLES["one pixel"], num_groups=2, **ASK)
    with pytest.raises(ValueError, match="rows must be"):
        row_mask(image(), 4, 9)
    for lone in ({"image": image()}, {"mask": HOLES["below"]}):
        with pytest.raises(ValueError, match="given together"):
            decoder.decode(**lone, **ASK)
    with pytest.raises(ValueError, match="image"):
        decoder.decode(image=image()[:, :, :4], mask=HOLES["below"], **ASK)


def test_guidance_by_group_and_time(make):
    decoder = make(dtype=torch.float64)
    ask = ASK | {"num_groups": 4, "steps": 4}

    def drawn(guidance):
        return decoder.layout.tokens(decoder.decode([1, 2], guidance=guidance, **ask).image)

    plain, full = drawn(0.0), drawn(2.0)
    assert torch.equal(drawn(Guidance(2.0)), full)
    rising = drawn(Guidance(2.0, ramp_from=0.0))
    torch.testing.assert_close(rising[:, :4], plain[:, :4], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(rising[:, 4:8], plain[:, 4:8])
    # The first of four steps is at t = 1, the last at t = 1/4.
    torch.testing.assert_close(drawn(Guidance(2.0, interval=(0.0, 0.2))), plain)
    torch.testing.assert_close(drawn(Guidance(2.0, interval=(0.2, 1.0))), full)
    early = drawn(Guidance(2.0, interval=(0.8, 1.0)))
    assert not torch.allclose(early, plain)
    assert not torch.allclose(early, full)
    for wrong in ({"interval": (0.5, 0.2)}, {"interval": (0.0, 1.5)}, {"ramp_from": float("nan")}):
        with pytest.raises(ValueError, match=r"must be"):
            Guidance(1.0, **wrong)
