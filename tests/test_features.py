"""Feature extractors: frozen, named, hashed, and each the network that it says it is."""

import hashlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rolldiff.errors import UsageError
from rolldiff.evaluation import features
from rolldiff.evaluation.features import (
    Classifier,
    Inception,
    Pixels,
    ResNet56,
    as_extractor,
    train_classifier,
)
from rolldiff.evaluation.metrics import frechet_distance

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "resnet56-cifar10.safetensors"
CIFAR = SHARED / "data" / "cifar10"


class Mean(nn.Module):
    """Somebody's own network, which is not frozen and minds its mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 5)

    def forward(self, image):
        return self.linear(self.norm(image).mean((2, 3)))


@pytest.fixture
def resnet(tmp_path):
    """ResNet-56 with random weights, from a file with the names of the published one."""
    generator = torch.Generator().manual_seed(0)
    state = {"linear.bias": torch.zeros(10)}

    def draw(name, *shape):
        state[f"{name}.weight"] = 0.05 * torch.randn(shape, generator=generator)

    def norm(name, width):
        for key, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            state[f"{name}.{key}"] = torch.full((width,), float(value))

    draw("linear", 10, 64)
    draw("conv1", 16, 3, 3, 3)
    norm("bn1", 16)
    before = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(9):
            for part in (1, 2):
                draw(f"layer{stage}.{block}.conv{part}", width, before, 3, 3)
                norm(f"layer{stage}.{block}.bn{part}", width)
                before = width
    save_file(state, tmp_path / "resnet.safetensors")
    return ResNet56(tmp_path / "resnet.safetensors")


def stripes(count, size=8):
    """Two classes that can be told apart: lighter rows above, or below."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(count) % 2
    image = 0.3 * torch.randn(count, 1, size, size, generator=generator)
    slope = torch.linspace(-0.7, 0.7, size)[:, None]
    return (image + torch.where(label[:, None, None, None] == 0, slope, -slope)).clamp(-1, 1), label


# What holds for all


def all_extractors(resnet):
    return [Pixels(), Classifier(3, 4), resnet, as_extractor(Mean())]


def test_frozen_and_deaf_to_who_calls(resnet):
    image = torch.rand(6, 3, 32, 32) * 2 - 1
    for extractor in all_extractors(resnet):
        whole = nn.Sequential(extractor).train()  # also as a part of what is trained
        expected = extractor(image)
        assert expected.dtype == torch.float32
        assert not expected.requires_grad
        assert not any(module.training for module in extractor.modules())
        assert not any(p.requires_grad for p in extractor.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(whole(image), expected)
        torch.testing.assert_close(extractor(image[:2].double()), expected[:2])
        # Alone or in a batch, an image has the same features.
        single = torch.cat([extractor(part) for part in image.split(1)])
        torch.testing.assert_close(single, expected, rtol=1e-3, atol=1e-4)
        assert frechet_distance(expected, extractor(image)) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes(resnet):
    for extractor in all_extractors(resnet)[1:3]:
        with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
            extractor(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(B, C, H, W\), got \(2, 8, 8\)"):
        Pixels()(torch.zeros(2, 8, 8))


def test_names_and_hashes(resnet):
    found = [(e.name, e.distance_name) for e in all_extractors(resnet)]
    assert found == [
        ("pixels", "fd_pixels"),
        ("classifier", "fd_classifier"),
        ("resnet56_cifar10", "fd_resnet56_cifar10"),
        ("mean", "fd_mean"),
    ]
    assert Pixels().hash == hashlib.sha256(b"pixels").hexdigest()[:12]
    hashes = {extractor.hash for extractor in all_extractors(resnet)}
    assert len(hashes) == 4
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)


def test_the_hash_is_that_of_the_weights():
    module = Mean()
    extractor = as_extractor(module)
    before = extractor.hash
    twin = Mean()
    twin.load_state_dict(module.state_dict())
    assert as_extractor(twin).hash == before
    twin.norm.running_mean[1] += 1e-6  # of what is no parameter too
    assert as_extractor(twin).hash != before
    # The bytes as they lie in the file, whoever reads this in ten years.
    known = as_extractor(nn.Flatten())
    assert known.hash == hashlib.sha256(b"flatten").hexdigest()[:12]
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    text = b"weight torch.float32 (1, 1) " + b"\x00\x00\x80\x3f"
    assert as_extractor(linear).hash == hashlib.sha256(text).hexdigest()[:12]


def test_as_extractor():
    module = Mean()
    assert as_extractor(module, name="vit_b").distance_name == "fd_vit_b"
    pixels = Pixels()
    assert as_extractor(pixels) is pixels
    module.name, module.hash = "mine", "0123456789ab"
    assert (as_extractor(module).name, as_extractor(module).hash) == ("mine", "0123456789ab")
    with pytest.raises(ValueError, match="name must be of lower-case letters.*got 'ViT-B'"):
        as_extractor(module, name="ViT-B")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [lambda image: image, lambda image: image[1:, :, 0, 0], str])
