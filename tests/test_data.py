"""Images of every source come out the same way, in an order that a seed fixes."""

import importlib.util
import io
import os
import struct
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageCms

from rolldiff import Decoder
from rolldiff.data import Digits, Folder, Hub, module
from rolldiff.data.datasets import ResumableSampler, permutation
from rolldiff.errors import UsageError
from rolldiff.pixels import Record, load_image
from rolldiff.training import LitDecoder

SHARED = Path(__file__).parents[2] / "shared" / "data"
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",  # held to here
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """`datasets` waits five seconds whenever a stream is left before its end."""
    if importlib.util.find_spec("datasets"):
        monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of two classes, each with grey values of its own."""
    for i in range(12):
        where = tmp_path / "set" / ("cat" if i < 6 else "dog")
        where.mkdir(parents=True, exist_ok=True)
        array = np.full((8, 8), 20 * i, np.uint8)
        array[:, :4] += 5  # left is brighter: a mirrored one is told by it
        Image.fromarray(array).save(where / f"{i:02}.png")
    return tmp_path / "set"


@pytest.fixture
def shards(tmp_path):
    """Rows in the hub's schema: a parquet shard."""
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [], "kind": []}
    for i in range(12):
        stored = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(stored, "PNG")
        rows["picture"].append({"bytes": stored.getvalue(), "path": None})
        rows["kind"].append(i % 3)
    rows["picture"][7]["bytes"] = b"no picture"
    where = tmp_path / "shards"
    where.mkdir()
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(num_classes=3)}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(where / "train-00000-of-00001.parquet"))
    return where


def test_the_digits_are_1797_scans_in_range():
    data = Digits(batch_size=7, max_steps=3, seed=0)
    assert data.image.shape == (1797, 1, 8, 8)
    assert (data.image.min(), data.image.max()) == (-1, 1)
    assert data.label.bincount().min() > 170
    batches = list(data.train_dataloader())
    assert [len(image) for image, _ in batches] == [7, 7, 7]
    again = list(Digits(batch_size=7, max_steps=3, seed=0).train_dataloader())
    assert torch.equal(batches[2][0], again[2][0])
    match = (data.image == batches[0][0][0]).all((1, 2, 3)).nonzero()[0, 0]
    assert data.label[match] == batches[0][1][0]


def test_a_folder_of_classes(folder):
    data = Folder(path=str(folder), image_size=8, channels=1)
    assert data.label.tolist() == [0] * 6 + [1] * 6
    assert torch.allclose(data.image[3, 0, 0, 7], torch.tensor(60 / 127.5 - 1))


def test_pictures_are_cut_to_a_square_and_resized(tmp_path):
    array = np.zeros((20, 40), np.uint8)
    array[:, 10:30] = 255  # the middle square
    Image.fromarray(array).save(tmp_path / "wide.png")
    Image.fromarray(array.T).save(tmp_path / "tall.png")
    data = Folder(path=str(tmp_path), image_size=10, channels=3, reference_images=2)
    assert data.image.shape == (2, 3, 10, 10)
    assert (data.image > 0.8).all()  # black is beyond the cut


def encoded(image, kind="PNG", **options):
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


def loaded(data, *, size=4, channels=3, **options):
    """The bytes of a picture as an array `[H, W, C]`."""
    if isinstance(data, Image.Image):
        data = encoded(data)
    found = load_image(Record("it", data, 0), image_size=size, channels=channels, **options)
    return found.permute(1, 2, 0).numpy()


COLORS = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_pictures_are_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLORS), kind, exif=exif, **options)
    # By the EXIF standard: the side of the picture at which row 0 and column 0 are.
    turned = {
        1: COLORS,
        2: COLORS[:, ::-1],
        3: COLORS[::-1, ::-1],
        4: COLORS[::-1],
        5: COLORS.swapaxes(0, 1),
        6: np.rot90(COLORS, -1),
        7: np.rot90(COLORS, 2).swapaxes(0, 1),
        8: np.rot90(COLORS),
    }
    np.testing.assert_array_equal(loaded(data), turned[orientation])


