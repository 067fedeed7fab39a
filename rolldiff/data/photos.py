"""Photographs at their full resolution, of which training sees small squares."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from rolldiff.data.datasets import Crops, permutation, readable
from rolldiff.data.module import Images
from rolldiff.data.sources import Folder
from rolldiff.errors import UsageError, warn_user, whole_number
from rolldiff.pixels import Load, Record, load_image

__all__ = ["Photos"]

# Of scikit-image's pictures, those that are photographs; the last seven are grey.
BUNDLED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "brick.png",
    "camera.png",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
)


@dataclass(kw_only=True, eq=False)
class Photos(Images):
    """Squares at random places of photographs, without classes.

    `held_out` is a fraction of the photographs, so that no part of a held-out one is trained on.

    Args:
        path: a folder of photographs, see `Folder`; None takes the two of scikit-learn and the
            fifteen of scikit-image, which is then needed.
        crops: number of squares; large photographs have more of them.
    """

    path: str | Path | None = None
    crops: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.crops = whole_number(self.crops, "crops", maximum=2**24)

    @cached_property
    def photos(self) -> list[Tensor]:
        """The photographs, those of the training first, then those held out.

        Raises:
            UsageError: if there is none that is large enough.
        """
        records = (
            _bundled()
            if self.path is None
            else Folder(
                path=self.path, image_size=self.image_size, channels=self.channels
            ).records()
        )
        photos = []
        for photo, _ in readable(records, self.load, on_error=self.on_error):
            if min(photo.shape[1:]) < self.image_size:
                warn_user(
                    f"left out: a photograph must have {self.image_size} pixels or more on each "
                    f"side, got {tuple(photo.shape[1:])}"
                )
                continue
            photos.append(photo)
        count = self._count_held_out(photos)
        if len(photos) - count < 1 or (self.held_out and not count):
            raise UsageError(
                "data must hold a photograph to train on, and one to hold out with held_out: got "
                f"{len(photos)} and held_out {self.held_out}"
            )
        order = permutation(len(photos), self.seed) if count else torch.arange(len(photos))
        return [photos[i] for i in order.tolist()]

    @property
    def load(self) -> Load:
        """Decodes one photograph, as large as it is."""
        return partial(load_image, image_size=None, channels=self.channels, background=self._color)

    def build_dataset(self) -> Dataset:
        areas = torch.tensor([float(p[0].numel()) for p in self.photos])
        generator = torch.Generator().manual_seed(0)
        photo = torch.multinomial(areas, self.crops, replacement=True, generator=generator)
        return Crops(self.photos, self.image_size, photo=photo)

    def _count_held_out(self, photos: list[Tensor]) -> int:
        return int(self.held_out * len(photos))

    @cached_property
    def _split(self) -> tuple[Int[Tensor, " A"], Int[Tensor, " B"]]:
        assert isinstance(self._stored, Crops)
        held_out = self._stored.photo >= len(self.photos) - self._count_held_out(self.photos)
        return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def _bundled() -> list[Record]:
    from sklearn.datasets import load_sample_images

    try:
        import skimage
    except ImportError as error:
        raise UsageError(
            "data.path must be a folder of photographs; without one, those of scikit-image are "
            "needed: pip install scikit-image"
        ) from error
    folder = Path(skimage.__file__).parent / "data"
    files = [folder / name for name in BUNDLED]
    files += [Path(name) for name in load_sample_images().filenames]
    return [Record(str(file), file, 0) for file in files]
