"""Images read as they come, for sets too large to be fetched first."""

from collections.abc import Callable, Iterator
from itertools import chain, count, islice

from torch import Tensor
from torch.utils.data import IterableDataset

from rolldiff.data.records import Corrupt, Record, decoded
from rolldiff.data.sets import Kept

__all__ = ["Streamed"]


class Streamed(IterableDataset):
    """Batches from records in order, one epoch of the source after another.

    Batch `b` always holds the records from `b` times the batch size on; a picture that cannot be
    read leaves its place to another one of the batch. Resuming reads past what was seen.

    Args:
        epoch: the records of an epoch.
        image_size: side in pixels.
        channels: 1 or 3.
        corrupt: whether a picture that cannot be read is skipped or refused.
        batch_size: images a batch and process.
        batches: batches after which the loader says that an epoch is over.
        done: tells how many batches were drawn before.
        rank: which process this is.
        world: how many there are.
    """

    def __init__(
        self,
        epoch: Callable[[int], Iterator[Record]],
        *,
        image_size: int,
        channels: int,
        corrupt: Corrupt,
        batch_size: int,
        batches: int,
        done: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.epoch = epoch
        self.image_size, self.channels, self.corrupt = image_size, channels, corrupt
        self.batch_size, self.batches, self.done = batch_size, batches, done
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = self.done()
        records = chain.from_iterable(self.epoch(number) for number in count())
        together = self.batch_size * self.world
        # Not a slice's start: skipping is the source's work, decoding is spared.
        for _ in islice(records, done * together):
            pass
        for _ in range(done, (done // self.batches + 1) * self.batches):
            share = list(islice(records, together))[self.rank :: self.world]
            image, label = decoded(
                share, image_size=self.image_size, channels=self.channels, corrupt=self.corrupt
            )
            place = [i % len(image) for i in range(self.batch_size)]
            batch = Kept(image, label)
            yield batch[label.new_tensor(place)]