def test_a_phone_holds_its_picture_upright():
    """A JPEG that is stored on its side: white on the left, with orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, :8] = 255
    found = loaded(encoded(Image.fromarray(array), "JPEG", exif=exif), size=16)
    assert (found[:8] > 250).all()
    assert (found[8:] < 5).all()


def test_damaged_exif_counts_as_upright():
    data = encoded(Image.fromarray(COLORS), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\xff")
    np.testing.assert_array_equal(loaded(data), COLORS)


def tiff(array, **tags):
    """A grey TIFF file with other values of its tags than Pillow would write."""
    stored = io.BytesIO()
    Image.fromarray(array).save(stored, "TIFF")
    data = bytearray(stored.getvalue())
    for name, value in tags.items():
        number = {"photometric": 262}[name]
        entry = number.to_bytes(2, "little") + b"\x03\0\x01\0\0\0"
        assert data.count(entry) == 1
        place = data.index(entry) + len(entry)
        data[place : place + 2] = value.to_bytes(2, "little")
    return bytes(data)


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    found = loaded(encoded(Image.fromarray(RAMP), kind), size=16, channels=1)
    np.testing.assert_array_equal(found.ravel(), np.arange(256))


def test_sixteen_bits_round_to_the_nearest_of_eight():
    data = encoded(Image.fromarray(np.array([[0, 128], [129, 65535]], np.uint16)))
    assert loaded(data, size=2, channels=1).ravel().tolist() == [0, 0, 1, 255]


def test_sixteen_bits_of_other_byte_order_or_sign_of_grey():
    big = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
    found = loaded(encoded(big, "TIFF"), size=16, channels=1)
    np.testing.assert_array_equal(found.ravel(), np.arange(256))
    found = loaded(tiff(RAMP, photometric=0), size=16, channels=1)
    np.testing.assert_array_equal(found.ravel(), np.arange(255, -1, -1))


def test_twelve_bits_of_a_microscope():
    """Pillow opens such a TIFF file as one of 16 bits, and does not scale it."""
    rows = bytes([0x00, 0x0F, 0xFF, 0x80, 0x80, 0x10])  # 0 and 4095; 2056 and 16
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(rows)}
    entries = [struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items()]
    end = struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)
    found = loaded(struct.pack("<2sHI", b"II", 42, 8 + len(rows)) + rows + end, size=2, channels=1)
    assert found.ravel().tolist() == [0, 255, round(2056 / 4095 * 255), 1]


def test_one_transparent_grey_of_sixteen_bits():
    data = encoded(Image.fromarray(RAMP), transparency=int(RAMP[0, 3]))
    found = loaded(data, size=16, channels=1, background=(200, 200, 200)).ravel()
    assert found[3] == 200
    np.testing.assert_array_equal(np.delete(found, 3), np.delete(np.arange(256), 3))


def test_floating_point_pictures():
    ramp = (np.arange(256) / 255).astype(np.float32).reshape(16, 16)
    found = loaded(encoded(Image.fromarray(ramp), "TIFF"), size=16, channels=1)
    np.testing.assert_array_equal(found.ravel(), np.arange(256))
    for value in (255.0, -1.0, np.nan, np.inf):
        ramp[3, 3] = value
        with pytest.raises(UsageError, match=r"got it: floating-point values must be in \[0, 1\]"):
            loaded(encoded(Image.fromarray(ramp), "TIFF"))


def test_whole_numbers_of_32_bits_are_refused():
    with pytest.raises(UsageError, match="got it: whole numbers of 32 bits"):
        loaded(encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))


def transparent(mode):
    """Four pictures of 1 x 4 pixels: red or black, of opacity 0, 1/3 (if the mode can) and 1."""
    alpha = [0, 85, 170, 255] if mode in ("RGBA", "LA") else [0, 0, 255, 255]
    image = Image.new("RGBA", (4, 4))
    image.putdata([(255 if mode != "LA" else 0, 0, 0, a) for _ in range(4) for a in alpha])
    if mode == "LA":
        return encoded(image.convert("LA")), [0, 0, 0], alpha
    if mode == "RGBA":
        return encoded(image), [255, 0, 0], alpha
    indexed = Image.frombytes("P", (4, 4), bytes([0, 0, 1, 1] * 4))
    indexed.putpalette([9, 9, 9, 255, 0, 0])
    if mode == "PA":
        both = Image.merge("PA", (Image.new("P", (4, 4), 1), image.getchannel("A")))
        both.putpalette([9, 9, 9, 255, 0, 0])
        return encoded(both, "TIFF"), [255, 0, 0], alpha
    if mode == "RGB":
        return encoded(indexed.convert("RGB"), transparency=(9, 9, 9)), [255, 0, 0], alpha
    how = {"P": 0, "P of bytes": bytes([0, 255])}[mode]
    return encoded(indexed, transparency=how), [255, 0, 0], alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P of bytes", "PA", "RGB"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparency_shows_the_background(mode, background):
    data, color, alpha = transparent(mode)
    opacity = np.array(alpha)[None, :, None] / 255
    expected = opacity * np.array(color) + (1 - opacity) * np.array(background)
    found = loaded(data, background=background)
    assert np.abs(found - expected).max() <= 0.5 + 1e-9
    assert (loaded(data, channels=1)[:, 0] == 255).all()


def test_opaque_pixels_keep_their_values():
    image = Image.fromarray(COLORS)
    image.putalpha(255)
    np.testing.assert_array_equal(loaded(image), COLORS)
    np.testing.assert_array_equal(loaded(Image.fromarray(COLORS)), COLORS)
    grey = Image.fromarray(COLORS[..., 0])
    np.testing.assert_array_equal(loaded(grey, channels=1)[..., 0], COLORS[..., 0])


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_modes_are_those_of_pillow(mode, channels):
    image = Image.fromarray(COLORS).convert(mode)
    expected = image.convert("L" if channels == 1 else "RGB")
    found = loaded(encoded(image, "TIFF"), channels=channels)
    np.testing.assert_array_equal(found.squeeze(), np.asarray(expected))


def test_lab():
    """L 100 is white, L 0 black, a and b are signed: positive a is red against green."""
    values = [(255, 0, 0), (0, 0, 0), (128, 60, 0), (128, 196, 0)]  # 196 is -60
    image = Image.frombytes("LAB", (2, 2), bytes(sum(values, ())))
    white, black, red, green = loaded(encoded(image, "TIFF"), size=2).reshape(4, 3).astype(int)
    assert white.min() >= 254
    assert black.max() <= 1
    assert red[0] > red[1] + 80
    assert green[1] > green[0] + 80


def profile(primaries=None):
    """The bytes of an ICC profile: sRGB, or one whose red and blue are exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if primaries == "exchanged":
        data = data.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    return data


def test_profiles_are_converted_to_srgb():
    image = Image.fromarray(COLORS)
    np.testing.assert_array_equal(loaded(encoded(image, icc_profile=profile())), COLORS)
    other = encoded(image, icc_profile=profile("exchanged"))
    assert np.abs(loaded(other)[..., ::-1].astype(int) - COLORS).max() <= 2
    for useless in (b"no profile", profile("exchanged")[:200]):
        np.testing.assert_array_equal(loaded(encoded(image, icc_profile=useless)), COLORS)
    grey = encoded(Image.fromarray(COLORS[..., 0]), icc_profile=profile("exchanged"))  # not of grey
    np.testing.assert_array_equal(loaded(grey, channels=1)[..., 0], COLORS[..., 0])


