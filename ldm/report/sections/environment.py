"""Sessions of each stage, and the environment that they ran in."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from markupsafe import Markup

from ldm.report.html import render
from ldm.report.run import Run, Session, Stage

OF_STAGE = ("max_steps", "batch_size", "accumulate")
"""Settings of a session that belong to its stage rather than to the machine."""


def section(run: Run) -> Markup:
    """Return a timeline and a table of the sessions, and the environments, each with the sessions that had it."""
    rows = [_row(stage, i, session) for stage in run.stages for i, session in enumerate(stage.sessions)]
    if not rows:
        return Markup('<p class="note">Not recorded: the run is of an earlier version.</p>')
    environments: list[tuple[Mapping[str, Any], list[str]]] = []
    for row in rows:
        same = next((names for values, names in environments if values == row["environment"]), None)
        if same is None:
            environments.append((row["environment"], same := []))
        same.append(f"{row['stage']} {row['number']}")
    return render(_TEMPLATE, rows=_placed(rows), environments=environments)


def _row(stage: Stage, index: int, session: Session) -> dict[str, Any]:
    start, end = session.start, session.end
    settings = start.get("run") or {}
    running = end is None and stage.is_running and session is stage.sessions[-1]
    following = stage.sessions[index + 1 : index + 2]
    first = start.get("step", 0)
    last = end["step"] if end else following[0].start.get("step", first) if following else stage.step
    begin, finish = _time(start), _time(end or {})
    return {
        "stage": stage.name,
        "number": index + 1,
        "begin": begin,
        "finish": finish,
        "hours": (finish - begin).total_seconds() / 3600 if begin and finish else None,
        "steps": (first, last),
        "reason": "is running" if running else end.get("reason", "") if end else "was killed",
        "environment": {**(start.get("environment") or {}), **{n: v for n, v in settings.items() if n not in OF_STAGE}},
    }


def _time(record: Mapping[str, Any]) -> datetime | None:
    try:
        return datetime.fromisoformat(record["time"])
    except (KeyError, TypeError, ValueError):
        return None


def _placed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the place of each on the common time line, in percent; one without an end is drawn to the next."""
    times = [row[key] for row in rows for key in ("begin", "finish") if row[key]]
    low, high = (min(times), max(times)) if times else (None, None)
    for row in rows:
        row["left"] = row["width"] = 0.0
        if low and high and row["begin"] and high > low:
            later = [other["begin"] for other in rows if other["begin"] and other["begin"] > row["begin"]]
            finish = row["finish"] or min([*later, high])
            row["left"] = round(100 * (row["begin"] - low) / (high - low), 2)
            row["width"] = round(100 * (finish - row["begin"]) / (high - low), 2)
    return rows


_TEMPLATE = """
<div class="scroll"><table><thead><tr><th>stage</th><th>session</th><th>started (UTC)</th><th>hours</th><th>steps</th>
<th>ended</th><th class="time">when</th></tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.stage }}</td><td>{{ row.number }}</td>
<td>{{ row.begin.strftime("%Y-%m-%d %H:%M") if row.begin else "" }}</td>
<td>{{ "%.2f" | format(row.hours) if row.hours is not none else "" }}</td>
<td>{{ "{:,} to {:,}".format(*row.steps) }}</td><td>{{ row.reason | truncate(160, True) }}</td>
<td class="time"><svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">
<rect x="{{ [row.left, 99] | min }}" width="{{ [row.width, 1] | max }}" height="1"/></svg></td></tr>{% endfor %}
</tbody></table></div>
{% for values, sessions in environments %}<details{{ " open" if loop.first }}><summary>Environment of {{ sessions | join(", ") }}
</summary><dl>{% for name, value in values.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></details>
{% endfor %}
"""
