"""Fingerprints of the results, and what they were made from."""

from __future__ import annotations

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Run


def section(run: Run) -> Markup:
    """Return a row for each finished stage."""
    stages = [(stage, stage.metadata) for stage in run.stages if stage.metadata]
    return render(_TEMPLATE, stages=stages) if stages else Markup()


_TEMPLATE = """
<div class="scroll"><table><thead><tr><th>file</th><th>steps</th><th>seed</th><th>ldm</th><th>fingerprint</th>
<th>made with</th></tr></thead><tbody>{% for stage, metadata in stages %}{% set made = metadata.provenance %}<tr>
<td><code>{{ stage.result.relative_to(stage.folder.parent) }}</code></td>
<td>{{ "{:,}".format(made.steps) if made.steps else "" }}</td>
<td>{{ made.seed }}</td><td>{{ made.ldm }}</td><td><code>{{ metadata.fingerprint }}</code></td>
<td>{% for name, mark in (made.handoff or {}).items() %}{{ name }} <code>{{ mark }}</code> {% endfor %}</td></tr>{% endfor %}
</tbody></table></div>
"""