def linear_grey():
    """The bytes of an ICC profile of greys that are proportional to the light."""
    white = struct.pack(">4s4xiii", b"XYZ ", 63190, 65536, 54061)  # D50, in 1 / 65536
    tags = {b"wtpt": white, b"kTRC": struct.pack(">4s4xI", b"curv", 0)}
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value
    fields = (128 + len(table) + len(data), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header = struct.pack(">I4xI4s4s4s12x4s28xiii48x", *fields, 63190, 65536, 54061)
    assert len(header) == 128
    return header + table + data


def test_grey_profiles_are_converted_to_srgb():
    light = np.arange(0, 256, 16).reshape(4, 4)
    x = light / 255
    srgb = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255
    grey = Image.fromarray(light.astype(np.uint8))
    found = loaded(encoded(grey, icc_profile=linear_grey()), channels=1)
    assert np.abs(found[..., 0] - srgb).max() <= 1
    grey.putalpha(Image.fromarray(np.full((4, 4), 255, np.uint8)))
    found = loaded(encoded(grey, icc_profile=linear_grey()))
    assert np.abs(found - srgb[..., None]).max() <= 1


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (loaded(data) == [255, 0, 0]).all(), kind


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)])
def test_odd_shapes(size):
    assert (loaded(Image.new("RGB", size, (1, 2, 3)), size=8) == [1, 2, 3]).all()


def test_huge_pictures(monkeypatch):
    """Up to twice Pillow's limit they are read in silence, above it they are refused."""
    data = encoded(Image.new("L", (40, 40), 7))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert (loaded(data) == 7).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UsageError, match="got it: Image size"):
        loaded(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
def test_truncated_files_are_refused(kind):
    data = encoded(Image.effect_noise((64, 64), 90), kind)
    for length in (0, 10, len(data) // 2):
        with pytest.raises(UsageError, match="must be pictures, got it: "):
            loaded(data[:length])


def test_what_is_missing_is_named():
    for record, missing in ((Record("x", None, 0), "picture"), (Record("x", b"", None), "label")):
        with pytest.raises(UsageError, match=f"got x: no {missing}"):
            load_image(record, image_size=4, channels=1)


def test_the_background_is_a_setting(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "0.png")
    ask = {"path": str(tmp_path), "image_size": 4, "channels": 3}
    for background, expected in ((0, [0, 0, 0]), ([1, 2, 255], [1, 2, 255])):
        image = Folder(**ask, background=background).image
        expected = torch.tensor(expected)[:, None, None] / 127.5 - 1
        torch.testing.assert_close(image[0], expected.expand(3, 4, 4))


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_cannot_be_read_is_named(folder, in_memory, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 2**32 if in_memory else 0)
    (folder / "cat" / "notes.png").write_text("no picture")
    (folder / ".DS_Store").write_text("hidden files are nobody's pictures")
    ask = {"path": str(folder), "image_size": 8, "channels": 1, "batch_size": 13, "max_steps": 1}
    with pytest.warns(UserWarning, match=r"skipped: .*notes\.png"):
        image, _ = next(iter(Folder(**ask).train_dataloader()))
    assert len(image) == 13  # none is missing from the batch
    with pytest.raises(ValueError, match=r"pictures, got .*notes\.png"):
        Folder(**ask, on_error="raise").train_dataloader()


def test_every_image_comes_once_in_an_epoch_and_mirrored_once(folder):
    data = Folder(path=str(folder), image_size=8, channels=1, flip=True, batch_size=8, max_steps=3)
    image = torch.cat([image for image, _ in data.train_dataloader()])
    assert len(image.flatten(1).unique(dim=0)) == 24
    upright = image[:, 0, 0, 0] > image[:, 0, 0, 7]
    assert upright.sum() == 12


def test_the_split_is_fixed_by_the_seed(folder):
    def trained_on(**ask):
        data = Folder(path=str(folder), image_size=8, channels=1, batch_size=9, max_steps=1, **ask)
        held_out = next(iter(data.val_dataloader()))[0][:, 0, 0, 0].tolist()
        seen = next(iter(data.train_dataloader()))[0][:, 0, 0, 0].tolist()
        assert len(data.image) == len(seen) == 9
        assert len(held_out) == 3
        assert not set(held_out) & set(seen)
        return set(seen)

    assert trained_on(held_out=0.25, seed=1) == trained_on(held_out=0.25, seed=1)
    assert trained_on(held_out=0.25, seed=1) != trained_on(held_out=0.25, seed=2)


def test_processes_share_a_batch_and_a_resumed_order_continues():
    def order(**settings):
        return torch.stack(list(ResumableSampler(10, batches_per_epoch=4, seed=3, **settings)))

    whole = order(batch_size=6)
    shares = [order(batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, dim=1), whole)
    assert torch.equal(order(batch_size=6, batches_done=lambda: 3), whole[3:])
    assert (whole.flatten()[:20].view(2, 10).sort().values == torch.arange(10)).all()
    assert not torch.equal(order(batch_size=6, batches_done=lambda: 4), whole)


def test_another_seed_is_another_order_in_every_epoch():
    def order(seed, epoch):
        settings = {"batch_size": 50, "batches_per_epoch": 1, "seed": seed}
        sampler = ResumableSampler(50, **settings, batches_done=lambda: epoch)
        return tuple(next(iter(sampler)).tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(found) == list(range(50)) for found in orders)


def test_the_hub_schema(shards):
    ask = {"path": str(shards), "image_column": "picture", "label_column": "kind", "channels": 3}
    data = Hub(**ask, image_size=8)
    with pytest.warns(UserWarning, match=r"skipped: .*row 7 of train"):
        image = data.image
    assert image.shape == (11, 3, 8, 8)
    assert data.label.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0, 1, 2]
    assert torch.allclose(image[2], torch.tensor(40 / 127.5 - 1))
    with pytest.raises(ValueError, match="must be among"):
        Hub(**ask | {"label_column": "label"}, image_size=8).image  # noqa: B018
    with pytest.raises(ValueError, match="must be a folder of pictures"):
        Hub(path=str(shards / "none"), image_size=8, channels=3).image  # noqa: B018


@pytest.mark.filterwarnings("ignore:skipped")
def test_streaming_goes_on_where_it_was(shards):
    def batches(done, rank=0, world=1, size=4):
        data = Hub(
            path=str(shards),
            image_column="picture",
            label_column="kind",
            channels=3,
            image_size=8,
            streaming=True,
            reference_images=5,
            batch_size=size,
            max_steps=5,
        )
        data.load_state_dict({"batches": done})
        assert data.image.shape == (5, 3, 8, 8)
        return [image for image, _ in data.train_dataloader()]

    whole = batches(0)
    assert [len(image) for image in whole] == [4] * 5
    assert all(torch.equal(a, b) for a, b in zip(batches(3), whole[3:], strict=True))
    assert not torch.equal(whole[0], whole[3])  # the second epoch is in another order


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"channels": 2},
        {"held_out": 1.0},
        {"reference_images": 1},
        {"on_error": "ignore"},
        {"path": None},
        {"split": None},
        {"split": ""},
        {"streaming": True},
        {"streaming": 1},
    ],
    ids=str,
)
def test_bad_settings(arguments):
    ask = {"path": "somewhere", "image_size": 8, "channels": 3}
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Hub(**ask | arguments)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="must be a folder of pictures"):
        Folder(path=str(tmp_path / "none"), image_size=8, channels=1).image  # noqa: B018
    with pytest.raises(ValueError, match="must hold a picture"):
        Folder(path=str(tmp_path), image_size=8, channels=1).image  # noqa: B018
    with pytest.raises(ValueError, match="8 x 8"):
        Digits(image_size=16)


