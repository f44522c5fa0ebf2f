"""The scheduler: a bounded queue, fair between clients, and the threads that sample."""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace

from PIL import Image

from ldm.errors import LdmError, SamplingError
from ldm.sampling_loop import SamplingStep
from ldm.serving.gallery import Gallery
from ldm.serving.jobs import Cancelled, Job, Task
from ldm.serving.limits import Limits
from ldm.serving.models import ModelStore

LOG = logging.getLogger("ldm.serving")

KEPT_JOBS = 512
"""Number of ended jobs whose state can still be read."""

PREVIEW_EVERY = 0.2
"""Least number of seconds between two previews of an image."""


class QueueFullError(LdmError):
    """The queue is full; ``retry_after`` is the estimated number of seconds until it is not."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} images are waiting already; send the request again in {retry_after} seconds.")
        self.retry_after = retry_after


class ShuttingDownError(LdmError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request again when it is back.")


SHUTTING_DOWN = str(ShuttingDownError()), 503
"""Message and HTTP status of jobs that the end of the server cancels."""


class Scheduler:
    """Runs jobs, one thread for each image, ``limits.max_running`` at once; a :class:`Batcher` joins their evaluations.

    The next image is that of the client that has waited longest since its last one, whatever the number of its requests.

    Args:
        observe: called with the seconds that each image took.
    """

    def __init__(
        self,
        models: ModelStore,
        gallery: Gallery,
        limits: Limits | None = None,
        observe: Callable[[float], object] = lambda seconds: None,
    ):
        self.models, self.gallery, self.limits = models, gallery, limits or Limits()
        self._observe = observe
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[Task]] = OrderedDict()  # of each client; the first is the next one's turn
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._draining = self._closed = False
        self._seconds = 5.0  # that an image takes, a running mean
        self.running = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"ldm-sampling-{index}", daemon=True)
            for index in range(self.limits.max_running)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        with self._changed:
            return self._length()

    def _length(self) -> int:
        return sum(map(len, self._queues.values()))

    def submit(self, job: Job) -> None:
        """Add the images of a job to the queue.

        Raises:
            QueueFullError, ShuttingDownError: they cannot be taken.
        """
        with self._changed:
            if self._draining:
                raise ShuttingDownError
            waiting, idle = self._length(), self.limits.max_running - self.running
            if waiting + len(job.tasks) > self.limits.max_waiting + max(0, idle):
                seconds = self._seconds * (waiting + self.running) / self.limits.max_running
                raise QueueFullError(waiting, max(1, math.ceil(seconds)))
            self._queues.setdefault(job.client, deque()).extend(job.tasks)
            self._jobs[job.id] = job
            ended = [each.id for each in self._jobs.values() if each.ended]
            for name in ended[: max(0, len(ended) - KEPT_JOBS)]:
                del self._jobs[name]
            self._changed.notify_all()

    def job(self, name: str) -> Job | None:
        """Return a job by its id; None if there is none, or if it ended long ago."""
        with self._changed:
            return self._jobs.get(name)

    def jobs_of(self, client: str) -> list[Job]:
        """Return the jobs of a client that have not ended, the oldest first."""
        with self._changed:
            return [job for job in self._jobs.values() if job.client == client and not job.ended]

    def cancel(self, job: Job, error: tuple[str, int] | None = None) -> None:
        """Cancel a job: images that wait are not begun, and those that run end before their next evaluation."""
        with self._changed:
            for client, queue in list(self._queues.items()):
                self._queues[client] = deque(task for task in queue if task.job is not job)
                if not self._queues[client]:
                    del self._queues[client]
        job.end("cancelled", error)

    def drain(self, seconds: float) -> None:
        """Take no more jobs, cancel those that wait, and after some ``seconds`` those that run; return at once."""
        with self._changed:
            if self._draining:
                return
            self._draining = True
        for job in list(self._jobs.values()):
            if job.status == "queued":
                self.cancel(job, SHUTTING_DOWN)

        timer = threading.Timer(seconds, self._cancel_all)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Cancel all jobs and end the threads."""
        self.drain(0)
        self._cancel_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _cancel_all(self) -> None:
        for job in list(self._jobs.values()):
            if not job.ended:
                self.cancel(job, SHUTTING_DOWN)

    def _next(self) -> Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queues or self._closed)
            if self._closed:
                return None
            client, queue = self._queues.popitem(last=False)
            task = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the other clients
            self.running += 1
            return task

    def _work(self) -> None:
        while (task := self._next()) is not None:
            start, job = time.monotonic(), task.job
            try:
                job.update(task)
                self._sample(task)
                taken = time.monotonic() - start
                self._seconds += 0.1 * (taken - self._seconds)
                self._observe(taken)
            except Cancelled:
                job.end("cancelled")
            except LdmError as error:
                self._fail(job, str(error), 400)
            except Exception:
                LOG.exception("job %s", job.id)
                self._fail(job, f"the server has failed; its log has the cause under the job {job.id}.", 500)
            finally:
                with self._changed:
                    self.running -= 1
            del task, job

    def _fail(self, job: Job, message: str, status: int) -> None:
        job.end("failed", (message, status))
        self.cancel(job)  # its images that wait

    def _sample(self, task: Task) -> None:
        job, previewed = task.job, 0.0
        deadline = time.monotonic() + self.limits.max_seconds

        def check() -> None:
            if job.cancelled.is_set():
                raise Cancelled
            if time.monotonic() > deadline:
                raise SamplingError(
                    f"the image took more than {self.limits.max_seconds:g} seconds; ask for fewer steps or pixels."
                )

        def step(step: SamplingStep) -> None:
            nonlocal previewed
            check()
            changes = {"done": step.done, "total": step.total}
            if job.previews and time.monotonic() - previewed >= PREVIEW_EVERY:
                previewed = time.monotonic()
                changes["preview"] = png(step.preview()[0])  # type: ignore[assignment]
            job.update(task, **changes)

        check()
        with self.models.use(job.model) as pipe, self.models.batcher.sampling(check):
            image = job.work(pipe, replace(task.settings, callback=step))[0]
        check()
        job.update(task, file=self.gallery.save(image, job.client), preview=None)


def png(image: Image.Image) -> bytes:
    """Encode an image, as it is shown once."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
