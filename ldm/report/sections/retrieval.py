"""Retrieval of stage 2 as a table."""

from __future__ import annotations

import re

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Stage

DIRECTIONS = {"text_to_image": "caption finds image", "image_to_text": "image finds caption"}


def part(stage: Stage) -> Markup:
    """Return the recalls at the last validation and the best of each."""
    names = [name for name in stage.metrics if re.fullmatch(r"val/(text_to_image|image_to_text)_R@\d+", name)]
    ks = sorted({int(name.partition("@")[2]) for name in names})
    if not ks:
        return Markup()
    rows = []
    for direction, title in DIRECTIONS.items():
        points = [stage.metrics.get(f"val/{direction}_R@{k}") for k in ks]
        cells = [(each[-1][1], max(each, key=lambda point: point[1])) if each else None for each in points]
        rows.append((title, cells))
    last = max(stage.metrics[name][-1][0] for name in names)
    return render(_TEMPLATE, ks=ks, rows=rows, last=last)


_TEMPLATE = """
<h3>Retrieval on the validation set</h3>
<div class="scroll"><table class="numbers"><thead><tr><th></th>{% for k in ks %}<th>R@{{ k }}</th>{% endfor %}</tr></thead><tbody>
{% for title, cells in rows %}<tr><th>{{ title }}</th>{% for cell in cells %}<td>{% if cell %}{{ "{:.1%}".format(cell[0]) }}
<small>best {{ "{:.1%}".format(cell[1][1]) }} at {{ "{:,}".format(cell[1][0]) }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">At step {{ "{:,}".format(last) }}. R@k is the share for which the own counterpart is among the k nearest.</p>
"""