def test_a_resumed_training_ends_with_the_same_weights(folder, tmp_path):
    def train(steps, resume=None, every=100):
        torch.manual_seed(0)  # of the weights; the rest must not depend on it
        decoder = Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1)
        torch.manual_seed(steps)
        kept = {"dirpath": tmp_path / f"every-{every}", "filename": "at-{step}"}
        saver = ModelCheckpoint(**kept, every_n_train_steps=every)
        trainer = L.Trainer(**QUIET, max_steps=steps, callbacks=[saver])
        data = Folder(path=str(folder), image_size=8, channels=1, batch_size=5, max_steps=7)
        lit = LitDecoder(decoder, warmup_steps=0, decay="constant")
        if resume is None:
            trainer.fit(lit, data)
        else:
            with pytest.warns(UserWarning, match="callbacks used to create"):
                trainer.fit(lit, data, ckpt_path=resume, weights_only=True)
        return lit.model.backbone

    through = train(9).state_dict()  # beyond the first epoch of 7
    for steps in (3, 7, 8):
        train(steps, every=steps)
        resumed = train(9, tmp_path / f"every-{steps}" / f"at-step={steps}.ckpt").state_dict()
        for name, value in through.items():
            assert torch.equal(resumed[name], value), (steps, name)


@pytest.mark.parametrize(
    ("name", "column", "size", "channels"),
    [("fashion_mnist", "image", 28, 1), ("cifar10", "img", 32, 3)],
)
def test_published_sets_train_a_few_steps(name, column, size, channels):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not at {SHARED / name}: training on it is NOT tested")
    data = Hub(
        path=str(SHARED / name),
        split="train[:300]",
        image_column=column,
        image_size=size,
        channels=channels,
        batch_size=8,
        max_steps=4,
        flip=channels == 3,
    )
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=size, channels=channels, patch=4, width=32, depth=1, heads=1, num_classes=10
    )
    before = decoder.backbone.head.weight.clone()
    L.Trainer(**QUIET, max_steps=4, enable_checkpointing=False).fit(
        LitDecoder(decoder, warmup_steps=0), data
    )
    assert data.image.shape == (300, channels, size, size)
    assert data.label.bincount().min() > 10
    assert not torch.equal(before, decoder.backbone.head.weight)


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def labelled(root, **ask):
    """The labels of a folder's pictures by their path."""
    data = Folder(path=str(root), image_size=8, channels=1, **ask)
    found = {str(Path(r.name).relative_to(root)): r.label for r in data.records()}
    assert len(found) == len(data.image)
    return found, data


def test_only_folders_with_pictures_are_classes(tmp_path):
    for name in ("b/1.png", "b/deep/2.JPG", "Z/0.bmp", ".hidden/0.png", "a/.git/0.png"):
        picture(tmp_path / name)
    for name in ("a/0.xml", "b/notes.txt", "b/Thumbs.db", "b/.DS_Store", "readme.md"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "empty").mkdir()
    found, data = labelled(tmp_path, on_error="raise")
    assert found == {"Z/0.bmp": 0, "b/1.png": 1, "b/deep/2.JPG": 1}
    assert (data.class_names, data.num_classes) == (("Z", "b"), 2)


def test_pictures_beside_the_classes_are_told(tmp_path):
    for name in ("cats/0.png", "dogs/0.png", "preview.png", "more.png"):
        picture(tmp_path / name)
    with pytest.warns(UserWarning, match=r"folder of a class, got .*more\.png and 1 others"):
        found, _ = labelled(tmp_path)
    assert found == {"cats/0.png": 0, "dogs/0.png": 1}
    with pytest.raises(UsageError, match=r"folder of a class, got .*more\.png"):
        labelled(tmp_path, on_error="raise")


def test_a_folder_without_classes(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "annotations").mkdir()
    found, data = labelled(tmp_path)
    assert found == {"0.png": 0}
    assert (data.class_names, data.num_classes) == (None, 0)


