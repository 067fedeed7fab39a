"""Who may see whom: the rule that keeps the distribution, at every overlap."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from oracles import covariance_of, masked_decoder, natural_covariance, squared_frechet
from rolldiff import AdamsBashforth2, Euler, GroupSchedule, Heun, Midpoint, Training
from rolldiff.diffusion.schedule import Visibility
from rolldiff.nn import denoiser

PAIR = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
NATURAL = natural_covariance(4)
SOLVERS = [Euler(), Heun(), Midpoint(), AdamsBashforth2()]


@pytest.fixture
def stricter(monkeypatch):
    """The rule of version 0.1: a token sees its own and earlier groups, moving or not."""
    monkeypatch.setattr(Visibility, "blocks", property(lambda self: self.schedule.group))
    monkeypatch.setattr(denoiser, "_kept_mask", denoiser._mask)

    mask = denoiser.Denoiser.mask
    # Without the short cut for calls in which all see all.
    monkeypatch.setattr(
        denoiser.Denoiser, "mask", lambda self, s, f, n: mask(self, s, s.start + 1, n)
    )


@run_settings(max_examples=60)
@given(
    st.integers(1, 16),
    st.floats(0, 1),
    st.integers(1, 5),
    st.sampled_from(SOLVERS),
    st.sampled_from(["top_to_bottom", "random:0", "centre_out"]),
    st.booleans(),
    st.integers(0, 5),
)
def test_every_call_follows_the_rule(num_groups, overlap, steps, solver, order, cache, num_known):
    decoder = masked_decoder(NATURAL)
    image, mask = torch.zeros(1, 1, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    mask.view(-1)[3 : 3 + num_known] = False
    num_groups = min(num_groups, 16 - num_known)
    ask = {"image": image, "mask": mask} if num_known else {}
    ask |= {"num_groups": num_groups, "overlap": overlap, "steps": steps, "solver": solver}
    decoder.decode(num_images=1, seed=0, order=order, cache=cache, **ask)
    group = GroupSchedule(num_tokens=16, num_groups=num_groups, num_known=num_known).group
    calls = decoder.backbone.calls
    for call, after in zip(calls, [*calls[1:], None], strict=True):
        n, m = call.sees.shape
        finished = call.t == 0
        queries = slice(m - n, m)
        earlier = group[queries, None] >= group[:m]
        expected = torch.where(finished[queries, None], finished & earlier, True)
        assert torch.equal(call.sees, expected)
        # No waiting token: one at time 1 moves in this step.
        if after is not None and len(after.t) >= m and solver.nfe_per_step == 1:
            assert (after.t[:m] < 1).all()
        if not finished[queries].any():
            assert call.mask is None, "a call without a group to write carries no mask"


def exactly(num_groups, overlap, steps=400, **settings):
    made = covariance_of(
        masked_decoder(NATURAL), num_groups=num_groups, overlap=overlap, steps=steps, **settings
    )
    return squared_frechet(NATURAL, made)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75, 1.0])
def test_two_tokens_keep_their_correlation(overlap):
    made = covariance_of(
        masked_decoder(PAIR), num_groups=2, overlap=overlap, steps=200, solver=Heun()
    )
    torch.testing.assert_close(made, PAIR, rtol=0, atol=1e-3)


QUICK = [(2, "top_to_bottom"), (4, "random:0"), (8, "centre_out")]
PAIRS = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in product((2, 4, 8), ("top_to_bottom", "random:0", "centre_out"))
]


def test_the_stricter_rule_loses_correlation(stricter):
    made = covariance_of(masked_decoder(PAIR), num_groups=2, overlap=1.0, steps=200, solver=Heun())
    assert made[0, 1] < 0.5


@pytest.mark.parametrize(("num_groups", "order"), PAIRS)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75, 1.0])
def test_natural_images_keep_their_distribution(num_groups, overlap, order):
    assert exactly(num_groups, overlap, 100, solver=Heun(), order=order) < 2e-4


@pytest.mark.parametrize(("num_groups", "overlap"), [(2, 0.75), (4, 0.5), (8, 0.5), (8, 1.0)])
def test_the_stricter_rule_does_not(num_groups, overlap, stricter):
    assert exactly(num_groups, overlap, 100, solver=Heun()) > 1e-3


def test_at_overlap_1_any_number_of_groups_is_one_group(make):
    decoder = make()

    @run_settings(max_examples=20)
    @given(st.integers(1, 16), st.integers(1, 5), st.sampled_from(SOLVERS), st.booleans())
    def same(num_groups, steps, solver, cache):
        ask = {"steps": steps, "solver": solver, "seed": 0, "overlap": 1.0, "cache": cache}
        one = decoder.decode([3, 1], **ask)
        many = decoder.decode([3, 1], num_groups=num_groups, **ask)
        assert torch.equal(one.image, many.image)
        assert (one.cost.nfe, one.cost.tokens) == (many.cost.nfe, many.cost.tokens)

    same()


@pytest.mark.parametrize("cache", [True, False])
def test_finished_groups_are_shown_at_the_context_time(cache):
    """Written once, at that time, and scaled to it; no other token has it."""
    decoder = masked_decoder(NATURAL)
    decoder.training_distribution = Training((4,), context_noise=0.1)
    ask = {"num_groups": 4, "overlap": 0.5, "steps": 4, "seed": 0, "context_time": 0.1}
    image = decoder.decode(cache=cache, **ask).image.flatten(1)
    for call in decoder.backbone.calls:
        finished = (call.t == 0.1).sum()
        torch.testing.assert_close(call.x_t[:, :finished], 0.9 * image[:, :finished])
        assert (call.t[:finished] == 0.1).all()
        assert (call.t[finished:] > 0.2).all()
        queries = call.t[-len(call.sees) :] == 0.1
        assert not call.sees[queries][:, finished:].any()
    assert max((call.t == 0.1).sum() for call in decoder.backbone.calls) == 12


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("overlap", [0.0, 0.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_no_later_token_changes_a_finished_group(make, overlap, solver):
    """Noise of tokens that had not started when a group finished leaves it as it is."""
    decoder = make()
    schedule = GroupSchedule(num_tokens=16, num_groups=8, overlap=overlap, steps=5)
    noise = torch.randn(1, 1, 8, 8)
    ask = {"num_groups": 8, "overlap": overlap, "steps": 5, "solver": solver}
    image = decoder.decode(noise=noise, **ask).image
    for g in range(8):
        end = next(i for i in range(100) if schedule.moving(i).start > g)
        unseen = schedule.ends[schedule.moving(end - 1).stop]
        tokens = decoder.layout.tokens(noise).clone()
        tokens[:, unseen:] += 1
        moved = decoder.decode(noise=decoder.layout.image(tokens), **ask).image
        before, after = (decoder.layout.tokens(x)[0] for x in (image, moved))
        ends = schedule.ends[g + 1]
        torch.testing.assert_close(after[:ends], before[:ends], rtol=1e-5, atol=1e-5)
        if unseen < 16:
            assert not torch.allclose(after[unseen:], before[unseen:])


def test_decodings_of_equal_settings_share_their_masks():
    decoder = masked_decoder(NATURAL)
    for _ in range(2):
        decoder.decode(num_groups=4, overlap=0.5, steps=4, seed=0)
    masks = [call.mask for call in decoder.backbone.calls]
    half = len(masks) // 2
    assert sum(mask is not None for mask in masks[:half]) == 3
    assert all(a is b for a, b in zip(masks[:half], masks[half:], strict=True))
