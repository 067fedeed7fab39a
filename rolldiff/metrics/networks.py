"""Published networks as feature extractors, with weights from a file that the user gives.

A distance is comparable with one of a paper only under the same weights, so a file is checked
before it is used: against its architecture, and Inception's against the hash in its name as well.
"""

import hashlib
import importlib
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

from rolldiff.errors import reason
from rolldiff.metrics.features import Extractor

__all__ = ["Inception", "ResNet56"]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


class ResNet56(Extractor):
    """ResNet-56 for CIFAR-10 (He et al. 2015, option A shortcuts): 64 features after the pooling.

    It takes images of three channels in [-1, 1]; it was made for 32 x 32 pixels.

    Args:
        path: a safetensors file with `conv1`, `bn1`, `layer1.0.conv1` … `layer3.8.bn2`, `linear`,
            trained on red, green and blue in [0, 1], less `MEAN` and divided by `STD`.

    Raises:
        ValueError: if there is no such file, it is damaged, or it holds another network.
    """

    name = "resnet56_cifar10"
    channels = 3
    mean: Tensor
    std: Tensor

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = _file(path)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(9)))
        self.layer2 = nn.Sequential(_Block(16, 32), *(_Block(32, 32) for _ in range(8)))
        self.layer3 = nn.Sequential(_Block(32, 64), *(_Block(64, 64) for _ in range(8)))
        self.linear = nn.Linear(64, 10)
        for name, values in (("mean", self.MEAN), ("std", self.STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        try:
            self.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"path must be a safetensors file of ResNet-56, got {path}: {reason(error)}"
            ) from error
        self.freeze()

    def features(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 64"]:
        x = ((image + 1) / 2 - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 10"]:
        """The answers for the ten classes, before the softmax."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.linear(self(image))


class _Block(nn.Module):
    """Two convolutions around a shortcut without weights.

    Where the channels double, the shortcut takes every second pixel and pads with zero channels.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before
        self.missing = (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(kept, (0, 0, 0, 0, self.missing, self.missing)))


class Inception(Extractor):
    """Inception v3 as in the published FID: 2,048 features of torch-fidelity's network.

    Images of one channel or three are clipped to [-1, 1] and rounded to 8 bits, `(x + 1) * 127.5`,
    as published distances are those of saved images; the network enlarges them to 299 x 299 as
    TensorFlow 1 did. The distance under it is called `fid`, under other weights of the same network
    `fd_inception`.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release v0.2.0, under
            a name that ends in the start of the file's SHA-256; None downloads it once.

    Raises:
        ValueError: if torch-fidelity is not installed or cannot be imported, there is no such file,
            it is not the one in its name, or it holds another network.
    """

    name = "inception"

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        kind = _fidelity()
        path = _downloaded() if path is None else _file(path, where=f"{INCEPTION} from {RELEASE}")
        data = path.read_bytes()
        found = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
        digest = hashlib.sha256(data).hexdigest()
        if not found or not digest.startswith(found[1]):
            raise ValueError(
                f"path must end in the start of its SHA-256, as {INCEPTION} does, "
                f"got {path} with {digest[:8]}"
            )
        self.published = digest.startswith(INCEPTION[-12:-4])
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            # torch-fidelity would unpickle anything: it gets tensors that were written here.
            clean = io.BytesIO()
            torch.save(state, clean)
            clean.seek(0)
            self.network = kind("inception", ["2048"], feature_extractor_weights_path=clean)
        except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
            raise ValueError(
                f"path must be a file of Inception's weights, got {path}: {reason(error)}"
            ) from error
        self.freeze()

    @property
    def distance(self) -> str:
        return "fid" if self.published else "fd_inception"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2048"]:
        byte = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(byte.expand(-1, 3, -1, -1))[0]

    def check(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"image must have shape (B, 1 or 3, H, W), got {tuple(image.shape)}")


def _fidelity() -> Any:
    try:
        # By name: whoever wants no FID needs neither this nor torchvision.
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ValueError(
            f"Inception needs torch-fidelity: pip install rolldiff[fid] ({reason(error)})"
        ) from error
    except RuntimeError as error:
        # torchvision of another build of torch says only that an operator does not exist.
        raise ValueError(
            "Inception needs a torchvision built for the installed torch "
            f"{torch.__version__}: {reason(error)}"
        ) from error
    return module.FeatureExtractorInceptionV3


def _downloaded() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(RELEASE + INCEPTION, str(path), progress=False)
        except OSError as error:
            raise ValueError(
                f"path must be given where nothing can be downloaded: {INCEPTION} from {RELEASE} "
                f"({reason(error)})"
            ) from error
    return path


def _file(path: str | Path, *, where: str = "a file of weights") -> Path:
    if not Path(path).is_file():
        raise ValueError(f"path must be {where}, got {path}, which is no file")
    return Path(path)