def test_files_that_pillow_knows_and_cannot_read_are_told(tmp_path):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "paper.pdf").write_text("%PDF")
    data = Folder(path=str(tmp_path), image_size=8, channels=1)
    with pytest.warns(UserWarning, match="skipped") as told:
        assert len(data.image) == 1
    assert [Path(str(w.message).split(": ")[1][27:]).name for w in told] == [
        "gone.png",
        "paper.pdf",
    ]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "paper.pdf").write_text("%PDF")
    with pytest.raises(UsageError, match=r"folder of a class, got .*b/paper\.pdf"):
        labelled(tmp_path, on_error="raise")


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    picture(tmp_path / "elsewhere" / "0.png")
    picture(tmp_path / "set" / "a" / "1.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "itself").symlink_to("itself")
    assert labelled(tmp_path / "set")[0] == {"a/1.png": 0, "linked/0.png": 1}


def test_pipes_are_no_pictures(tmp_path):
    picture(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")  # opening it would wait for ever
    assert labelled(tmp_path)[0] == {"0.png": 0}


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    for name in ("a/0.png", "b/0.png", "c/0.png"):
        picture(tmp_path / name)
    scandir = os.scandir

    def refused(path):  # root may read anything
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.warns(UserWarning, match=r"left out: folders must be readable, got .*/b: .*denied"):
        found, _ = labelled(tmp_path)
    assert found == {"a/0.png": 0, "c/0.png": 1}
    with pytest.raises(UsageError, match="folders must be readable, got .*/b"):
        labelled(tmp_path, on_error="raise")


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "[0-9]*", "é ü 日本", "a;b $HOME", "~"])
def test_folders_of_any_name(tmp_path, name):
    picture(tmp_path / name / "c?l[a]ss" / f"{name}.png")
    picture(tmp_path / "0" / "other" / "1.png")  # which [0-9]* would match
    found, data = labelled(tmp_path / name)
    assert found == {f"c?l[a]ss/{name}.png": 0}
    assert data.class_names == ("c?l[a]ss",)


def test_the_home_folder(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "0.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Folder(path="~/set", image_size=8, channels=1).image) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("path", ["", " ", None, 3, "~nobody-of-this-name/x"])
@pytest.mark.parametrize("kind", [Folder, Hub])
def test_paths_that_are_no_folder(path, kind):
    with pytest.raises(UsageError, match=r"data\.(path|name)"):
        kind(path=path, image_size=8, channels=1)


@pytest.mark.parametrize("path", ["/null\0character", "x" * 5000])
@pytest.mark.parametrize("kind", [Folder, Hub])
def test_paths_that_cannot_be(path, kind):
    with pytest.raises(UsageError, match="must be a folder of pictures, got"):
        kind(path=path, image_size=8, channels=1).image  # noqa: B018


def test_the_classes_of_digits_and_shards(shards):
    assert Digits().class_names == tuple("0123456789")
    assert Digits().num_classes == 10
    ask = {"path": str(shards), "image_column": "picture", "image_size": 8, "channels": 3}
    data = Hub(**ask, label_column="kind")
    assert (data.class_names, data.num_classes) == (("0", "1", "2"), 3)
    data = Hub(**ask, label_column=None)
    assert (data.class_names, data.num_classes) == (None, 0)


PIXELS = {"image_size": 8, "channels": 1}


@pytest.fixture
def table(tmp_path):
    """Writes a table of pictures and labels to a parquet shard, and returns its folder."""
    datasets = pytest.importorskip("datasets")

    def write(label, kind, images=None, name="train-0.parquet"):
        one = {"bytes": encoded(Image.new("L", (8, 8), 50)), "path": None}
        images = [one] * len(label) if images is None else images
        images = [one if image == "one" else image for image in images]
        feature = kind if isinstance(kind, datasets.ClassLabel) else datasets.Value(kind)
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        rows = datasets.Dataset.from_dict({"image": images, "label": label}, features=features)
        rows.to_parquet(str(tmp_path / name))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("label", "kind", "expected", "names", "number"),
    [
        ([3, 0, 3], "int64", [3, 0, 3], None, 4),
        ([1, 0, 2], "uint8", [1, 0, 2], None, 3),
        ([1.0, 0.0, 2.0], "float32", [1, 0, 2], None, 3),
        ([True, False, True], "bool", [1, 0, 1], None, 2),
        (list("fbdbaecg"), "string", [5, 1, 3, 1, 0, 4, 2, 6], tuple("abcdefg"), 7),
        (list("fbdbaecg"), "large_string", [5, 1, 3, 1, 0, 4, 2, 6], tuple("abcdefg"), 7),
    ],
)
def test_labels_of_every_type(table, label, kind, expected, names, number):
    data = Hub(path=table(label, kind), **PIXELS)
    assert (data.class_names, data.num_classes) == (names, number)
    assert data.label.tolist() == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("label", "kind"),
    [([0.0, 2.7], "float32"), ([0.0, float("nan")], "float64"), ([0, -1], "int64")],
)
def test_numbers_that_are_no_classes_are_refused(table, label, kind, streaming):
    data = Hub(path=table(label, kind), **PIXELS, streaming=streaming, reference_images=2)
    with pytest.raises(UsageError, match=r"label_column must hold .*, row \d of"):
        data.image  # noqa: B018


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("missing", ["picture", "label"])
def test_missing_pictures_and_labels(table, missing, streaming):
    label = [0, None, 1] if missing == "label" else [0, 1, 1]
    images = ["one", None, "one"] if missing == "picture" else None
    ask = {"path": table(label, "int64", images), "streaming": streaming, "reference_images": 3}
    with pytest.warns(UserWarning, match=rf"skipped: .*row \d of .*train.*: no {missing}"):
        assert sorted(Hub(**ask, **PIXELS).label.tolist()) == [0, 1]
    with pytest.raises(UsageError, match=rf"row \d of .*train.*: no {missing}"):
        Hub(**ask, **PIXELS, on_error="raise").image  # noqa: B018


def test_labels_of_text_cannot_be_streamed(table):
    data = Hub(path=table(["a", "b"], "string"), **PIXELS, streaming=True, reference_images=2)
    with pytest.raises(UsageError, match="streaming=false"):
        data.image  # noqa: B018


def test_the_number_of_classes_of_a_stream(table):
    datasets = pytest.importorskip("datasets")
    stream = {"streaming": True, "reference_images": 2, **PIXELS}
    with pytest.raises(UsageError, match="num_classes"):
        Hub(path=table([0, 1], "int64"), **stream).num_classes  # noqa: B018
    data = Hub(path=table([0, 1], datasets.ClassLabel(names=["x", "y", "z"])), **stream)
    assert (data.class_names, data.num_classes) == (("x", "y", "z"), 3)


