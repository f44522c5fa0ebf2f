"""Training tasks, one for each stage, without Lightning."""

from __future__ import annotations

from ldm.training.tasks.clip import CLIPTask
from ldm.training.tasks.decoder import DecoderTask
from ldm.training.tasks.denoiser import DenoiserTask
from ldm.training.tasks.task import Task
from ldm.training.tasks.vae import VAETask

TASKS: dict[str, type[Task]] = {task.stage: task for task in (VAETask, CLIPTask, DenoiserTask, DecoderTask)}
"""Task of each stage, in the order in which an experiment trains them."""
