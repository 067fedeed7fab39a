"""What a training run leaves behind: distances and pictures."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rolldiff.decoder import Decoder
from rolldiff.diffusion.schedule import GroupSchedule
from rolldiff.evaluation.images import labelled_rows, make_grid, save_gif
from rolldiff.evaluation.metrics import pixel_distance
from rolldiff.progress import progress

__all__ = [
    "DecoderReport",
    "Report",
    "Reported",
    "check_ask",
    "device_name",
    "distances",
    "floor",
    "halves",
    "pictures",
    "some",
]

BATCH = 600


class Reported(NamedTuple):
    """What a report found.

    Attributes:
        values: for `summary.json`.
        table: for a terminal.
        try_next: a command that shows what was made.
    """

    values: dict[str, Any]
    table: str
    try_next: str


@runtime_checkable
class Report(Protocol):
    """What is measured and drawn when a training is over."""

    def check(self, model: nn.Module) -> None:
        """Refuse, before the training, what could only fail after it.

        Raises:
            ValueError: if the model cannot do what the report asks.
        """
        ...

    def __call__(
        self, model: nn.Module, image: Tensor, *, label: Tensor, folder: Path, seed: int
    ) -> Reported:
        """Measure, and leave pictures in the folder."""
        ...


@dataclass(frozen=True)
class DecoderReport:
    """Of a decoder: the distance of samples, and pictures, for several group counts.

    Args:
        num_groups: the group counts.
        steps: solver steps a group.
        samples: images, at most, that as many samples are compared to.
    """

    num_groups: Sequence[int]
    steps: int = 16
    samples: int = 2000

    def check(self, model: nn.Module) -> None:
        assert isinstance(model, Decoder)
        check_ask(
            model.layout.num_tokens,
            num_groups=self.num_groups,
            steps=self.steps,
            samples=self.samples,
        )

    def __call__(
        self, model: nn.Module, image: Tensor, *, label: Tensor, folder: Path, seed: int
    ) -> Reported:
        assert isinstance(model, Decoder)
        image, label = some(image, label, self.samples, seed=seed)
        cond = label if model.conditioning.num_classes else None
        ask: dict[str, Any] = {"label": cond, "num_groups": self.num_groups, "steps": self.steps}
        pictures(model, image, folder, seed=seed, **ask)
        found = distances(model, image, seed=seed, **ask)
        limit = floor(image)
        lines = ["num_groups  fd_pixels"]
        lines += [f"{groups:>10}  {value:9.3f}" for groups, value in found.items()]
        lines += [f"{'(floor)':>10}  {limit:9.3f}  two halves of the data"]
        several = [groups for groups in found if groups != "1"] or ["1"]
        best = min(several, key=found.__getitem__)
        return Reported(
            {
                "fd_pixels": found,
                "fd_pixels_floor": limit,
                "samples": len(image),
                "steps_per_group": self.steps,
            },
            "\n".join(lines),
            f"rolldiff decode ckpt={folder} num_groups={best} overlap=0.5 steps=16 "
            "num_images=64 out=images.png",
        )


def check_ask(
    num_tokens: int,
    *,
    num_groups: Sequence[int],
    overlap: float = 0.0,
    steps: int,
    samples: int,
) -> None:
    """Refuse what no report can be made of.

    Args:
        num_tokens: of the decoder.
        num_groups: the group counts.
        overlap: of the schedule.
        steps: solver steps a group.
        samples: images that are compared.

    Raises:
        ValueError: if one of them is out of range, or there is no group count.
    """
    if not num_groups:
        raise ValueError("report.num_groups must hold a value at least, got none")
    for count in num_groups:
        GroupSchedule(num_tokens=num_tokens, num_groups=count, overlap=overlap, steps=steps)
    if samples < 4:  # they are halved, and a distance needs two
        raise ValueError(f"report.samples must be 4 or more, got {samples}")


def some(image: Tensor, label: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """As many images and labels at most, drawn without replacement."""
    if len(image) <= count:
        return image, label
    chosen = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))[:count]
    return image[chosen], label[chosen]


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
    for groups in progress(num_groups, "measuring", unit="setting"):
        drawn = []
        for first in range(0, len(image), BATCH):
            count = min(BATCH, len(image) - first)
            cond = None if label is None else label[first : first + count]
            decoded = decoder.decode(
                cond, num_images=count, num_groups=groups, steps=steps, seed=seed, start_index=first
            )
            drawn.append(decoded.image.cpu())
        found[str(groups)] = pixel_distance(image, torch.cat(drawn))
    return found


def floor(image: Float[Tensor, "B C H W"], *, splits: int = 10) -> float:
    """The mean distance between two random halves of the images."""
    return sum(pixel_distance(*pair) for pair in halves(image, splits)) / splits


def halves(rows: Float[Tensor, "B ..."], splits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Two random halves, several times; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(splits):
        first, second = rows[torch.randperm(len(rows), generator=generator)].chunk(2)
        yield first, second


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
    # As many of each class as can be, in turn; without labels, the first images. Few go round.
    chosen = torch.arange(count) % len(image)
    if label is not None:
        turns = [(label == c).nonzero()[:, 0] for c in label.unique()]
        places = (divmod(i, len(turns)) for i in range(count))
        chosen = torch.stack([turns[turn][place % len(turns[turn])] for place, turn in places])
    cond = None if label is None else label[chosen]
    page = {"data": image[chosen]}
    for groups in num_groups:
        decoded = decoder.decode(cond, num_images=count, num_groups=groups, steps=steps, seed=seed)
        page[f"num_groups {groups}"] = decoded.image
    labelled_rows(page).save(folder / "samples.png")
    several = min(num_groups, key=lambda groups: abs(groups - 8))  # enough to see them move
    frames = decoder.stream(
        cond,
        num_images=count,
        num_groups=several,
        overlap=0.5 if several > 1 else 1.0,
        steps=steps,
        seed=seed,
    )
    save_gif((make_grid(frame.image, columns=10) for frame in frames), folder / "stream.gif")