def test_columns_are_checked(table):
    path = table([0, 1], "int64")
    with pytest.raises(UsageError, match=r"among \['image', 'label'\], got \['img', 'label'\]"):
        Hub(path=path, **PIXELS, image_column="img").image  # noqa: B018
    with pytest.raises(UsageError, match="image_column must be a column of pictures, got label"):
        Hub(path=path, **PIXELS, image_column="label", label_column=None).image  # noqa: B018
    with pytest.raises(UsageError, match="label_column must be a column of whole numbers"):
        Hub(path=path, **PIXELS, label_column="image").image  # noqa: B018


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_are_checked(table, streaming):
    ask = {"path": table([0, 1, 2, 3], "int64"), "streaming": streaming, "reference_images": 4}
    with pytest.raises(UsageError, match=r"^split must be one of .*, got nope: .*train"):
        Hub(**ask, **PIXELS, split="nope").image  # noqa: B018
    for split in ("train[2:1]", "train[-1:-2]", "train[50%:50%]", "train[:1]+train[3:2]"):
        with pytest.raises(UsageError, match="split must be a part that is not empty"):
            Hub(**ask, **PIXELS, split=split)
    if not streaming:
        assert Hub(**ask, **PIXELS, split="train[:50%]").label.tolist() == [0, 1]
        assert Hub(**ask, **PIXELS, split="train[1:-1]").label.tolist() == [1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["footer", "pages"])
