import numpy as np
import pytest
import torch
from PIL import Image

from rolldiff.errors import UsageError
from rolldiff.evaluation.images import (
    labelled_rows,
    make_grid,
    save_gif,
    save_images,
    save_npz,
    save_picture,
)


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


def batches(channels):
    """Three images in two batches: values that are rounded, and values that are clipped."""
    values = torch.tensor([-9.0, -1.0, -0.999, 0.0, 0.5, 9.0])
    images = values.repeat(3 * channels).view(3, channels, 2, 3)
    images = images + 0.1 * torch.arange(3)[:, None, None, None]
    byte = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.split([2, 1]), byte.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_in_a_file_of_its_own(tmp_path, channels):
    images, expected = batches(channels)
    assert save_images(iter(images), tmp_path / "new" / "set") == 3
    files = sorted((tmp_path / "new" / "set").iterdir())
    assert [path.name for path in files] == ["000000.png", "000001.png", "000002.png"]
    for path, pixels in zip(files, expected, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), pixels)
    with pytest.raises(UsageError, match="folder must be a new or an empty one"):
        save_images(images, tmp_path / "new" / "set")


@pytest.mark.parametrize("channels", [1, 3])
def test_all_images_in_one_array(tmp_path, channels):
    images, expected = batches(channels)
    assert save_npz(iter(images), tmp_path / "set.npz") == 3
    with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], expected)


def failing(images):
    yield from images
    raise KeyboardInterrupt


def test_what_fails_leaves_no_half_file(tmp_path, monkeypatch):
    (images, _), old = batches(1), b"old"
    for name in ("set.npz", "grid.png", "a.gif"):
        (tmp_path / name).write_bytes(old)
    with pytest.raises(KeyboardInterrupt):
        save_npz(failing(images), tmp_path / "set.npz")
    with pytest.raises(KeyboardInterrupt):
        save_images(failing(images), tmp_path / "set")
    assert len(list((tmp_path / "set").iterdir())) == 3
    grid = make_grid(images[0])
    monkeypatch.setattr(Image.Image, "save", lambda self, part, **_: part.write_bytes(b"h") / 0)
    with pytest.raises(ZeroDivisionError):
        save_picture(grid, tmp_path / "grid.png")
    with pytest.raises(ZeroDivisionError):
        save_gif([grid], tmp_path / "a.gif")
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"set.npz": old, "grid.png": old, "a.gif": old}


@pytest.mark.parametrize("save", [save_images, save_npz])
def test_sets_that_are_not_written(tmp_path, save):
    (first, _), _ = batches(1)
    with pytest.raises(UsageError, match="one image or more"):
        save([], tmp_path / "a")
    with pytest.raises(UsageError, match="image must be finite"):
        save([first, first / 0], tmp_path / "b")
    if save is save_npz:
        with pytest.raises(UsageError, match="of one size"):
            save([first, first[..., :2]], tmp_path / "c")
