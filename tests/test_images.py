import pytest
import torch
from PIL import Image

from rolldiff.evaluation.images import labelled_rows, make_grid, save_gif


def test_a_grid_shows_every_pixel():
    image = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    page = make_grid(image, columns=1, scale=1)
    assert page.size == (6, 6)
    shown = [page.getpixel((x, y))[0] for y in (2, 3) for x in (2, 3)]
    assert shown == [0, 128, 255, 255]


def test_a_grid_fills_the_last_row_with_paper():
    page = make_grid(-torch.ones(5, 3, 4, 4), columns=3, scale=2)
    assert page.size == (3 * 12, 2 * 12)
    assert page.getpixel((30, 18)) == (255, 255, 255)
    assert page.getpixel((6, 6)) == (0, 0, 0)


def test_rows_have_labels():
    page = labelled_rows({"a": torch.zeros(2, 1, 8, 8), "a longer label": torch.zeros(2, 1, 8, 8)})
    strip = make_grid(torch.zeros(2, 1, 8, 8), columns=2)
    assert page.height == 2 * strip.height
    margin = page.crop((0, 0, page.width - strip.width, strip.height))
    assert margin.getextrema()[0][0] < 128, "ink"


def test_gif(tmp_path):
    frames = [make_grid(torch.full((1, 1, 8, 8), v)) for v in (-1.0, 0.0, 1.0)]
    save_gif(frames, tmp_path / "f.gif")
    with Image.open(tmp_path / "f.gif") as gif:
        assert gif.n_frames == 3
    with pytest.raises(ValueError, match="frames"):
        save_gif([], tmp_path / "f.gif")
