"""A small classifier of the data at hand: features for images that no published network knows.

It is trained from a seed, by one thread of the CPU, and kept in a folder, so that the next call
finds it. On one machine the same data and seed give the same weights; on another they may differ in
the last bits, which its `hash` shows.
"""

import hashlib
import os
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.metrics.features import Extractor, short_hash

__all__ = ["Classifier", "train_classifier"]

# Another architecture or another training is another number, and finds no file of the old one.
VERSION = 1
BATCH = 128
RATE = 3e-3


class Classifier(Extractor):
    """Three convolutions and 64 features before the linear layer, for images of 8 to 64 pixels.

    Args:
        channels: of an image.
        classes: of the labels.

    Attributes:
        accuracy: the share of right answers on the tenth of the images that was held out, in
            [0, 1]; NaN before training.
    """

    name = "classifier"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.accuracy = float("nan")
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        # Four quarters of an image, so that the features know where a stroke is.
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, 64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(64, classes)
        self.freeze()

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 64"]:
        return self.body(image)

    def logits(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """The answers, before the softmax."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.linear(self(image))


def train_classifier(
    image: Float[Tensor, "N C H W"],
    label: Int[Tensor, " N"],
    *,
    seed: int = 0,
    steps: int = 1000,
    folder: str | Path | None = None,
) -> Classifier:
    """A classifier of these images, trained, or read where that was done before.

    It is trained on nine tenths of the images by AdamW with one rise and fall of the learning rate.
    No global random number is drawn.

    Args:
        image: in about [-1, 1], of 8 to 64 pixels a side, ten or more.
        label: the class of each, 0 or more.
        seed: of the weights at the start, the order of the images, and which are held out.
        steps: batches of 128 images.
        folder: where it is kept; `rolldiff` in `$XDG_CACHE_HOME`, or in `~/.cache`, if None.

    Returns:
        The classifier, on the CPU.

    Raises:
        ValueError: if the shapes do not fit, `steps` is not 1 or more, a label is below 0, or the
            folder cannot be written.
    """
    _check(image, label, steps)
    image, label = image.detach().float().cpu(), label.detach().long().cpu()
    key = f"{VERSION} {seed} {steps} {short_hash({'image': image, 'label': label})}"
    path = _folder(folder) / f"classifier-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    path = path.with_suffix(".safetensors")
    if path.is_file():
        try:
            return _read(Classifier(image.shape[1], int(label.max()) + 1), path)
        except ValueError as error:
            warnings.warn(f"{path} is damaged and is trained again: {error}", stacklevel=2)
    threads = torch.get_num_threads()
    try:
        # Sums over threads differ with their number, and small operations gain nothing from them.
        torch.set_num_threads(1)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            classifier = _train(image, label, seed, steps)
    finally:
        torch.set_num_threads(threads)
    _write(classifier, path)
    return classifier


def _train(image: Tensor, label: Tensor, seed: int, steps: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the generators of the other devices too.
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(image.shape[1], int(label.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    held, rest = torch.randperm(len(image), generator=generator).tensor_split([len(image) // 10])
    network = nn.Sequential(classifier.body, classifier.linear).requires_grad_().train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    order = torch.empty(0, dtype=torch.long)
    size = min(BATCH, len(rest))
    for _ in range(steps):
        if len(order) < size:
            order = rest[torch.randperm(len(rest), generator=generator)]
        batch, order = order[:size], order[size:]
        loss = F.cross_entropy(network(image[batch]), label[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    network.eval()
    classifier.freeze()
    right = [classifier.logits(image[part]).argmax(1) == label[part] for part in held.split(500)]
    classifier.accuracy = float(torch.cat(right).double().mean())
    return classifier


def _write(classifier: Classifier, path: Path) -> None:
    metadata = {"hash": classifier.hash, "accuracy": str(classifier.accuracy)}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(classifier.state_dict(), part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(classifier: Classifier, path: Path) -> Classifier:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if short_hash(state) != metadata["hash"]:
            raise ValueError(f"hash must be {metadata['hash']}, got {short_hash(state)}")
        classifier.load_state_dict(state)
        classifier.accuracy = float(metadata["accuracy"])
        return classifier
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _folder(folder: str | Path | None) -> Path:
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is to be ignored, says the XDG specification.
        folder = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "rolldiff"
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder must be one that can be made, got {folder}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"folder must be one that can be written, got {folder}")
    return folder


def _check(image: Tensor, label: Tensor, steps: int) -> None:
    if image.ndim != 4 or not all(8 <= size <= 64 for size in image.shape[2:]):
        raise ValueError(
            f"image must have shape (N, C, H, W) with 8 … 64 pixels, got {tuple(image.shape)}"
        )
    if len(image) < 10 or label.shape != image.shape[:1]:
        raise ValueError(
            "ten images and a label for each are needed at least, got "
            f"{len(image)} and labels of shape {tuple(label.shape)}"
        )
    if label.is_floating_point() or label.min() < 0:
        raise ValueError(f"label must be integers from 0, got {label.dtype} from {label.min()}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