def test_as_extractor_holds_a_module_to_the_contract(wrong):
    module = nn.Identity()
    module.forward = wrong
    with pytest.raises(ValueError, match="features must be a tensor of shape"):
        as_extractor(module)(torch.zeros(3, 1, 4, 4))


class Broken(nn.Module):
    name = "broken"

    def forward(self, image):
        return image.flatten(1) / image.sum()


def test_no_features_that_are_not_finite(resnet):
    """The message says whether the images or the network is broken, and which network."""
    for bad in (torch.nan, torch.inf):
        image = torch.zeros(2, 3, 32, 32)
        image[1, 0, 0, 0] = bad
        for extractor in all_extractors(resnet):
            with pytest.raises(UsageError, match=f"^image must be finite.* {extractor.name} "):
                extractor(image)
    image = torch.zeros(2, 3, 32, 32)
    with pytest.raises(UsageError, match="^features of broken must be finite"):
        as_extractor(Broken())(image)
    with torch.no_grad():
        resnet.conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match="^features of resnet56_cifar10 must be finite"):
        resnet(image)


# The classifier


@pytest.mark.parametrize("size", [8, 20])
def test_training_is_repeatable_and_leaves_the_seed_alone(tmp_path, size):
    image, label = stripes(60, size)
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = train_classifier(image, label, steps=8, folder=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        second = train_classifier(image, label, steps=8, folder=tmp_path / "b")
    assert first.hash == second.hash
    other = train_classifier(image, label, steps=8, seed=1, folder=tmp_path / "a")
    assert other.hash != first.hash
    assert first(image).shape == (60, 64)


def test_it_learns_and_is_judged_on_what_it_did_not_see(tmp_path):
    image, label = stripes(200)
    found = train_classifier(image, label, steps=40, folder=tmp_path)
    assert found.accuracy == 1
    assert (found.logits(image).argmax(1) == label).all()
    # Of labels that are pure chance it knows what it was trained on, and nothing else.
    chance = torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))
    memory = train_classifier(image, chance, steps=100, folder=tmp_path)
    assert (memory.logits(image).argmax(1) == chance).double().mean() > 0.9
    assert memory.accuracy < 0.9


