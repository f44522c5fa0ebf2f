"""The resolved config."""

from __future__ import annotations

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Run


def section(run: Run) -> Markup:
    """Return ``config.yaml`` of the run, folded."""
    template = "<details><summary>config.yaml, with all defaults</summary><pre>{{ text }}</pre></details>"
    return render(template, text=run.config_text) if run.config_text else Markup()
