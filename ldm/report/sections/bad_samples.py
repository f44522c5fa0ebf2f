"""Samples that could not be used while training."""

from __future__ import annotations

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Stage

NAMED = 20
"""Number of samples that are named."""


def part(stage: Stage) -> Markup:
    """Return how many samples of each split could not be used for each reason, and the first of them."""
    counts = stage.bad_sample_counts
    if not counts:
        return Markup()
    reasons = [(split, *each) for split, reasons in counts.items() for each in reasons.most_common()]
    total = sum(reasons.total() for reasons in counts.values())
    rows = stage.bad_samples[:NAMED]
    columns = [name for name in rows[0] if name]
    cells = [[row.get(name) or "" for name in columns] for row in rows]
    return render(_TEMPLATE, total=total, reasons=reasons, columns=columns, cells=cells)


_TEMPLATE = """
<h3>Samples that could not be used</h3>
<div class="scroll"><table class="numbers"><thead><tr><th class="label">split</th><th class="label">reason</th>
<th>samples</th></tr></thead><tbody>
{% for split, reason, count in reasons %}<tr><th>{{ split }}</th><th>{{ reason }}</th><td>{{ "{:,}".format(count) }}</td></tr>
{% endfor %}<tr><th>in total</th><th></th><td>{{ "{:,}".format(total) }}</td></tr></tbody></table></div>
<details><summary>{{ "The first %d of them" | format(cells | length) if total > cells | length else "All of them" }}</summary>
<div class="scroll"><table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in cells %}<tr>{% for cell in row %}<td>{{ cell | truncate(120, True) }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></details>
"""