def test_a_damaged_shard_is_named(table, tmp_path, streaming, damage):
    for i in range(3):
        path = table([0] * 50, "int64", name=f"train-{i}.parquet")
    shard = tmp_path / "train-1.parquet"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[: len(data) // 2] if damage == "footer" else data[:4] + data[9:])
    ask = {"path": path, "streaming": streaming, "reference_images": 150}
    with pytest.raises(UsageError, match=r"sound parquet files, got .*train-1\.parquet: ") as told:
        Hub(**ask, **PIXELS).image  # noqa: B018
    assert "\n" not in str(told.value)


@pytest.fixture
def stream(table):
    """The settings of a stream of so many pictures of different greys, labelled by them."""

    def settings(number):
        images = [
            {"bytes": encoded(Image.new("L", (8, 8), i)), "path": None} for i in range(number)
        ]
        path = table(list(range(number)), "int64", images)
        return {"path": path, "streaming": True, "reference_images": 2, **PIXELS}

    return settings


@pytest.fixture
def files(tmp_path):
    """A hub set of the `imagefolder` kind: files, not bytes in parquet."""
    pytest.importorskip("datasets")
    for i, name in enumerate(("cat/0", "cat/1", "dog/0", "dog/1")):
        picture(tmp_path / "set" / "train" / f"{name}.png", 40 * i)
    return str(tmp_path / "set")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_sets_of_files(files, streaming):
    data = Hub(path=files, **PIXELS, streaming=streaming, reference_images=4)
    assert data.class_names == ("cat", "dog")
    values = ((data.image[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(zip(values, data.label.tolist(), strict=True)) == [
        (0, 0),
        (40, 0),
        (80, 1),
        (120, 1),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_sets_of_files_in_an_archive(tmp_path, streaming):
    pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for i in range(2):
            archive.writestr(f"{i}.png", encoded(Image.new("L", (8, 8), 40 * i)))
    ask = {"label_column": None, "streaming": streaming, "reference_images": 2}
    image = Hub(path=str(tmp_path), **PIXELS, **ask).image
    assert ((image[:, 0, 0, 0] + 1) * 127.5).round().sort().values.tolist() == [0, 40]


def test_hub_paths_that_would_be_patterns(tmp_path):
    with pytest.raises(UsageError, match="must be free of"):
        Hub(path=str(tmp_path / "[a]"), image_size=8, channels=1)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_pictures_are_decoded_like_files(table, streaming):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 257)
    stored = {"bytes": encoded(image, exif=exif), "path": None}
    clear = {"bytes": encoded(Image.new("LA", (8, 8))), "path": None}
    path = table([0, 1], "int64", [stored, clear])
    ask = {"streaming": streaming, "reference_images": 2, "background": 9}
    data = Hub(path=path, **PIXELS, **ask)
    image = ((data.image + 1) * 127.5).round().int().flatten(1)
    assert image[data.label == 0][0].tolist() == list(range(63, -1, -1))
    assert image[data.label == 1][0].unique().tolist() == [9]


# Sets that are sorted by class, or large.


@pytest.mark.parametrize("in_memory", [True, False])
def test_validation_images_are_random(folder, in_memory, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 2**32 if in_memory else 0)
    monkeypatch.setattr(module, "FEW", 6)

    def validated(seed):
        data = Folder(path=str(folder), **PIXELS, seed=seed)
        image, label = next(iter(data.val_dataloader()))
        assert len(image) == 6
        return label.tolist(), image[:, 0, 0, 0].tolist()

    label, values = validated(0)
    assert set(label) == {0, 1}  # the first six are cats
    assert len(set(values)) == 6
    assert validated(1) == (label, values)  # so that losses of two trainings can be compared


def test_validation_takes_all_that_is_held_out(folder):
    data = Folder(path=str(folder), **PIXELS, held_out=0.5, flip=True)
    (image, _), *others = data.val_dataloader()
    assert len(image) == 6
    assert not others
    assert (image[:, 0, 0, 0] > image[:, 0, 0, 7]).all()  # none is mirrored


def test_references_of_a_large_set_are_few_and_random(tmp_path, monkeypatch):
    for i in range(30):
        picture(tmp_path / f"{i:02}.bmp", i)
    decoded = []

    def counted(record, **settings):
        decoded.append(record.name)
        return load_image(record, **settings)

    monkeypatch.setattr(module, "load_image", counted)
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 1)
    monkeypatch.setattr(module, "FEW", 20)
    data = Folder(path=str(tmp_path), **PIXELS)
    assert len(data.image) == 20
    assert len(decoded) == 20
    assert len(data.image[:, 0, 0, 0].unique()) == 20
    assert data.image[:, 0, 0, 0].max() > 22 / 127.5 - 1
    assert len(Folder(path=str(tmp_path), **PIXELS, reference_images=25).image) == 25


def test_references_as_floats_are_bounded_too(folder, monkeypatch):
    """A set whose bytes fit into memory, and whose floats do not."""
    monkeypatch.setattr(module, "FEW", 5)
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 4 * 12 * 64)
    assert len(Folder(path=str(folder), **PIXELS).image) == 12
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 4 * 12 * 64 - 1)
    assert len(Folder(path=str(folder), **PIXELS).image) == 5


def test_references_of_a_stream_are_random(table):
    path = table([0] * 20 + [1] * 20, "int64")

    def labels(seed):
        ask = {"streaming": True, "reference_images": 20, "seed": seed}
        return Hub(path=path, **PIXELS, **ask).label.tolist()

    assert 4 < sum(labels(0)) < 16  # the first 20 are all 0
    assert labels(0) == labels(1)  # or two trainings could not be compared


def test_references_are_the_same_for_every_seed(folder):
    """Otherwise each of two trainings is measured on images of its own."""

    def data(seed):
        return Folder(path=str(folder), **PIXELS, reference_images=5, seed=seed, batch_size=12)

    def order(seed):
        return next(iter(data(seed).train_dataloader()))[0]

    assert not torch.equal(order(0), order(1))
    assert torch.equal(data(0).image, data(1).image)
    assert not torch.equal(data(0).image, data(0)._dataset[torch.arange(5)][0])  # at random


# Few images.


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_few_pictures_are_enough(tmp_path, number, flip, in_memory, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 2**32 if in_memory else 0)
    for i in range(number):
        picture(tmp_path / f"{i}.png", 10 * i)
    data = Folder(path=str(tmp_path), **PIXELS, batch_size=12, max_steps=2, flip=flip)
    batches = torch.cat([image for image, _ in data.train_dataloader()])
    assert len(batches) == 24
    assert batches[:, 0, 0, 0].unique(return_counts=True)[1].tolist() == [24 // number] * number
    assert len(data.image) == len(next(iter(data.val_dataloader()))[0]) == number
    few = Folder(path=str(tmp_path), **PIXELS, held_out=0.1)
    with pytest.raises(UsageError, match=f"held_out must leave .* {number} images"):
        few.train_dataloader()


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_stream_gets_over_batches_that_cannot_be_read(table):
    bad = {"bytes": b"no picture", "path": None}
    path = table(list(range(6)), "int64", ["one", bad, bad, bad, "one", bad])

    def labels(done, **ask):
        data = Hub(path=path, **PIXELS, streaming=True, reference_images=2, max_steps=6, **ask)
        data.load_state_dict({"batches": done})
        return [label.tolist() for _, label in data.train_dataloader()]

    whole = labels(0, batch_size=1)
    assert {label for (label,) in whole} == {0, 4}
    assert labels(2, batch_size=1) == whole[2:]
    with pytest.raises(UsageError, match="no known format"):
        labels(0, batch_size=1, on_error="raise")


def test_a_stream_without_a_row_ends(table):
    data = Hub(path=table([], "int64", []), **PIXELS, streaming=True, reference_images=2)
    with pytest.raises(UsageError, match="must hold a picture"):
        next(iter(data.train_dataloader()))


# Settings.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", [0, -1, 1.5, True, "8", None]),
        ("image_size", [0, 8.0, False, "8"]),
        ("channels", [0, 2, 4, 3.0, True, "3"]),
        ("max_steps", [0, 1e3, True]),
        ("seed", [-1, 0.5, True, None]),
        ("workers", [-1, 1.5, True]),
        ("held_out", [-0.1, 1, 1.0, float("nan"), "0.1", True]),
        ("reference_images", [0, 1, 2.5, True, float("nan")]),
        ("flip", [0, 1, "false", None]),
        ("on_error", ["ignore", None, True]),
        ("background", [-1, 256, 1.5, True, "white", [1, 2], [1, 2, 300], [], None]),
    ],
)
@pytest.mark.parametrize("kind", [Folder, Hub])
def test_settings_of_a_wrong_kind(name, values, kind):
    for value in values:
        with pytest.raises(UsageError, match=rf"^{name} must be .*, got "):
            kind(**{"path": "x", "image_size": 8, "channels": 3} | {name: value})


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_settings():
    ask = {name: np.int64(3) for name in ("channels", "batch_size", "seed", "reference_images")}
    data = Folder(path="x", image_size=np.int16(8), held_out=np.float32(0.5), **ask)
    for name in (*ask, "image_size"):
        assert type(getattr(data, name)) is int
    assert type(data.held_out) is float


def test_orders_of_large_seeds_differ():
    keys = [0, 1, 4294, 4295, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**64, 2**64 + 1, 10**30]
    pairs = [(seed, epoch) for seed in keys for epoch in (None, 0, 1, 1_000_003, 2**32)]
    # Outside of a training, seed 0 and 1 have the order of seed 0 in epoch 0 and 1.
    orders = {tuple(permutation(40, s, epoch=e).tolist()) for s, e in pairs if (s, e) != (0, None)}
    assert len(orders) == len(pairs) - 2
    assert all(sorted(order) == list(range(40)) for order in orders)


@pytest.mark.parametrize("seed", [0, 7, 4294])
def test_orders_of_small_seeds_stay(seed):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 5)
    assert torch.equal(permutation(50, seed, epoch=5), torch.randperm(50, generator=generator))
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(permutation(50, seed), torch.randperm(50, generator=generator))


