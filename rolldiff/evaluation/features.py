"""Feature extractors: what a distance between images is computed on.

An extractor maps images `[B, C, H, W]`, floats in about [-1, 1], to features `[B, F]`. It is frozen
and in evaluation mode, and computes in float32 without gradients or autocast, whatever the context
of the call. Its Fréchet distance is called `fd_<name>`; two distances are comparable if the names
and the hashes of the weights are the same. Published networks are in `networks.py`.
"""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.errors import UsageError, finite_number, whole_number
from rolldiff.evaluation.images import all_finite
from rolldiff.files import written_whole

__all__ = [
    "Classifier",
    "Extractor",
    "Pixels",
    "as_extractor",
    "short_hash",
    "train_classifier",
    "unclassifiable",
]


class Extractor(nn.Module):
    """A frozen network from images to features. Subclasses define `features`.

    Attributes:
        name: lower-case letters, digits and underscores.
        channels: the numbers of channels that images may have; empty for any.
    """

    name: str
    channels: tuple[int, ...] = ()

    @property
    def hash(self) -> str:
        """`short_hash` of the weights; of the name if there are none."""
        return short_hash(self.state_dict(), name=self.name)

    @property
    def distance_name(self) -> str:
        """The name of the Fréchet distance between these features."""
        return f"fd_{self.name}"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The features of images whose shape has been checked."""
        raise NotImplementedError

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The features of images.

        Raises:
            UsageError: if the images have the wrong shape or are not finite, or the features are
                not `[B, F]` or not finite.
        """
        if image.ndim != 4 or (self.channels and image.shape[1] not in self.channels):
            channels = " or ".join(map(str, self.channels)) or "C"
            raise UsageError(
                f"image must have shape (B, {channels}, H, W), got {tuple(image.shape)}"
            )
        if not all_finite(image):
            raise UsageError(f"image must be finite, got pixels for {self.name} that are not")
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            features = self.features(image.float())
        if not isinstance(features, Tensor) or features.shape[:-1] != image.shape[:1]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise UsageError(f"features must be a tensor of shape (B, F), got {found}")
        if not all_finite(features):
            raise UsageError(f"features of {self.name} must be finite, got some that are not")
        return features

    def train(self, mode: bool = True) -> "Extractor":
        """Keeps evaluation mode, even as part of a module that is trained."""
        return super().train(False)

    def freeze(self) -> None:
        """Switch to evaluation mode and turn the gradients of all parameters off."""
        self.requires_grad_(False).eval()


class Pixels(Extractor):
    """The pixels themselves, flattened."""

    name = "pixels"

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        return image.flatten(1)


def as_extractor(module: nn.Module, *, name: str | None = None) -> Extractor:
    """Any module from images to features as an extractor; extractors are returned unchanged.

    Args:
        module: maps `[B, C, H, W]` to `[B, F]`. It is frozen and put in evaluation mode: pass a
            copy of a module that is still being trained.
        name: its name; by default its attribute `name`, or else its class name in lower case.

    Raises:
        UsageError: if the name has other than lower-case letters, digits and underscores.
    """
    if isinstance(module, Extractor):
        return module
    if name is None:
        own = getattr(module, "name", None)
        name = own if isinstance(own, str) else type(module).__name__.lower()
    if not re.fullmatch("[a-z0-9_]+", name):
        raise UsageError(
            f"name must be of lower-case letters, digits and underscores, got {name!r}"
        )
    return _ModuleExtractor(module, name)


class _ModuleExtractor(Extractor):
    """A module of the user's, with a name; its own attribute `hash` takes precedence."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.freeze()

    @property
    def hash(self) -> str:
        own = getattr(self.module, "hash", None)
        return own if isinstance(own, str) else short_hash(self.module.state_dict(), name=self.name)

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        return self.module(image)


def short_hash(state: dict[str, Any], *, name: str = "") -> str:
    """Twelve hexadecimal digits of a SHA-256 over the names, shapes and bytes of tensors.

    Args:
        state: tensors on any device, by name; other values are ignored.
        name: hashed instead if there are no tensors.
    """
    digest = hashlib.sha256()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    if not tensors:
        digest.update(name.encode())
    return digest.hexdigest()[:12]


# A classifier trained on the data

# To be changed with its architecture or its training, so that no old file is read.
CLASSIFIER_VERSION = 1
MAX_CLASSES = 2**16  # larger labels are numbers of something else


class Classifier(Extractor):
    """A small network with 64 features before its linear layer, for images of 8 to 64 pixels.

    It is meant for data that no published network covers.

    Args:
        channels: of the images.
        num_classes: of the labels.

    Attributes:
        accuracy: on the tenth of the images that was held out, in [0, 1]; NaN before training.
    """

    name = "classifier"

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.channels = (channels,)
        self.accuracy = float("nan")
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        # The four quadrants are pooled apart, so that the features depend on where a stroke is.
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, 64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(64, num_classes)
        self.freeze()

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 64"]:
        return self.body(image)

    def logits(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """The class scores before the softmax."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.linear(self(image))


