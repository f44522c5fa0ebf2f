"""Samples that the filters of the data dropped."""

from __future__ import annotations

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Run


def section(run: Run) -> Markup:
    """Return a table for each split with the samples that each filter dropped, and those that are left."""
    splits = {split: content for split, content in run.selections.items() if content.get("filters")}
    return render(_TEMPLATE, splits=splits) if splits else Markup()


_TEMPLATE = """
{% for split, content in splits.items() %}<h3>{{ split }}</h3>
<div class="scroll"><table class="numbers"><thead><tr><th class="label">filter</th><th>dropped</th><th>of unknown value</th>
<th>left</th></tr></thead><tbody>
<tr><th>all samples</th><td></td><td></td><td>{{ "{:,}".format(content.samples) }}</td></tr>
{% for each in content.filters %}<tr><th>{{ each.filter }}</th><td>{{ "{:,}".format(each.dropped) }}</td>
<td>{{ "{:,}".format(each.missing) }}</td><td>{{ "{:,}".format(each.left) }}</td></tr>
{% endfor %}</tbody></table></div>{% endfor %}
"""
