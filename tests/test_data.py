"""Images of every source come out the same way, in an order that a seed fixes."""

import io
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageCms

from rolldiff import Decoder
from rolldiff.data import Digits, Folder, Hub, module
from rolldiff.data.datasets import ResumableSampler
from rolldiff.data.pixels import Record, load_image
from rolldiff.errors import UsageError
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
def test_streaming_goes_on_where_it_was(shards, monkeypatch):
    # datasets waits five seconds whenever a stream is left before its end
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)

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
        {"streaming": True},
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
