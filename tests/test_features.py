"""Feature extractors: frozen, named, hashed, and each the network that it says it is."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rolldiff.errors import UsageError
from rolldiff.evaluation import features
from rolldiff.evaluation.features import (
    Classifier,
    Pixels,
    as_extractor,
    train_classifier,
)
from rolldiff.evaluation.metrics import frechet_distance
from rolldiff.evaluation.networks import ResNet56


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


@pytest.mark.slow
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
