"""Sources of the data, and the images that their preparation left out."""

from __future__ import annotations

import itertools

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Run

NAMED = 10
"""Number of names that are given for each reason."""


def section(run: Run) -> Markup:
    """Return the reports of ``prepare.py`` in the folders of the shards."""
    config = run.config.get("data") or {}
    sources = [(split, config[split]) for split in ("train", "val", "test") if config.get(split)]
    reports = []
    for path, report in run.preparation_reports.items():
        left_out = report.get("left_out") or {}
        reasons = [
            (reason, len(names), [_named(names, name) for name in itertools.islice(names, NAMED)])
            for reason, names in sorted(left_out.items(), key=lambda item: -len(item[1]))
        ]
        reports.append(
            {
                "path": path,
                "images": report.get("images") or report.get("pictures") or {},
                "reasons": reasons,
                "left_out": sum(len(names) for names in left_out.values()),
                "ignored": report.get("ignored_files") or {},
                "cropped": report.get("area_outside_of_square"),
            }
        )
    return render(_TEMPLATE, sources=sources, reports=reports) if sources or reports else Markup()


def _named(names: object, name: str) -> str:
    """Return a name with its detail, if there is one."""
    detail = names.get(name) if isinstance(names, dict) else None
    return f"{name} ({detail})" if detail else str(name)


_TEMPLATE = """
<dl>{% for split, source in sources %}<dt>{{ split }}</dt>
<dd><code>{{ source if source is string else source | join(", ") }}</code></dd>{% endfor %}</dl>
{% for report in reports %}<h3>Preparation, from <code>{{ report.path }}</code></h3>
<div class="scroll"><table class="numbers"><thead><tr>{% for split in report.images %}<th>{{ split }}</th>{% endfor %}
<th>left out</th></tr></thead><tbody><tr>{% for count in report.images.values() %}<td>{{ "{:,}".format(count) }}</td>
{% endfor %}<td>{{ "{:,}".format(report.left_out) }}</td></tr></tbody></table></div>
{% if report.cropped is number %}<p class="note">Cropping to squares removes {{ "{:.1%}".format(report.cropped) }} of the area
of the images.</p>{% endif %}
{% for reason, count, names in report.reasons %}<details><summary>{{ reason }}: {{ "{:,}".format(count) }}</summary>
<ul>{% for name in names %}<li>{{ name }}</li>{% endfor %}{% if count > names | length %}<li>and
{{ "{:,}".format(count - names | length) }} more</li>{% endif %}</ul></details>{% endfor %}
{% if report.ignored %}<p class="note">Other files: {% for suffix, count in report.ignored.items() %}{{ count }}
{{ suffix or "(no suffix)" }}{{ ", " if not loop.last else "." }}{% endfor %}</p>{% endif %}
{% else %}<p class="note">There is no report.json of <code>prepare.py</code> in the folder of these data.</p>{% endfor %}
"""
