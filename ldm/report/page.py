"""The page: heading, summary of the stages, and the sections."""

from __future__ import annotations

from typing import Any

from ldm.report.charts import number
from ldm.report.html import render_page
from ldm.report.run import Run, Stage
from ldm.report.sections import PARTS, SECTIONS
from ldm.training.tasks import TASKS


def page(run: Run) -> str:
    """Return the report of a run as one HTML page without references to other files."""
    stages = [
        {"id": stage.name, "title": TASKS[stage.name].title, "parts": [part(stage) for part in PARTS]}
        for stage in run.stages
    ]
    sections = [(title.lower().replace(" ", "-"), title, section(run)) for title, section in SECTIONS.items()]
    return render_page(
        f"{run.name}: report of the training",
        _TEMPLATE,
        run=run,
        cards=[_card(stage) for stage in run.stages],
        stages=stages,
        sections=[each for each in sections if each[2]],
    )


def _card(stage: Stage) -> dict[str, Any]:
    """Return what is most important of a stage."""
    best, speed = stage.best, stage.samples_per_second
    return {
        "id": stage.name,
        "title": TASKS[stage.name].title,
        "status": stage.status,
        "step": stage.step,
        "max_steps": stage.max_steps,
        "share": min(1.0, stage.step / stage.max_steps) if stage.max_steps else None,
        "metric": stage.monitor,
        "best": f"{number(best[1])} at step {best[0]:,}" if best else None,
        "speed": f"{number(speed)} samples/s" if speed is not None else None,
    }


_TEMPLATE = """
<header><h1>{{ run.name }}</h1><p><code>{{ run.folder }}</code></p>
<nav aria-label="Sections">{% for each in stages %}<a href="#{{ each.id }}">{{ each.title }}</a>{% endfor %}
{% for id, title, _ in sections %}<a href="#{{ id }}">{{ title }}</a>{% endfor %}</nav></header>
<main>
<div class="cards">{% for card in cards %}<a class="card" href="#{{ card.id }}"><span class="status {{ card.status }}">
{{ card.status }}</span><strong>{{ card.title }}</strong>
{% if card.share is not none %}<span class="bar"><i style="width: {{ (100 * card.share) | round(1) }}%"></i></span>{% endif %}
<dl><dt>steps</dt><dd>{{ "{:,}".format(card.step) }}{% if card.max_steps %} of {{ "{:,}".format(card.max_steps) }}{% endif %}</dd>
{% if card.best %}<dt>best {{ card.metric }}</dt><dd>{{ card.best }}</dd>{% endif %}
{% if card.speed %}<dt>speed</dt><dd>{{ card.speed }}</dd>{% endif %}</dl></a>{% endfor %}</div>
{% for each in stages %}<section id="{{ each.id }}"><h2>{{ each.title }}</h2>{% for part in each.parts %}{{ part }}
{% endfor %}</section>{% endfor %}
{% for id, title, content in sections %}<section id="{{ id }}"><h2>{{ title }}</h2>{{ content }}</section>{% endfor %}
</main>
"""
