"""LightningModules of the stages: each the engine with the task of the stage."""

from __future__ import annotations

from ldm.training.engine import StageModule
from ldm.training.tasks import CLIPTask, DenoiserTask, VAETask


class VAEModule(StageModule):
    """Stage 1 under the engine."""

    task: VAETask


class CLIPModule(StageModule):
    """Stage 2 under the engine."""

    task: CLIPTask


class DenoiserModule(StageModule):
    """Stage 3 under the engine."""

    task: DenoiserTask


MODULES: dict[str, type[StageModule]] = {"vae": VAEModule, "clip": CLIPModule, "denoiser": DenoiserModule}
"""Module of each stage."""
