import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolldiff import Patches


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), p=st.integers(1, 3), c=st.integers(1, 3))
def test_tokens_are_an_orthonormal_change_of_coordinates(rows, columns, p, c):
    layout = Patches((rows * p, columns * p), channels=c, patch=p)
    image = torch.randn(2, c, rows * p, columns * p)
    tokens = layout.tokens(image)
    assert tokens.shape == (2, layout.num_tokens, layout.token_dim)
    assert torch.equal(layout.image(tokens), image)
    torch.testing.assert_close(tokens.square().sum(), image.square().sum())


def test_a_token_is_a_patch_at_its_coordinates():
    layout = Patches((4, 6), channels=1, patch=2)
    tokens = torch.zeros(1, 6, 4)
    tokens[0, 4] = 1
    level, row, column = layout.coords[4].tolist()
    assert (level, row, column) == (0, 1, 1)
    image = layout.image(tokens)[0, 0]
    assert image[2:4, 2:4].eq(1).all()
    assert image.sum() == 4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"image_size": 9, "patch": 2}, "patch"),
        ({"image_size": (8, 7), "patch": 2}, "patch"),
        ({"image_size": 8, "patch": 0}, "patch"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"image_size": 8, "channels": 0}, "channels"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_sizes(arguments, word):
    with pytest.raises(ValueError, match=word):
        Patches(**arguments)
