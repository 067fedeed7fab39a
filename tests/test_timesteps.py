"""What training shows: windows of groups, their times, and the settings of a batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import DecodeConfig, Decoder, GroupSchedule, Patches, Training
from rolldiff.diffusion.schedule import decode_order
from rolldiff.diffusion.timesteps import LogitNormal, Uniform, cut

COORDS = Patches(4, channels=1).coords
CPU = torch.device("cpu")


def drawn(batch=64, seed=0, **settings):
    training = Training(**settings)
    groups = training.tables(COORDS)[1]
    return training.sample(batch, groups, torch.Generator().manual_seed(seed))


def generators():
    return (torch.Generator().manual_seed(seed) for seed in range(200))


# Windows


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 5))
def test_windows_are_consecutive_and_as_large_as_a_decoding_has_moving_groups(
    num_groups, lag, seed
):
    windows = cut(num_groups, lag, torch.Generator().manual_seed(seed))
    assert len(windows.window) == num_groups
    assert windows.window[0] == 0
    assert set(windows.window.diff().tolist()) <= {0, 1}
    together = windows.window.diff() == 0
    assert (windows.position.diff()[together] == (0 if lag < 1e-6 else 1)).all()
    assert (windows.position[1:][~together] == 0).all()
    if lag < 1e-6 or num_groups == 1:
        assert not windows.window.any()
        return
    # As many as fit below time 1, or one more where the phase lets it.
    for w, size in enumerate(windows.window.bincount()[:-1].tolist()):
        size += int(windows.position[windows.window == w][0])
        assert size in (math.floor(1 / lag), math.floor(1 / lag) + 1)
        assert (size - 1 + windows.high[w]) * lag <= 1 + 1e-5
        assert (size + windows.low[w]) * lag >= 1 - 1e-5


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("num_groups", [2, 5, 16])
def test_the_states_are_those_of_a_decoding(num_groups, overlap):
    """Each window has times that a row of a fine scheduling matrix has."""
    lag = 1 - overlap
    steps = 200
    schedule = GroupSchedule(num_tokens=16, num_groups=num_groups, overlap=overlap, steps=steps)
    rows = [
        set((row[(row > 0) & (row < 1)] * steps).round().int().tolist()) for row in schedule.matrix
    ]
    for generator in list(generators())[:40]:
        windows = cut(num_groups, lag, generator)
        u = torch.rand(1, num_groups, generator=generator)
        t = windows.times(u, lag)[0]
        assert ((t > 0) & (t < 1)).all()
        for w in range(int(windows.window[-1]) + 1):
            here = (t[windows.window == w] * steps).tolist()
            assert any(
                len(row) == len(here) and all(any(abs(a - b) <= 1.01 for b in row) for a in here)
                for row in rows
            ), here


def test_windows_start_at_every_offset():
    """So that the beginning of a decoding is shown too, where few groups have started."""
    first = [int(cut(8, 0.25, g).position[0]) for g in generators()]
    counts = torch.tensor(first).bincount(minlength=4)
    assert (counts - 50).abs().max() < 4 * (200 * 0.25 * 0.75) ** 0.5


def test_the_number_of_moving_groups_is_as_often_as_in_a_decoding():
    """At lag 0.4, two or three groups move: three for half of the phases."""
    sizes = [cut(40, 0.4, g).window.bincount()[1:-1] for g in generators()]
    share = (torch.cat(sizes) == 3).double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / len(torch.cat(sizes)) ** 0.5


# A batch


def test_range_shape_and_seed():
    draw = drawn(num_groups=(1, 2, 4, 16))
    assert draw.t.shape == (64, 16)
    assert draw.group.shape == (8, 16)
    moving = draw.moving(CPU)
    assert (draw.t[~moving] == 0).all()
    assert ((draw.t[moving] > 0) & (draw.t[moving] < 1)).all()
    assert torch.equal(draw.t, drawn(num_groups=(1, 2, 4, 16)).t)
    assert not torch.equal(draw.t, drawn(num_groups=(1, 2, 4, 16), seed=1).t)


@given(st.integers(1, 50), st.integers(0, 5))
def test_stratified_over_the_batch(batch, seed):
    t = drawn(batch, seed, num_groups=(4,), overlap=(0.0,), clean_context=0.0).t
    strata = (t * batch).floor().long().clamp(max=batch - 1)
    assert (strata.sort(dim=0).values == torch.arange(batch)[:, None]).all()


def test_a_single_group_is_ordinary_diffusion():
    draw = drawn(num_groups=(1,))
    assert (draw.t == draw.t[:, :1]).all()
    assert draw.mask(CPU) is None
    assert draw.moving(CPU).all()
    assert draw.shared


def test_overlap_1_is_ordinary_diffusion_for_any_number_of_groups():
    draw = drawn(num_groups=(2, 4, 16), overlap=(1.0,))
    assert (draw.t == draw.t[:, :1]).all()
    assert draw.mask(CPU) is None


def test_a_time_is_shared_only_if_all_slices_share_theirs():
    for seed in range(50):
        draw = drawn(16, seed, num_groups=(1, 2, 4), overlap=(1.0, "0..1"), slices=2)
        same = bool((draw.t == draw.t[:, :1]).all())
        assert draw.shared == same


def test_overlap_0_is_a_window_for_each_group():
    draw = drawn(num_groups=(2, 4, 16), overlap=(0.0,))
    assert torch.equal(draw.group, draw.window)


def test_independent_times_are_uncorrelated_inside_a_window():
    draw = drawn(4000, num_groups=(4,), overlap=(0.5,), independent=1.0, clean_context=0.0)
    t = draw.t[:, ::4]
    assert (torch.corrcoef(t.T) - torch.eye(4)).abs().max() < 5 / 4000**0.5


def test_scheduled_times_are_a_lag_apart_inside_a_window():
    draw = drawn(400, num_groups=(8,), overlap=(0.75,), independent=0.0, clean_context=0.0)
    t = draw.t[:, ::2].view(8, 50, 8)
    same = (draw.window[:, ::2].diff(dim=1) == 0)[:, None].expand(-1, 50, -1)
    torch.testing.assert_close(t.diff(dim=2)[same], torch.full((int(same.sum()),), 0.25))


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_context_is_clean_before_a_random_window(overlap):
    draws = [
        drawn(8, seed, num_groups=(8,), overlap=(overlap,), clean_context=1.0)
        for seed in range(100)
    ]
    first = []
    for draw in draws:
        for clean, window in zip(draw.clean, draw.window, strict=True):
            number = int(window[~clean][0])
            assert torch.equal(clean, window < number)
            first.append(number / (int(window[-1]) + 1))
    assert abs(sum(first) / len(first) - (0.4375 if overlap == 0 else 0.4)) < 0.03


def test_context_is_shown_with_noise_if_asked():
    draw = drawn(400, num_groups=(4,), overlap=(0.0,), clean_context=1.0, context_noise=0.1)
    moving = draw.moving(CPU)
    context = draw.t[~moving]
    assert 0 < context.min() < 0.01
    assert 0.09 < context.max() < 0.1


def test_who_sees_whom():
    """Clean groups see clean ones up to their own; windows see themselves and all before."""
    draw = drawn(64, num_groups=(2, 4, 8, 16), clean_context=1.0)
    mask = draw.mask(CPU)
    for m in range(8):
        sees = mask[m] == 0
        clean, group, window = draw.clean[m], draw.group[m], draw.window[m]
        for q in range(16):
            if clean[q]:
                assert torch.equal(sees[q], clean & (group <= group[q]))
            else:
                assert torch.equal(sees[q], window <= window[q])


def test_slices_divide_the_batch():
    for batch, slices in [(64, 8), (12, 6), (7, 7), (11, 1), (1, 1)]:
        assert len(drawn(batch, num_groups=(2,)).group) == slices


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


def test_the_density_shapes_the_times():
    draw = drawn(4000, num_groups=(1,), density=LogitNormal(-1.0, 0.5))
    logit = torch.logit(draw.t[:, 0].double())
    assert abs(logit.mean() + 1) < 0.02
    assert abs(logit.std() - 0.5) < 0.02


def test_tables_hold_every_order_and_count():
    training = Training(num_groups=(1, 3), orders=("bottom_to_top", list(range(16))))
    orders, groups = training.tables(COORDS)
    assert torch.equal(orders[0], decode_order("bottom_to_top", COORDS))
    assert torch.equal(orders[1], torch.arange(16))
    assert torch.equal(groups[1], GroupSchedule(num_tokens=16, num_groups=3).group)


def test_every_setting_is_drawn_as_often_as_it_is_listed():
    settings = {"num_groups": (1, 2, 4, 4), "orders": ("top_to_bottom", "bottom_to_top")}
    draw = drawn(3000, slices=3000, overlap=(0.0,), **settings)
    counts = (draw.group.amax(1) + 1).bincount(minlength=5)[[1, 2, 4]]
    assert counts.tolist() == [750, 750, 1500]  # stratified
    assert abs(int(draw.order.sum()) - 1500) < 110
    together = draw.group.diff(dim=1) == 0
    assert (draw.t.diff(dim=1)[together] == 0).all(), "a group has one time"


def test_overlaps_are_those_listed():
    training = Training((2,), overlap=(0.0, "0.25..0.5"))
    assert [training.trains_overlap(o) for o in (0.0, 0.1, 0.25, 0.4, 0.5, 0.6)] == [
        *(True, False, True, True, True, False)
    ]
    assert Training(overlap=(" 0 .. 1.0 ",)).overlap == ("0..1",)


def test_settings_outside_of_training_are_named():
    training = Training(num_groups=(1, 4), orders=("top_to_bottom",))
    decoder = Decoder.build(image_size=8, channels=1, width=16, heads=1, training=training)

    def unseen(num_groups, overlap, order):
        return decoder.unseen(DecodeConfig(num_groups=num_groups, overlap=overlap, order=order))

    assert unseen(4, 0.5, "top_to_bottom") == []
    assert unseen(1, 0.0, "random:3") == [], "one group has no order"
    assert len(unseen(3, 0.5, "random:3")) == 2
    decoder.training_distribution = Training((4,), overlap=(0.0,), context_noise=0.1)
    assert unseen(4, 0.5, "top_to_bottom") == ["overlap 0.5 (trained: 0.0)"]
    config = DecodeConfig(num_groups=4, context_time=0.2)
    assert decoder.unseen(config) == ["context_time 0.2 (trained: context_noise=0.1)"]


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
