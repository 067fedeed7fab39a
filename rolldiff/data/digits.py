"""The handwritten digits that ship with scikit-learn: 1,797 scans of 8 x 8 pixels in 17 greys.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository (1998), the test part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rolldiff.data.images import Images
from rolldiff.data.records import Record
from rolldiff.data.sets import Kept

__all__ = ["Digits"]


@dataclass(kw_only=True, eq=False)
class Digits(Images):
    """All the digits, in [-1, 1].

    1,797 scans are few, so none is held out by default: distances are to scans that were trained
    on.
    """

    image_size: int = 8
    channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.image_size, self.channels) != (8, 1):
            raise ValueError(
                "digits must be 8 x 8 pixels of 1 channel, got image_size "
                f"{self.image_size} and channels {self.channels}"
            )

    def records(self) -> Sequence[Record]:
        return ()  # there are no files

    def decoded(self) -> Kept:
        # Imported here: only those who train on digits need scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        return Kept(image, torch.tensor(digits.target, dtype=torch.long))
