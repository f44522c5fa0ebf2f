"""Service: what all APIs share. They turn requests into settings and works, and jobs into responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm import editing
from ldm.errors import SamplingError
from ldm.formats import Source
from ldm.image_marks import ImageMarks
from ldm.image_output import Images
from ldm.inputs import seed_list
from ldm.pipeline import Pipeline
from ldm.sampling_settings import SamplingSettings
from ldm.serving.batching import Batcher
from ldm.serving.controls import ControlField, Controlled, check_controls
from ldm.serving.edits import Edit, content_of
from ldm.serving.fields import arguments
from ldm.serving.gallery import Gallery
from ldm.serving.jobs import FileFormat, Job, Work
from ldm.serving.limits import Limits
from ldm.serving.metrics import Metrics
from ldm.serving.models import ModelStore
from ldm.serving.scheduler import Scheduler
from ldm.serving.uploads import read_upload

LOG = logging.getLogger("ldm.serving")

VARIATION_STRENGTH = 0.6
"""Share of the steps that a variation takes, with models that are not conditioned on images."""


class Service:
    """Models, queue and gallery of a server.

    Args:
        sources: source of each model by its name; the first is the default.
        gallery: folder of the generated images.
        limits: limits on requests.
        exact: see :class:`Batcher`; default: True for models on the CPU.
        log_prompts: whether the log has the prompts.
        marks: content credentials and watermark of the images; default: none.
        options: as for :class:`ModelStore`.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        gallery: Path,
        limits: Limits | None = None,
        exact: bool = True,
        log_prompts: bool = False,
        marks: ImageMarks | None = None,
        **options: Any,
    ):
        self.limits, self.metrics, self.log_prompts = limits or Limits(), Metrics(), log_prompts
        self.gallery = Gallery(gallery, marks)
        rows = max(2, 2 * self.limits.max_running)
        self.batcher = Batcher(rows, exact, self.metrics.rows.observe)
        self.models = ModelStore(sources, self.batcher, **options)
        self.scheduler = Scheduler(self.models, self.gallery, self.limits, self.metrics.image_seconds.observe)
        self.metrics.waiting.set_function(lambda: self.scheduler.waiting)
        self.metrics.running.set_function(lambda: self.scheduler.running)

    def close(self) -> None:
        """Cancel what runs and end all threads."""
        self.scheduler.close()
        self.batcher.close()

    def submit(
        self,
        client: str,
        model: str | None,
        settings: SamplingSettings,
        work: Work | None = None,
        size: tuple[int, int] | None = None,
        previews: bool = False,
        file_format: FileFormat | None = None,
    ) -> Job:
        """Add a job to the queue, and return it.

        Args:
            client: who asks; clients take turns.
            model: name of the model; None: the default.
            settings: of all images; image i has the seed of the first plus i.
            work: default: text to image.
            size: height and width of the images where the settings give none; default: those of the model, if it is loaded.
            previews: whether to make previews.
            file_format: format of the files; default: PNG.

        Raises:
            LdmError: the settings are not valid or above a limit, the model is unknown, or the queue is full.
        """
        name = self.models.name(model)
        pipe = self.models.peek(name)
        self.limits.check(settings, size or (pipe.model.config.size if pipe else (1, 1)))
        seeds = seed_list(settings.seed, settings.num_images_per_prompt)
        each = [(replace(settings, seed=seed, num_images_per_prompt=1), seed) for seed in seeds]
        if work is None and pipe is not None and settings.prompt_syntax == "plain":
            pipe.sample(each[0][0]).close()  # checks what depends on the model, before the request is accepted
        job = Job(client, name, work or text_to_image, each, previews, file_format)
        self.scheduler.submit(job)
        record: dict[str, Any] = {"job": job.id, "model": name, "n": len(each)} | settings.record()
        if self.log_prompts:
            record["prompt"] = settings.prompt
        LOG.info("job", extra={"record": record})
        return job

    def edit(
        self,
        client: str,
        image: bytes,
        mask: bytes | None = None,
        size: tuple[int, int] | None = None,
        mask_is_alpha: bool = False,
        **options: Any,
    ) -> Edit:
        """Return the work of a request that edits an image.

        Args:
            client: whose gallery keeps the images that were sent.
            image: a file to change.
            mask: a file; white where the image is repainted.
            size: width and height to which image and mask are resized; default: those of the image.
            mask_is_alpha: True if instead the mask is what is transparent, in ``mask`` or else in the image.
            options: strength and others of :class:`Edit`.

        Raises:
            SamplingError: an image cannot be read or is too large, or the options contradict each other.
        """
        source = self._resized(read_upload(image, self.limits), size)
        area = None if mask is None else self._resized(read_upload(mask, self.limits, "mask"), size)
        if mask_is_alpha:
            if area is not None and not area.has_transparency_data:
                raise SamplingError("the mask has no transparency; make it transparent where the image is repainted.")
            alpha = source if area is None else area
            area = (
                None
                if not alpha.has_transparency_data
                else alpha.convert("RGBA").getchannel("A").point(lambda a: 255 - a)
            )
            source = source.convert("RGB") if area is not None else source
        return Edit(source, partial(self.gallery.save_input, client=client), area, **options)

    def controlled(self, client: str, controls: Sequence[ControlField], work: Work | None = None) -> Work:
        """Return a work with ControlNets.

        Args:
            client: whose gallery keeps the images that were sent.
            controls: the ControlNets of the request.
            work: default: text to image.

        Raises:
            SamplingError: there is no such ControlNet, or an image cannot be read or is too large.
        """
        check_controls(controls, self.models.controlnets)
        what = "the image of a ControlNet"
        files = [content_of(each.image, what, self.gallery) for each in controls]
        images = [read_upload(file, self.limits, what) for file in files]
        keep = partial(self.gallery.save_input, client=client)
        return Controlled(work or text_to_image, list(zip(controls, images, strict=True)), keep)

    def variation(self, image: bytes, size: tuple[int, int] | None = None) -> tuple[Work, tuple[int, int]]:
        """Return the work that varies an image: that of models conditioned on images, or else image to image."""
        source = self._resized(read_upload(image, self.limits), size)

        def vary(pipe: Pipeline, settings: SamplingSettings) -> Images:
            more = arguments(settings)
            if "image" in pipe.model.config.conditioner.input_keys:
                return editing.variations(pipe, source, **more)
            prompt = more.pop("prompt", "" if "text" in pipe.model.config.conditioner.input_keys else None)
            return editing.image_to_image(pipe, prompt, source, VARIATION_STRENGTH, **more)

        return vary, (source.height, source.width)

    def _resized(self, image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
        """Return the image with this width and height; None: as it is."""
        if size is None or size == image.size:
            return image
        if min(size) < 1 or size[0] * size[1] > self.limits.max_pixels:
            raise SamplingError(
                f"the size is {size[0]} x {size[1]}; this server allows from 1 to {self.limits.max_pixels} pixels."
            )
        return image.resize(size)


def text_to_image(pipe: Pipeline, settings: SamplingSettings) -> Images:
    """Generate an image from its settings alone."""
    return pipe.sample(settings).result()


def exact_by_default(device: torch.device) -> bool:
    """Return whether batching is exact by default: on the CPU, where many numbers of rows are; see docs/serving.md."""
    return device.type == "cpu"
