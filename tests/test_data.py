"""Images of every source come out the same way, in an order that a seed fixes."""

import io
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from rolldiff import Decoder
from rolldiff.data import Digits, Folder, Hub, module
from rolldiff.data.datasets import ResumableSampler
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


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_cannot_be_read_is_named(folder, in_memory, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 2**32 if in_memory else 0)
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / ".DS_Store").write_text("hidden files are nobody's pictures")
    ask = {"path": str(folder), "image_size": 8, "channels": 1, "batch_size": 13, "max_steps": 1}
    with pytest.warns(UserWarning, match=r"skipped: .*notes\.txt"):
        image, _ = next(iter(Folder(**ask).train_dataloader()))
    assert len(image) == 13  # none is missing from the batch
    with pytest.raises(ValueError, match=r"pictures, got .*notes\.txt"):
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
    with pytest.raises(ValueError, match=r"data\.path=FOLDER"):
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