@pytest.mark.parametrize("seed", [2**32, 2**70])
def test_large_seeds_are_accepted(folder, table, seed):
    def seen(kind, seed, **ask):
        data = kind(**ask, **PIXELS, batch_size=6, max_steps=3, seed=seed)
        assert len(data.image) >= 2
        return torch.cat([label for _, label in data.train_dataloader()]).tolist()

    assert seen(Folder, seed, path=str(folder)) != seen(Folder, 0, path=str(folder))
    ask = {"path": table([0, 1] * 10, "int64"), "streaming": True, "reference_images": 2}
    assert seen(Hub, seed, **ask) == seen(Hub, seed, **ask) != seen(Hub, 0, **ask)


def test_another_seed_is_another_order_of_a_stream(table):
    path = table(list(range(12)), "int64")

    def order(seed, epoch):
        ask = {"streaming": True, "reference_images": 2, "batch_size": 12, "max_steps": 9}
        data = Hub(path=path, **PIXELS, seed=seed, **ask)
        data.load_state_dict({"batches": epoch})
        return tuple(next(iter(data.train_dataloader()))[1].tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(found) == list(range(12)) for found in orders)


# Lightning's ways through an epoch.


class Recorder(L.LightningModule):
    """Keeps the batches that it is trained and validated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(tuple(batch[0][:, 0, 0, 0].tolist()))
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(batch[0][:, 0, 0, 0].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trained(folder):
    """Trains on batches of 5 of the folder's 12 pictures, and returns them in their order."""

    def train(data=None, max_steps=7, **options):
        recorder = Recorder()
        data = data or Folder(path=str(folder), **PIXELS, batch_size=5, max_steps=7)
        trainer = L.Trainer(
            **QUIET | {"enable_checkpointing": False} | options, max_steps=max_steps
        )
        trainer.fit(recorder, data)
        assert trainer.global_step == max_steps
        assert data.batches_seen() == data.state_dict()["batches"] == len(recorder.trained)
        return recorder

    return train


@pytest.fixture
def order(folder):
    """The first 40 batches of the folder, without Lightning."""
    data = Folder(path=str(folder), **PIXELS, batch_size=5, max_steps=40)
    return [tuple(image[:, 0, 0, 0].tolist()) for image, _ in data.train_dataloader()]


@pytest.mark.parametrize(
    ("max_steps", "options", "expected"),
    [
        (7, {}, 7),
        (17, {}, 17),  # three epochs
        (7, {"accumulate_grad_batches": 3}, 21),
        (17, {"accumulate_grad_batches": 2}, 34),
        (13, {"limit_train_batches": 3}, 13),
        (13, {"limit_train_batches": 0.5}, 13),
        (13, {"limit_train_batches": 100}, 13),
    ],
    ids=str,
)
def test_the_order_continues_over_epochs(trained, order, max_steps, options, expected):
    assert trained(max_steps=max_steps, **options).trained == order[:expected]


@pytest.mark.parametrize(("limit", "length"), [(3, 3), (0.5, 3), (None, 7), (100, 7)])
def test_every_epoch_has_the_same_length(trained, limit, length):
    ends = []

    class Epochs(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ends.append(len(pl_module.trained))

    trained(max_steps=21, limit_train_batches=limit, callbacks=[Epochs()])
    assert ends == list(range(length, 22, length))


def test_overfitting_repeats_its_batches(trained, order):
    recorder = trained(max_steps=9, overfit_batches=2, val_check_interval=1.0)
    assert recorder.trained == (order[:2] * 5)[:9]
    assert set(map(len, recorder.validated)) == {12}


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # Lightning takes it for shuffled
def test_overfitting_a_stream(trained, stream):
    data = Hub(**stream(12), batch_size=5, max_steps=7)
    found = trained(data, max_steps=6, overfit_batches=2).trained
    assert found == found[:2] * 3
    assert found[0] != found[1]


def test_a_single_batch_for_development(trained, order):
    assert trained(max_steps=1, fast_dev_run=True).trained == order[:1]


def test_another_training_with_the_same_data_starts_again(trained, folder, order):
    data = Folder(path=str(folder), **PIXELS, batch_size=5, max_steps=7)
    assert trained(data, max_steps=9).trained == order[:9]
    assert trained(data, max_steps=17).trained == order[:17]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_a_validation_knows_the_batches(trained, tmp_path, accumulate):
    class Saver(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "it.ckpt")

    ask = {"accumulate_grad_batches": accumulate, "callbacks": [Saver()]}
    trained(val_check_interval=3 * accumulate, max_steps=3, **ask)
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)["Folder"]
    assert state["batches"] == 3 * accumulate


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 4}]
)
@pytest.mark.parametrize("stop", [3, 4, 7, 8])
def test_a_resumed_training_continues_the_order(folder, order, tmp_path, options, stop):
    def train(max_steps, start=None):
        recorder = Recorder()
        data = Folder(path=str(folder), **PIXELS, batch_size=5, max_steps=7)
        trainer = L.Trainer(
            **QUIET | options, enable_checkpointing=False, max_steps=max_steps, limit_val_batches=0
        )
        trainer.fit(recorder, data, ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(tmp_path / "it.ckpt")
        return recorder.trained

    first = train(stop)
    number = 17 * options.get("accumulate_grad_batches", 1)
    assert first + train(17, tmp_path / "it.ckpt") == order[:number]


@pytest.mark.parametrize(
    "columns",
    [{"image_column": None}, {"image_column": {"a": 1}}, {"label_column": ["label"]}],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_columns_are_named_by_texts(columns, tmp_path):
    (name,) = columns
    with pytest.raises(UsageError, match=f"^{name} must name a column"):
        Hub(path=str(tmp_path), image_size=8, channels=1, **columns)


def test_pictures_are_not_structures_of_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": 1, "path": 2}], "label": [0]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train-0.parquet"))
    with pytest.raises(UsageError, match="image_column must be a column of pictures"):
        Hub(path=str(tmp_path), image_size=8, channels=1).image  # noqa: B018
