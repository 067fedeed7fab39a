"""Photographs of any size: squares to train on, codes, and the picture back."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from rolldiff import DecodeConfig, Decoder, TokenGrid, Training
from rolldiff.cli import main
from rolldiff.data import Photos
from rolldiff.errors import UsageError
from rolldiff.tokenizer import Encoder, Tokenizer, reconstruct


@pytest.fixture
def folder(tmp_path):
    """Photographs whose pixels say which photograph and which row they are of."""
    for number, size in enumerate([(40, 60), (32, 24), (50, 50), (16, 80)]):
        rows = np.arange(size[1], dtype=np.uint8)[:, None].repeat(size[0], 1)
        pixels = np.stack([rows, np.full_like(rows, number), rows.T[: size[0]].T * 0], -1)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_squares_are_parts_of_photographs(folder):
    data = Photos(path=folder, image_size=20, channels=3, crops=300, held_out=0.4)
    with pytest.warns(UserWarning, match="left out: a photograph must have 20 pixels"):
        image, _ = data._dataset[torch.arange(300)]
    assert image.shape == (300, 3, 20, 20)
    byte = ((image + 1) * 127.5).round()
    assert (byte[:, 0].diff(dim=1) == 1).all()  # rows follow each other
    number = byte[:, 1, 0, 0]
    assert (byte[:, 1] == number[:, None, None]).all()
    assert set(number.tolist()) == {0, 1, 2}
    # Larger photographs have more squares, and no photograph is on both sides of the split.
    train, held_out = data._split
    assert len(train) + len(held_out) == 300
    assert not set(number[train].tolist()) & set(number[held_out].tolist())
    areas = [40 * 60, 32 * 24, 50 * 50]
    counts = [int((number == i).sum()) for i in range(3)]
    assert np.argsort(counts).tolist() == np.argsort(areas).tolist()
    assert len(set(byte[number == 0][:, 0, 0, 0].tolist())) > 20  # at many places


def test_the_same_squares_every_time(folder):
    first, second = (
        Photos(path=folder, image_size=16, channels=3, crops=50, seed=seed)._dataset
        for seed in (0, 1)
    )
    assert torch.equal(first[torch.arange(50)][0], second[torch.arange(50)][0])


def test_the_pictures_that_packages_ship():
    pytest.importorskip("skimage")
    data = Photos(image_size=96, channels=3, crops=200, held_out=0.25)
    assert len(data.photos) == 17
    assert all(photo.shape[0] == 3 for photo in data.photos)
    train, held_out = (set(data._dataset.photo[part].tolist()) for part in data._split)
    assert not train & held_out
    assert max(train) < 13 <= min(held_out)


def test_photographs_that_are_too_small_are_refused(folder):
    data = Photos(path=folder, image_size=64, channels=3)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UsageError, match="data must"):
        data.image  # noqa: B018


def tokenizer(*, local=True, window=2, patch=4):
    torch.manual_seed(0)
    encoder = Encoder(16, factor=4, channels=2, width=8, depth=1, stem=2, local=local)
    decoder = Decoder.build(
        image_size=16,
        patch=patch,
        condition=TokenGrid(4, 4, channels=2),
        window=window,
        training=Training((1, 2, 4), drop_cond=0.0),
        width=16,
        depth=1,
        heads=1,
    )
    model = Tokenizer(encoder, decoder, levels=(5, 5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_a_picture_of_any_size_comes_back():
    model = tokenizer()
    image = torch.rand(1, 3, 30, 45) * 2 - 1
    found = reconstruct(model, image)
    assert found.latents.shape == (1, 8, 12, 2)
    assert found.bits_per_pixel == pytest.approx(8 * 12 * np.log2(25) / (30 * 45))
    config = DecodeConfig(num_groups=8, steps=2)
    *_, last = found.stream(config, seed=0)
    assert last.image.shape == image.shape
    assert last.finished.shape == (30, 45)
    assert last.finished.all()
    five = list(found.stream(config, seed=0, frames=5))
    assert [bool(frame.finished[0].all()) for frame in five] == [True] * 5
    assert torch.equal(five[-1].image, last.image)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_codes_that_arrive_row_by_row_give_the_same_pixels():
    found = reconstruct(tokenizer(), torch.rand(1, 3, 32, 24) * 2 - 1)
    decoder, options = found.tokenizer.decoder, {"num_groups": 8, "steps": 2, "seed": 0}
    whole = decoder.decode(found.latents, **options).image
    asked = []

    def rows():
        for i, row in enumerate(found.latents.flatten(1, 2).split(6, dim=1)):
            asked.append(i)
            yield row

    for frame in decoder.stream(rows(), num_images=1, **options):
        # A group is one row of cells; none is asked for before its group starts.
        done = int(frame.finished[:, 0].sum()) // 4
        assert len(asked) <= done + 1
    assert torch.equal(frame.image, whole)


def test_a_local_cell_depends_on_the_pixels_around_it_alone():
    model = tokenizer()
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    other = image.clone()
    other[..., :4, :4] *= -1
    encoder = model.encoder.resized(64)
    changed = (encoder(image) != encoder(other))[0].any(-1)
    assert changed[0, 0]
    assert not changed[8:].any()
    assert not changed[:, 8:].any()


@pytest.mark.parametrize(
    ("settings", "image", "message"),
    [
        ({"local": False}, torch.zeros(1, 3, 32, 32), "the encoder local"),
        ({"window": None}, torch.zeros(1, 3, 32, 32), "image_size must be the one"),
        ({}, torch.zeros(1, 1, 32, 32), r"image must have shape \(B, 3, H, W\)"),
        ({}, torch.zeros(3, 32, 32), r"image must have shape"),
        ({}, torch.zeros(1, 3, 0, 32), r"image must have shape"),
        ({}, torch.full((1, 3, 32, 32), 2.0), r"image must be in \[-1, 1\]"),
        ({}, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "image must"),
    ],
    ids=str,
)
def test_pictures_that_do_not_fit(unchecked, settings, image, message):
    with pytest.raises(UsageError, match=message):
        reconstruct(tokenizer(**settings), image)


@pytest.mark.filterwarnings("ignore:decoding beyond")
@pytest.mark.usefixtures("unchecked")
def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer().save_pretrained("run")
    for out in ("film.gif", "picture.png", "frames"):
        main(["reconstruct", "ckpt=run", "image=0.png", f"out={out}", "num_groups=5", "steps=2"])
        assert "40 x 60 pixels, 150 codes" in capsys.readouterr().out
    with Image.open("picture.png") as picture:
        assert picture.size == (40, 60)
    with Image.open("film.gif") as film:
        assert film.size == (40, 60)
        assert 1 < film.n_frames <= 5
    assert len(list((tmp_path / "frames").iterdir())) == 5
    for wrong, words in (
        ("image=none.png", "data must be pictures, got none.png"),
        ("image=null", "image must be a picture"),
        ("frames=900", "frames must be"),
        ("out=film.mp4", "out must end in"),
    ):
        with contextlib.suppress(SystemExit):
            main(["reconstruct", "ckpt=run", "image=0.png", "out=x.gif", wrong])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x.gif").exists()
