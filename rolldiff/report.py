"""What a training run leaves behind: distances, pictures, a summary."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from rolldiff.decoder import Decoder
from rolldiff.metrics import FrechetDistance, distance_between
from rolldiff.pictures import film, rows, sheet

__all__ = ["Summary", "distances", "floor", "pictures"]

BATCH = 600


@dataclass(frozen=True)
class Summary:
    """The run in numbers.

    Attributes:
        seconds: from the first training step to the last file.
        images_seen: training examples, with repetition.
        steps: optimizer steps.
        parameters: numbers in the weights.
        fd_pixels: Fréchet distance in pixel space, by `num_groups`.
        fd_pixels_floor: the same between two random halves of the data, mean of 10 splits.
        samples: generated images behind each distance.
        steps_per_group: solver steps a group.
        device: where it ran.
        threads: CPU threads of torch.
        torch: its version.
    """

    seconds: float
    images_seen: int
    steps: int
    parameters: int
    fd_pixels: dict[str, float]
    fd_pixels_floor: float
    samples: int
    steps_per_group: int
    device: str
    threads: int
    torch: str

    def write(self, path: str | Path) -> None:
        """Write the summary as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """The distances, for a terminal."""
        lines = ["num_groups  fd_pixels"]
        lines += [f"{groups:>10}  {value:9.3f}" for groups, value in self.fd_pixels.items()]
        lines += [f"{'(floor)':>10}  {self.fd_pixels_floor:9.3f}  two halves of the data"]
        return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def distances(
    decoder: Decoder,
    image: Float[Tensor, "B C H W"],
    *,
    label: Int[Tensor, " B"] | None,
    num_groups: Sequence[int],
    steps: int,
    seed: int = 0,
) -> dict[str, float]:
    """The Fréchet distance in pixel space between as many samples as there are images, and these.

    Every `num_groups` decodes the same noise with the same labels.
    """
    found = {}
    for groups in tqdm(num_groups, desc="measuring", unit="setting"):
        metric = FrechetDistance(image[0].numel())
        metric.update(image.flatten(1), real=True)
        for first in range(0, len(image), BATCH):
            count = min(BATCH, len(image) - first)
            cond = None if label is None else label[first : first + count]
            decoded = decoder.decode(
                cond, num_images=count, num_groups=groups, steps=steps, seed=seed, first=first
            )
            metric.update(decoded.image.cpu().flatten(1), real=False)
        found[str(groups)] = float(metric.compute())
    return found


def floor(image: Float[Tensor, "B C H W"], *, splits: int = 10) -> float:
    """The mean distance between two random halves of the images."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(splits):
        real, fake = image[torch.randperm(len(image), generator=generator)].chunk(2)
        total += distance_between(real, fake)
    return total / splits


def pictures(
    decoder: Decoder,
    image: Float[Tensor, "B C H W"],
    folder: Path,
    *,
    label: Int[Tensor, " B"] | None,
    num_groups: Sequence[int],
    steps: int,
    seed: int = 0,
    count: int = 20,
) -> None:
    """Write `samples.png`, a row for each `num_groups`, and `stream.gif`, a batch on its way."""
    # As many of each class as can be, in turn; without labels, the first images.
    chosen = torch.arange(count)
    if label is not None:
        classes = label.unique()
        turns = [(label == c).nonzero()[:, 0] for c in classes]
        chosen = torch.stack([turns[i % len(turns)][i // len(turns)] for i in range(count)])
    cond = None if label is None else label[chosen]
    page = {"data": image[chosen]}
    for groups in num_groups:
        decoded = decoder.decode(cond, num_images=count, num_groups=groups, steps=steps, seed=seed)
        page[f"num_groups {groups}"] = decoded.image
    rows(page).save(folder / "samples.png")
    several = min(num_groups, key=lambda groups: abs(groups - 8))  # enough to see them move
    frames = decoder.stream(
        cond,
        num_images=count,
        num_groups=several,
        overlap=0.5 if several > 1 else 1.0,
        steps=steps,
        seed=seed,
    )
    film((sheet(frame.image, columns=10) for frame in frames), folder / "stream.gif")
