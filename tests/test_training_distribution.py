import pytest
import torch

from rolldiff import Grouping, Patches, Training
from rolldiff.grouping import decode_order

COORDS = Patches(4, channels=1).coords


def test_tables_hold_every_order_and_count():
    training = Training(num_groups=(1, 3), orders=("bottom_to_top", list(range(16))))
    orders, groups = training.tables(COORDS)
    assert torch.equal(orders[0], decode_order("bottom_to_top", COORDS))
    assert torch.equal(orders[1], torch.arange(16))
    assert torch.equal(groups[1], Grouping(16, 3).group)


def test_every_example_draws_its_own_settings():
    training = Training(num_groups=(1, 2, 4), orders=("top_to_bottom", "bottom_to_top"))
    drawn = training.draw(3000, torch.Generator().manual_seed(0))
    counts = drawn.num_groups.bincount(minlength=3).double()
    # Standard error of a third of 3000: 25.8; four of them.
    assert (counts - 1000).abs().max() < 104
    assert abs(int(drawn.order.sum()) - 1500) < 110
    assert drawn.t.shape == (3000, 4)


def test_beyond_names_what_was_not_trained():
    training = Training(num_groups=(1, 4), orders=("top_to_bottom",))
    assert training.beyond(4, 0.5, "top_to_bottom") == []
    assert training.beyond(1, 0.0, "random:3") == [], "one group has no order"
    assert len(training.beyond(3, 0.5, "random:3")) == 2


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
