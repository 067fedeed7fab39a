import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Grouping, Patches
from rolldiff.grouping import decode_order

COORDS = Patches((4, 6), channels=1).coords
NAMED = ["top_to_bottom", "bottom_to_top", "left_to_right", "right_to_left", "centre_out"]


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_sizes_are_those_of_array_split(numbers):
    num_tokens, num_groups = numbers
    grouping = Grouping(num_tokens, num_groups)
    parts = np.array_split(np.arange(num_tokens), num_groups)
    assert [len(p) for p in parts] == np.diff(grouping.ends).tolist()
    assert grouping.group.tolist() == [g for g, part in enumerate(parts) for _ in part]


@pytest.mark.parametrize("order", [*NAMED, "cells:2", "cells:3", "random:0"])
def test_every_order_is_a_permutation(order):
    assert decode_order(order, COORDS).sort().values.tolist() == list(range(24))


def test_top_to_bottom_gives_row_bands_where_they_divide():
    order = decode_order("top_to_bottom", COORDS)
    group = Grouping(24, 4).group
    assert (COORDS[order, 1] == group).all()


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


@pytest.mark.parametrize("num_groups", [0, 25, -1, 2.5, "4"])
@pytest.mark.usefixtures("unchecked")
def test_bad_num_groups(num_groups):
    with pytest.raises(ValueError, match="num_groups must be a whole number in 1 … 24"):
        Grouping(24, num_groups)
