"""Jobs: the images of one request, their progress and their results."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ldm.image_output import Images
from ldm.pipeline import Pipeline
from ldm.sampling_settings import SamplingSettings

Work = Callable[[Pipeline, SamplingSettings], Images]
"""Generates the image of some settings."""

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class FileFormat(NamedTuple):
    """Format of the files of generated images, one of those of the gallery, and its quality; None: the best."""

    name: str = "png"
    quality: int | None = None


class Cancelled(Exception):
    """The client, or the end of the server, has cancelled a job."""


@dataclass
class Task:
    """One image of a job.

    Attributes:
        settings: for this image alone.
        done: number of finished steps.
        total: number of steps; None if it is not known.
        preview: the last preview, a PNG.
        file: name of the result in the gallery.
    """

    job: Job = field(repr=False)
    settings: SamplingSettings
    seed: int
    done: int = 0
    total: int | None = None
    preview: bytes | None = field(default=None, repr=False)
    file: str | None = None


class Job:
    """The images of one request. Threads change it, and coroutines wait for changes.

    Attributes:
        error: message and HTTP status, if it has failed.
        previews: whether previews are made.
        file_format: format of the files.
    """

    def __init__(
        self,
        client: str,
        model: str,
        work: Work,
        settings: list[tuple[SamplingSettings, int]],
        previews: bool = False,
        file_format: FileFormat | None = None,
    ):
        self.id, self.created = secrets.token_hex(16), time.time()
        self.client, self.model, self.work, self.previews = client, model, work, previews
        self.file_format = file_format or FileFormat()
        self.tasks = [Task(self, each, seed) for each, seed in settings]
        self.status: Status = "queued"
        self.error: tuple[str, int] | None = None
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def update(self, task: Task | None = None, **changes: Any) -> None:
        """Change some attributes of a task, derive the status of the job, and wake those who wait for a change."""
        with self._lock:
            if task is not None:
                vars(task).update(changes)
                if self.status == "queued":
                    self.status = "running"
            if not self.ended and all(each.file for each in self.tasks):
                self.status = "succeeded"
            for loop, event in self._waiting:
                loop.call_soon_threadsafe(event.set)

    def end(self, status: Status, error: tuple[str, int] | None = None) -> None:
        """End the job before it has succeeded; its other images are cancelled."""
        with self._lock:
            if not self.ended:
                self.status, self.error = status, error
        self.cancelled.set()
        self.update()

    async def changed(self, timeout: float) -> None:
        """Wait for the next change, at most for some seconds."""
        mine = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            if self.ended:
                return
            self._waiting.add(mine)
        try:
            await asyncio.wait_for(mine[1].wait(), timeout)
        except asyncio.TimeoutError:
            pass
        finally:
            with self._lock:
                self._waiting.discard(mine)