def unclassifiable(image: Float[Tensor, "N C H W"], label: Int[Tensor, " N"]) -> str | None:
    """Why `train_classifier` refuses images and labels, or None if it takes them."""
    if image.ndim != 4 or not all(8 <= size <= 64 for size in image.shape[2:]):
        return f"image must have shape (N, C, H, W) with 8 … 64 pixels, got {tuple(image.shape)}"
    if len(image) < 10 or label.shape != image.shape[:1]:
        return (
            "ten images and a label for each are needed at least, got "
            f"{len(image)} and labels of shape {tuple(label.shape)}"
        )
    if label.is_floating_point() or label.min() < 0 or label.max() >= MAX_CLASSES:
        lowest, highest = label.min().item(), label.max().item()
        return (
            f"label must be integers in 0 … {MAX_CLASSES - 1}, got {label.dtype} in "
            f"{lowest} … {highest}"
        )
    if label.min() == label.max():
        return f"label must be of two classes or more, got only {int(label[0])}"
    if not all_finite(image):
        return "image must be finite, got pixels that are not"
    return None


def train_classifier(
    image: Float[Tensor, "N C H W"],
    label: Int[Tensor, " N"],
    *,
    seed: int = 0,
    steps: int = 1000,
    folder: str | Path | None = None,
) -> Classifier:
    """A classifier of these images, trained, or read from the cache folder.

    It is trained on nine tenths of the images with AdamW and a one-cycle learning rate, on one CPU
    thread and without touching the global random state. On one machine the same data and seed give
    the same weights; on another machine the last bits may differ, which `hash` shows.

    Args:
        image: in about [-1, 1], of 8 to 64 pixels per side, ten or more.
        label: the class of each, 0 or more.
        seed: of the initial weights, the order of the images, and the held-out tenth.
        steps: batches of 128 images.
        folder: the cache folder; None takes `rolldiff` in `$XDG_CACHE_HOME` or in `~/.cache`.

    Returns:
        The classifier, on the CPU.

    Raises:
        UsageError: if a classifier of such data cannot be trained, see `unclassifiable`, `steps` or
            `seed` is out of range, or the folder cannot be written.
    """
    if why := unclassifiable(image, label):
        raise UsageError(why)
    steps, seed = whole_number(steps, "steps"), whole_number(seed, "seed", minimum=0)

    image, label = image.detach().float().cpu(), label.detach().long().cpu()
    num_classes = int(label.max()) + 1
    key = f"{CLASSIFIER_VERSION} {seed} {steps} {short_hash({'image': image, 'label': label})}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = _cache_folder(folder) / f"classifier-{digest}.safetensors"
    if path.is_file():
        try:
            return _read_classifier(path, Classifier(image.shape[1], num_classes))
        except ValueError as error:
            warnings.warn(f"{path} is damaged and is trained again: {error}", stacklevel=2)
    threads = torch.get_num_threads()
    try:
        # Sums depend on the number of threads, and small operations do not gain from several.
        torch.set_num_threads(1)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            classifier = _train(image, label, seed=seed, steps=steps)
    finally:
        torch.set_num_threads(threads)
    _write_classifier(classifier, path)
    return classifier


def _train(image: Tensor, label: Tensor, *, seed: int, steps: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the generators of the other devices too.
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(image.shape[1], int(label.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(image), generator=generator)
    held_out, rest = shuffled.tensor_split([len(image) // 10])
    network = nn.Sequential(classifier.body, classifier.linear).requires_grad_().train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    order = torch.empty(0, dtype=torch.long)
    batch_size = min(128, len(rest))
    for _ in range(steps):
        if len(order) < batch_size:
            order = rest[torch.randperm(len(rest), generator=generator)]
        batch, order = order[:batch_size], order[batch_size:]
        loss = F.cross_entropy(network(image[batch]), label[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    classifier.freeze()
    correct = [classifier.logits(image[i]).argmax(1) == label[i] for i in held_out.split(500)]
    classifier.accuracy = float(torch.cat(correct).double().mean())
    return classifier


def _write_classifier(classifier: Classifier, path: Path) -> None:
    metadata = {"hash": classifier.hash, "accuracy": str(classifier.accuracy)}
    with written_whole(path) as part:
        save_file(classifier.state_dict(), part, metadata=metadata)


def _read_classifier(path: Path, classifier: Classifier) -> Classifier:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if short_hash(state) != metadata["hash"]:
            raise UsageError(f"hash must be {metadata['hash']}, got {short_hash(state)}")
        classifier.load_state_dict(state)
        classifier.accuracy = finite_number(
            float(metadata["accuracy"]), "accuracy", minimum=0, maximum=1
        )
        return classifier
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def _cache_folder(folder: str | Path | None) -> Path:
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification says to ignore a relative path.
        folder = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "rolldiff"
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder must be one that can be made, got {folder}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"folder must be one that can be written, got {folder}")
    return folder