def test_it_is_kept(tmp_path, monkeypatch):
    image, label = stripes(40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = train_classifier(image, label, steps=5)
    (path,) = (tmp_path / "rolldiff").iterdir()
    assert path.suffix == ".safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(features, "_train", lambda *_, **__: pytest.fail("it was trained again"))
        second = train_classifier(image.double(), label.int(), steps=5, folder=path.parent)
    assert (second.hash, second.accuracy) == (first.hash, first.accuracy)
    assert torch.equal(second(image), first(image))
    assert not any(p.requires_grad for p in second.parameters())
    for other in (
        {"image": image + 0.1},
        {"label": 1 - label},
        {"seed": 1},
        {"steps": 6},
    ):
        train_classifier(**{"image": image, "label": label, "steps": 5} | other)
    assert len(list(path.parent.iterdir())) == 5


def change_a_weight(path):
    state = load_file(path)
    state["linear.bias"] += 1
    save_file(state, path, metadata={"hash": "0" * 12, "accuracy": "1"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file(load_file(path), path),
        change_a_weight,
    ],
    ids=["truncated", "empty", "no metadata", "other weights"],
)
def test_a_damaged_file_is_trained_again(tmp_path, damage):
    image, label = stripes(40)
    first = train_classifier(image, label, steps=5, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged and is trained again"):
        again = train_classifier(image, label, steps=5, folder=tmp_path)
    assert again.hash == first.hash
    assert train_classifier(image, label, steps=5, folder=tmp_path).hash == first.hash
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_trained_on(tmp_path):
    image, label = stripes(20)
    for arguments, message in (
        ((image[0], label), r"image must have shape \(N, C, H, W\)"),
        ((image[..., :4], label), "8 … 64 pixels"),
        ((image[:9], label[:9]), "ten images"),
        ((image, label[:9]), "a label for each"),
        ((image, label.float()), "label must be integers"),
        ((image, label - 1), "label must be integers in 0 … 65535, got torch.int64 in -1 … 0"),
        ((image, label * 2**40), "label must be integers in 0 … 65535"),
        ((image, label * 0 + 3), "label must be of two classes or more, got only 3"),
        ((image / 0, label), "image must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(*arguments, folder=tmp_path)
    with pytest.raises(ValueError, match="steps must be a whole number of 1 or more, got 0"):
        train_classifier(image, label, steps=0, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder must be one that can be made"):
        train_classifier(image, label, folder=tmp_path / "file")


@pytest.mark.slow
def test_digits(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    found = train_classifier(image, torch.tensor(digits.target), folder=tmp_path)
    assert found.accuracy > 0.97


# ResNet-56


def test_a_block_equals_its_parts():
    """Option A: the shortcut has every second pixel and zeros in the new channels."""
    block = features._ResNetBlock(4, 8).eval()
    x = torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.bn2.weight)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2].relu()
    assert torch.equal(block(x), expected)


def test_bad_files_of_resnet56(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=f"path must be a file of weights, got {path}"):
        ResNet56(path)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=f"path must be a safetensors file.*got {path}"):
        ResNet56(path)
    save_file({"linear.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="of ResNet-56, got .*weights.safetensors"):
        ResNet56(path)


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"the published weights are not at {WEIGHTS}")
def test_resnet56_knows_its_training_images():
    table = pytest.importorskip("pyarrow.parquet", reason="reading CIFAR-10 needs pyarrow")
    pictures = pytest.importorskip("PIL.Image")
    shards = sorted(CIFAR.glob("train-*.parquet"))
    if not shards:
        pytest.skip(f"CIFAR-10 is not at {CIFAR}")
    rows = next(table.ParquetFile(shards[0]).iter_batches(300)).to_pylist()
    image = torch.stack([pixels(pictures.open(io.BytesIO(row["img"]["bytes"]))) for row in rows])
    label = torch.tensor([row["label"] for row in rows])
    extractor = ResNet56(WEIGHTS)
    found = torch.cat([extractor.logits(part) for part in image.split(100)])
    assert (found.argmax(1) == label).double().mean() > 0.95
    assert extractor(image[:3]).shape == (3, 64)


def pixels(picture):
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1) / 127.5 - 1


# Inception


class Small(nn.Module):
    """In the place of torch-fidelity's network: it loads as that does, and remembers its input."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.linear = nn.Linear(3, 2048)
        assert features_list == ["2048"]
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, image):
        assert image.dtype == torch.uint8
        self.seen = image
        return (self.linear(image.float().mean((2, 3))),)


@pytest.fixture
def fidelity(monkeypatch):
    """An installed torch-fidelity, as far as it is used."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = ModuleType(name)
    module.FeatureExtractorInceptionV3 = Small
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)


def written(folder, content):
    """A file under the name that its hash gives it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"weights-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.usefixtures("fidelity")
def test_inception_sees_saved_images(tmp_path):
    path = written(tmp_path, nn.Linear(3, 2048).state_dict(prefix="linear."))
    extractor = Inception(path)
    image = torch.tensor([-9, -1, -0.999, 0.0, 0.5, 1, 2.0]).view(1, 1, 1, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(image)
    assert found.shape == (1, 2048)
    assert found.dtype == torch.float32
    expected = torch.tensor([0, 0, 0, 128, 191, 255, 255], dtype=torch.uint8)
    assert torch.equal(extractor.network.seen, expected.expand(1, 3, 1, 7))
    # An image that was saved comes out as it was.
    byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    extractor((byte / 127.5 - 1).expand(1, 3, 16, 16))
    assert torch.equal(extractor.network.seen[:, :1], byte)
    with pytest.raises(ValueError, match=r"shape \(B, 1 or 3, H, W\), got \(2, 2, 4, 4\)"):
        extractor(torch.zeros(2, 2, 4, 4))
    # Only the published weights give an FID.
    assert extractor.distance_name == "fd_inception"
    extractor.published = True
    assert extractor.distance_name == "fid"
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.usefixtures("fidelity")
def test_a_file_that_is_not_the_one_in_its_name(tmp_path):
    path = tmp_path / features.INCEPTION
    with pytest.raises(
        ValueError, match=r"must be weights-inception-2015-12-05-6726825d\.pth from"
    ):
        Inception(path)
    path.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()[:8]
    with pytest.raises(ValueError, match=f"must end in the start of its SHA-256.* with {found}"):
        Inception(path)
    path = path.rename(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="must end in the start of its SHA-256"):
        Inception(path)


@pytest.mark.usefixtures("fidelity")
def test_nothing_but_tensors_is_unpickled(tmp_path):
    with pytest.raises(ValueError, match="path must be a file of Inception's weights, got"):
        Inception(written(tmp_path, {"linear.weight": Path("code")}))
    with pytest.raises(ValueError, match="path must be a file of Inception's weights, got"):
        Inception(written(tmp_path, {"linear.weight": torch.zeros(3)}))
    content = written(tmp_path, {"linear.weight": torch.zeros(99)}).read_bytes()[:-99]
    path = tmp_path / f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="path must be a file of Inception's weights, got"):
        Inception(path)


@pytest.mark.usefixtures("fidelity")
def test_inception_where_nothing_can_be_downloaded(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ValueError, match=r"6726825d\.pth from https://github.com/.*no network"):
        Inception()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'x'"), r"pip install rolldiff\[fid\]"),
        (RuntimeError("operator torchvision::nms does not exist"), "a torchvision built for"),
    ],
)
def test_inception_without_its_package(monkeypatch, error, message):
    def refuse(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=message):
        Inception()


def test_inception_of_torch_fidelity(tmp_path):
    """The real package; with random weights, because the published ones are 95 MB."""
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported, Inception is untested: {error}")
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor always loads: this leaves the weights as they are drawn.
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        network = module.FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path="none"
        )
    extractor = Inception(written(tmp_path, network.state_dict()))
    image = torch.rand(2, 1, 16, 16) * 2 - 1
    byte = ((image + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)
    assert torch.equal(extractor(image), network(byte)[0])
    assert extractor(image).shape == (2, 2048)
