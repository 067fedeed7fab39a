"""A stream of noise for each sample.

Sample `i` of a seed is the same alone, in any batch and on any number of processes: its stream is
seeded by the pair (seed, i) and drawn on the CPU.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["Streams"]


class Streams:
    """Independent unit noise for the samples `first … first + batch - 1` of a seed.

    Args:
        seed: a whole number; or a generator, from which one number is drawn as the seed; or None
        for
            a seed from torch's global generator.
        batch: samples.
        first: the index of the first sample.

    Raises:
        ValueError: if the seed or the index is negative.
    """

    def __init__(self, seed: int | torch.Generator | None, batch: int, *, first: int = 0) -> None:
        if seed is None or isinstance(seed, torch.Generator):
            on = seed.device if seed is not None else None
            seed = int(torch.randint(2**62, (1,), generator=seed, device=on))
        if not (isinstance(seed, int) and isinstance(first, int)) or min(seed, first) < 0:
            raise ValueError(
                f"seed and first must be whole numbers of 0 or more, got {seed!r} and {first!r}"
            )
        # SeedSequence mixes the pair well; neighbouring seeds of a Mersenne twister are alike.
        states = (
            np.random.SeedSequence((seed, first + i)).generate_state(1, np.uint64)[0]
            for i in range(batch)
        )
        self._generators = [torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in states]

    def normal(self, *shape: int) -> Tensor:
        """Unit noise `[batch, *shape]` in float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])
