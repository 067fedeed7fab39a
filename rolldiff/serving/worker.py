"""`Worker`: one thread that owns the model and decodes what is asked for.

Requests of the same settings and size that wait when a decoding begins share its batch; each keeps
its own seed, so that it gets the image that it would get alone, to rounding. A decoding stops
within a step once all its clients have gone away.
"""

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from rolldiff.decoder import DecodeRun
from rolldiff.diffusion.sampler import State
from rolldiff.errors import UsageError
from rolldiff.evaluation.images import all_finite, to_bytes
from rolldiff.serving.model import Limits, Served
from rolldiff.serving.wire import ImageRequest, Picture, RequestError

__all__ = ["Job", "Worker"]

log = logging.getLogger("rolldiff.serving")


@dataclass(eq=False)
class Job:
    """A request that waits or runs.

    Attributes:
        request: what it asks for.
        emit: takes its frames, the last of them finished, or why there are none; called by the
            worker.
        cancelled: whether nobody waits for it any more.
    """

    request: ImageRequest
    emit: Callable[[Picture | RequestError], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def kin(self) -> Hashable:
        """Jobs of equal kin can share a batch; those of an edit share their order with no other."""
        asked = self.request
        if asked.image is not None:
            return id(self)
        return asked.config, asked.size, asked.label is None

    def due(self, run: DecodeRun, state: State) -> bool:
        """Whether a frame of a state is sent."""
        return run.shows(state, min(self.request.partial_images + 1, run.schedule.num_steps))


class Worker:
    """A queue and its thread.

    Args:
        served: the model, used by this thread alone.
        limits: of the queue and of a batch.
    """

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="rolldiff-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End within a step; what waits or runs is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait and that run."""
        with self._changed:
            return len(self._waiting), len(self._running)

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: if the queue is full or the server ends.
        """
        with self._changed:
            if self._stopping:
                raise RequestError("the server is shutting down", status=503)
            if len(self._waiting) + len(self._running) >= self.limits.requests:
                raise RequestError(
                    f"requests must be at most {self.limits.requests} at a time; try again later",
                    status=429,
                    code="rate_limit_exceeded",
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more; one that has not begun frees its place."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    for job in self._waiting:
                        job.emit(RequestError("the server is shutting down", status=503))
                    return
                jobs = self._running = self._next_batch()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # requests are told what was not trained
                    self._decode(jobs)
            except RequestError as refused:
                _tell(jobs, refused)
            except UsageError as error:
                _tell(jobs, RequestError(str(error)))
            except Exception:  # the next request may be fine
                log.exception("a decoding failed")
                _tell(
                    jobs, RequestError("the decoding failed; the server's log says why", status=500)
                )
            finally:
                with self._changed:
                    self._running = []

    def _next_batch(self) -> list[Job]:
        """The first job, and those behind it that fit, in their order."""
        first = self._waiting.popleft()
        jobs, images = [first], first.request.n
        if self.served.prior is not None:
            return jobs
        for job in list(self._waiting):
            if job.kin == first.kin and images + job.request.n <= self.limits.batch:
                self._waiting.remove(job)
                jobs.append(job)
                images += job.request.n
        return jobs

    def _decode(self, jobs: Sequence[Job]) -> None:
        asked = jobs[0].request
        run = self.served.prepare(
            [job.request.label for job in jobs],
            asked.config,
            seeds=[(job.request.seed, job.request.n) for job in jobs],
            size=asked.size,
            image=None if asked.image is None else asked.image.float() / 127.5 - 1,
            mask=asked.mask,
        )
        for state in run.steps():
            if self._stopping:
                raise RequestError("the server is shutting down", status=503)
            alive = [job for job in jobs if not job.cancelled.is_set()]
            if not alive:
                return
            due = [job for job in alive if job.due(run, state)]
            if due:
                self._show(run, state, jobs, due=due)

    def _show(
        self, run: DecodeRun, state: State, jobs: Sequence[Job], *, due: Sequence[Job]
    ) -> None:
        """Make one frame of the batch, and give each job that is due its part."""
        frame = run.frame(state)
        if not all_finite(frame.image):
            raise RequestError("the decoding gave pixels that are not finite", status=500)
        asked, rows = jobs[0].request, frame.finished.all(dim=1).long()
        names = run.decoder.conditioning.names
        given = names if asked.label is not None or self.served.prior is not None else ()
        picture = Picture(
            pixels=to_bytes(frame.image),
            facts={
                "tau": frame.tau,
                "nfe": frame.nfe,
                "step": state.step,
                "finished_rows": int(rows.cumprod(0).sum()),
                "finished": float(frame.finished.float().mean()),
            },
            last=state.step == run.schedule.num_steps,
            tokens=run.counter.tokens,
            warnings=run.decoder.unseen(asked.config, given),
        )
        start = 0
        for job in jobs:
            stop = start + job.request.n
            if job in due:
                job.emit(replace(picture, pixels=picture.pixels[start:stop]))
            start = stop


def _tell(jobs: Sequence[Job], refused: RequestError) -> None:
    for job in jobs:
        job.emit(refused)
