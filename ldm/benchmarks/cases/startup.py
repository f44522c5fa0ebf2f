"""Time from the start of a process: to the import of the pipeline class, against diffusers."""

from __future__ import annotations

from ldm.benchmarks.case import Setup, register
from ldm.benchmarks.new_process import ProcessComparison, Program

IMPORTS = (
    Program("", "from ldm import Pipeline"),
    Program("", "from diffusers import StableDiffusionPipeline"),
)


def imports(setup: Setup) -> tuple[Program, Program]:
    """Return the programs that import the pipeline classes."""
    return IMPORTS


register(
    ProcessComparison(
        "startup-import",
        "process start to the import of the pipeline class",
        "diffusers",
        imports,
        from_start=True,
    )
)
