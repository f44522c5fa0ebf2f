"""Samples that could not be used while training."""

from __future__ import annotations

from collections import Counter

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Stage, bad_samples

NAMED = 20
"""Number of samples that are named."""


def part(stage: Stage) -> Markup:
    """Return how many samples were replaced for each reason, and the first of them."""
    rows = bad_samples(stage)
    if not rows:
        return Markup()
    counts: Counter[str] = Counter()
    for row in rows:
        count = row.get("count") or ""
        counts[row.get("reason") or "unknown reason"] += int(count) if count.isdigit() else 1
    columns = [name for name in rows[0] if name]
    cells = [[row.get(name) or "" for name in columns] for row in rows[:NAMED]]
    return render(_TEMPLATE, total=counts.total(), reasons=counts.most_common(), columns=columns, cells=cells)


_TEMPLATE = """
<h3>Samples that could not be used</h3>
<div class="scroll"><table class="numbers"><thead><tr><th>reason</th><th>samples</th></tr></thead><tbody>
{% for reason, count in reasons %}<tr><th>{{ reason }}</th><td>{{ "{:,}".format(count) }}</td></tr>{% endfor %}
<tr><th>in total</th><td>{{ "{:,}".format(total) }}</td></tr></tbody></table></div>
<details><summary>{{ "The first %d of them" | format(cells | length) if total > cells | length else "All of them" }}</summary>
<div class="scroll"><table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in cells %}<tr>{% for cell in row %}<td>{{ cell | truncate(120, True) }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></details>
"""
