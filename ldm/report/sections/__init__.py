"""Sections of the report, and parts of the section of a stage, one in each file.

A section has a function ``section(run)``, a part a function ``part(stage)``; both return HTML that is empty if the run has
nothing to show there.
"""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from ldm.report.run import Run, Stage
from ldm.report.sections import (
    bad_samples,
    config,
    curves,
    data,
    environment,
    filters,
    noise_levels,
    previews,
    provenance,
    retrieval,
)

PARTS: tuple[Callable[[Stage], Markup], ...] = (
    previews.part,
    retrieval.part,
    curves.part,
    noise_levels.part,
    bad_samples.part,
)
"""Parts of the section of each stage, in order."""

SECTIONS: dict[str, Callable[[Run], Markup]] = {
    "Data": data.section,
    "Filters of the data": filters.section,
    "Sessions and environment": environment.section,
    "Provenance": provenance.section,
    "Config": config.section,
}
"""Sections after those of the stages, by their headings."""
