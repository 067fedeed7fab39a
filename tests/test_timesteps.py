"""The samplers of local times, and the distribution of everything that training draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import DecodeConfig, Decoder, GroupSchedule, Patches, Training
from rolldiff.diffusion.schedule import decode_order
from rolldiff.diffusion.timesteps import (
    CleanContext,
    Independent,
    LogitNormal,
    Mixture,
    OnSchedule,
    Shared,
    Uniform,
)

COORDS = Patches(4, channels=1).coords
GROUPS = torch.tensor([1, 2, 4] * 300)


def draw(law, seed=0, groups=GROUPS, width=4):
    return law.sample(groups, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("law", [Independent(), Shared(), CleanContext(), OnSchedule()], ids=repr)
def test_range_shape_and_seed(law):
    t = draw(law)
    assert t.shape == (900, 4)
    assert t.min() >= 0
    assert t.max() <= 1
    assert torch.equal(t, draw(law))
    assert not torch.equal(t, draw(law, seed=1))


@given(st.integers(1, 50), st.integers(0, 5))
def test_stratified_over_the_batch(batch, seed):
    t = draw(Independent(), seed, torch.ones(batch, dtype=torch.long), 3)
    strata = (t * batch).floor().long().clamp(max=batch - 1)
    assert (strata.sort(dim=0).values == torch.arange(batch)[:, None]).all()


def test_independent_columns_are_uncorrelated():
    t = draw(Independent(), groups=torch.full((4000,), 4))
    correlation = torch.corrcoef(t.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_shared_is_one_time():
    t = draw(Shared())
    assert (t == t[:, :1]).all()


def test_clean_context_is_clean_before_a_random_group_and_noisy_from_it_on():
    groups = torch.full((4000,), 4)
    t = draw(CleanContext(), groups=groups)
    first = (t == 0).sum(1)
    assert ((t > 0) == (torch.arange(4) >= first[:, None])).all()
    counts = first.bincount(minlength=4)
    assert len(counts) == 4, "the last group is never clean"
    assert (counts - 1000).abs().max() < 5  # stratified


def test_on_schedule_meets_what_decoding_shows():
    t = draw(OnSchedule(0.0, 0.0))
    moving = ((t > 0) & (t < 1)).sum(1)
    assert (moving <= 1).all(), "at overlap 0 one group moves"
    assert (t.diff(dim=1) >= 0).all(), "earlier groups are further"
    assert (draw(OnSchedule(1.0, 1.0))[2::3].diff(dim=1) == 0).all(), "at overlap 1 all together"


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(), LogitNormal(-1.0, 0.5)], ids=repr)
def test_quantiles_agree_with_their_law(density):
    u = torch.linspace(0.001, 0.999, 999)
    t = density.quantile(u)
    assert (t.diff() > 0).all()
    assert ((t > 0) & (t < 1)).all()
    if isinstance(density, LogitNormal):
        logit = torch.logit(t.double())
        assert abs(logit.mean() - density.mean) < 0.01
        assert abs(logit.std() - density.std) < 0.02


def test_mixture_draws_in_proportion_and_keeps_rows_whole():
    law = Mixture((Shared(), CleanContext()), (3.0, 1.0))
    t = draw(law, groups=torch.full((4000,), 4))
    shared = (t == t[:, :1]).all(1)
    assert abs(int(shared.sum()) - 3000) <= 1
    assert law.overlaps == (0.0, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture((), ()),
        lambda: Mixture((Shared(),), (1.0, 1.0)),
        lambda: Mixture((Shared(),), (0.0,)),
        lambda: Mixture((Shared(),), (float("nan"),)),
        lambda: OnSchedule(0.5, 0.2),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_laws(make):
    with pytest.raises(ValueError, match="weights|min_overlap"):
        make()


def test_tables_hold_every_order_and_count():
    training = Training(num_groups=(1, 3), orders=("bottom_to_top", list(range(16))))
    orders, groups = training.tables(COORDS)
    assert torch.equal(orders[0], decode_order("bottom_to_top", COORDS))
    assert torch.equal(orders[1], torch.arange(16))
    assert torch.equal(groups[1], GroupSchedule(num_tokens=16, num_groups=3).group)


def test_every_example_draws_its_own_settings():
    training = Training(num_groups=(1, 2, 4), orders=("top_to_bottom", "bottom_to_top"))
    tables = training.tables(COORDS)
    drawn = training.sample(3000, tables, torch.Generator().manual_seed(0))
    num_groups = drawn.group.amax(1) + 1
    counts = num_groups.bincount(minlength=5).double()[[1, 2, 4]]
    # Standard error of a third of 3000: 25.8; four of them.
    assert (counts - 1000).abs().max() < 104
    assert abs(int((drawn.order[:, 0] > 0).sum()) - 1500) < 110
    assert drawn.t.shape == (3000, 16)
    together = drawn.group.diff(dim=1) == 0
    assert (drawn.t.diff(dim=1)[together] == 0).all(), "a group has one time"


def test_settings_outside_of_training_are_named():
    training = Training(num_groups=(1, 4), orders=("top_to_bottom",))
    decoder = Decoder.build(image_size=8, channels=1, width=16, heads=1, training=training)

    def unseen(num_groups, overlap, order):
        return decoder.unseen(DecodeConfig(num_groups=num_groups, overlap=overlap, order=order))

    assert unseen(4, 0.5, "top_to_bottom") == []
    assert unseen(1, 0.0, "random:3") == [], "one group has no order"
    assert len(unseen(3, 0.5, "random:3")) == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_groups": ()}, "num_groups"),
        ({"num_groups": (0,)}, "num_groups"),
        ({"orders": ()}, "orders"),
        ({"drop_cond": 1.5}, "drop_cond"),
    ],
)
def test_bad_settings(arguments, word):
    with pytest.raises(ValueError, match=word):
        Training(**arguments)


def test_settings_that_do_not_fit_the_tokens():
    with pytest.raises(ValueError, match="num_groups"):
        Training(num_groups=(17,)).tables(COORDS)
    with pytest.raises(ValueError, match="order"):
        Training(orders=([0, 1],)).tables(COORDS)
