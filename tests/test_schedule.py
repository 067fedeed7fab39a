"""Orders, groups, and when each group moves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import GroupSchedule, Patches
from rolldiff.diffusion.schedule import decode_order

COORDS = Patches((4, 6), channels=1).coords
NAMED = ["top_to_bottom", "bottom_to_top", "left_to_right", "right_to_left", "centre_out"]
SETTINGS = st.tuples(st.integers(1, 9), st.floats(0, 1), st.integers(1, 9))


def schedule_of(num_groups, overlap=0.0, steps=16, num_tokens=24):
    return GroupSchedule(num_tokens=num_tokens, num_groups=num_groups, overlap=overlap, steps=steps)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_sizes_are_those_of_array_split(numbers):
    num_tokens, num_groups = numbers
    schedule = schedule_of(num_groups, num_tokens=num_tokens)
    parts = np.array_split(np.arange(num_tokens), num_groups)
    assert [len(p) for p in parts] == np.diff(schedule.ends).tolist()
    assert schedule.group.tolist() == [g for g, part in enumerate(parts) for _ in part]


@given(st.integers(1, 12), st.integers(0, 11), st.data())
def test_known_tokens_are_a_group_before_the_others(num_tokens, num_known, data):
    num_known = min(num_known, num_tokens - 1)
    num_groups = data.draw(st.integers(1, num_tokens - num_known))
    schedule = GroupSchedule(num_tokens=num_tokens, num_groups=num_groups, num_known=num_known)
    others = schedule_of(num_groups, num_tokens=num_tokens - num_known)
    assert schedule.ends == tuple(num_known + end for end in others.ends)
    shift = int(num_known > 0)
    expected = [0] * num_known + [g + shift for g in others.group.tolist()]
    assert schedule.group.tolist() == expected


@pytest.mark.parametrize("order", [*NAMED, "cells:2", "cells:3", "random:0"])
def test_every_order_is_a_permutation(order):
    assert decode_order(order, COORDS).sort().values.tolist() == list(range(24))


def test_top_to_bottom_gives_row_bands_where_they_divide():
    order = decode_order("top_to_bottom", COORDS)
    assert (COORDS[order, 1] == schedule_of(4).group).all()


def test_orders_start_where_they_say():
    first = {name: tuple(COORDS[decode_order(name, COORDS)[0], 1:].tolist()) for name in NAMED}
    assert first["top_to_bottom"] == (0, 0)
    assert first["bottom_to_top"] == (3, 0)
    assert first["left_to_right"] == (0, 0)
    assert first["right_to_left"] == (0, 5)
    assert first["centre_out"] == (1, 2)
    left = COORDS[decode_order("left_to_right", COORDS), 2]
    assert (left.diff() >= 0).all()
    centre = COORDS[decode_order("centre_out", COORDS), 1:] - torch.tensor([1.5, 2.5])
    assert (centre.square().sum(-1).diff() >= 0).all()


def test_cells_are_blocks_in_raster_order():
    blocks = COORDS[decode_order("cells:2", COORDS), 1:].reshape(6, 4, 2) // 2
    assert blocks[:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert (blocks == blocks[:, :1]).all()


def test_random_is_fixed_by_its_seed():
    a, b = (decode_order("random:3", COORDS) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, decode_order("random:4", COORDS))


def test_any_permutation():
    order = list(reversed(range(24)))
    assert decode_order(order, COORDS).tolist() == order


@pytest.mark.parametrize(
    "order", ["up", "cells:0", "cells:x", "cells", "random:-1", [0, 1], [0] * 24]
)
@pytest.mark.usefixtures("unchecked")
def test_bad_order(order):
    with pytest.raises(ValueError, match="order"):
        decode_order(order, COORDS)


@given(SETTINGS)
def test_matrix_law(numbers):
    num_groups, _, steps = numbers
    schedule = schedule_of(*numbers)
    k, matrix = schedule.stagger, schedule.matrix
    assert 0 <= k <= steps
    assert len(matrix) == schedule.num_steps + 1 == steps + (num_groups - 1) * k + 1
    assert (matrix[0] == 1).all()
    assert (matrix[-1] == 0).all()
    assert (matrix.diff(dim=0) <= 0).all()
    assert (matrix.diff(dim=1) >= 0).all()
    # Each group takes `steps` equal steps, from exactly 1 to exactly 0.
    assert ((matrix.diff(dim=0) < 0).sum(0) == steps).all()
    falls = -matrix.diff(dim=0)
    torch.testing.assert_close(
        falls[falls > 0], torch.full((steps * num_groups,), 1 / steps).double()
    )


@given(SETTINGS)
def test_moving_and_steps_done_agree_with_the_matrix(numbers):
    num_groups, _, steps = numbers
    schedule = schedule_of(*numbers)
    matrix = schedule.matrix
    for i in range(len(matrix) - 1):
        moves = matrix[i] > matrix[i + 1]
        assert moves.nonzero()[:, 0].tolist() == list(schedule.moving(i))
    assert schedule.moving(len(matrix) - 1).start == num_groups
    for i, row in enumerate(matrix):
        done = schedule.steps_done(i, range(num_groups))
        assert [(steps - a) / steps for a in done] == row.tolist()


def test_special_cases():
    assert schedule_of(4, 1.0, 8).num_steps == 8
    assert schedule_of(4, 0.0, 8).num_steps == 32
    assert schedule_of(4, 0.5, 8).num_steps == 20
    assert schedule_of(4, 0.99, 4).stagger == 1, "groups merge only at overlap 1"
    assert schedule_of(4, 0.3, 4).realised_overlap == 0.25


@pytest.mark.parametrize("num_groups", [0, 25, -1, 2.5, "4", True])
@pytest.mark.usefixtures("unchecked")
def test_bad_num_groups(num_groups):
    with pytest.raises(ValueError, match="num_groups must be a whole number in 1 … 24"):
        schedule_of(num_groups)


@pytest.mark.parametrize("overlap", [-0.1, 1.1, float("nan"), "half"])
@pytest.mark.usefixtures("unchecked")
def test_bad_overlap(overlap):
    with pytest.raises(ValueError, match=r"overlap must be a number in \[0, 1\]"):
        schedule_of(2, overlap)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "4"])
@pytest.mark.usefixtures("unchecked")
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps must be a whole number"):
        schedule_of(2, steps=steps)
