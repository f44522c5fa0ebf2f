"""A comparison as text, Markdown, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.ablation.comparison import Difference, Row, Spread
from ldm.ablation.metrics import METRICS
from ldm.ablation.recipes import PLAIN
from ldm.ablation.runs import Record, Run
from ldm.ablation.step_times import StepTimes
from ldm.evaluation.table import aligned
from ldm.formats.tensors import write_atomically
from ldm.report.dot_plot import DotPlot, DotRow
from ldm.report.html import render_page


@dataclass(frozen=True)
class Comparison:
    """A comparison, finished or not.

    Attributes:
        name: name of the experiment.
        stage: trained stage.
        minutes: time of each training.
        seeds: number of seeds.
        times: times of a step.
        rows: the recipes.
        by: number by which they are judged; None if nothing is measured yet.
        records: record of each run.
        folders: folder of each run.
    """

    name: str
    stage: str
    minutes: float
    seeds: int
    times: StepTimes
    rows: Sequence[Row]
    by: str | None
    records: Sequence[Record]
    folders: Sequence[Path]

    @property
    def numbers(self) -> list[str]:
        """Names of the numbers that tables show, the one that decides first."""
        known = METRICS[self.stage].numbers
        ordered = [*([self.by] if self.by else []), *(name for name in known if name != self.by)]
        return [name for name in ordered if any(name in row.numbers for row in self.rows)]

    @property
    def head(self) -> str:
        """Sentence on what was compared."""
        unfinished = sum(row.open for row in self.rows)
        left = f"; runs not finished: {unfinished}" if unfinished else ""
        threads = f"{self.times.threads} thread{'s' * (self.times.threads > 1)}"
        return (
            f"Stage {self.stage} of {self.name}, {self.minutes:.3g} minutes of training by the time of a step on "
            f"{self.times.device} ({self.times.seconds:.3g} s for a step of {PLAIN}, {threads}), {self.seeds} "
            f"seed{'s' * (self.seeds > 1)}, val split{left}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return values of JSON."""
        return {
            "ldm": __version__,
            "experiment": self.name,
            "stage": self.stage,
            "minutes": self.minutes,
            "seeds": self.seeds,
            "device": self.times.device,
            "threads": self.times.threads,
            "seconds_per_step": self.times.seconds,
            "relative_step_times": {name: list(each) for name, each in self.times.relative.items()},
            "by": self.by,
            "recipes": [row.to_json() for row in self.rows],
            "runs": [
                {
                    "folder": str(folder),
                    "recipe": each.task.recipe,
                    "seed": each.task.seed,
                    "steps": each.task.steps,
                    "state": each.state,
                    "seconds": each.seconds,
                    "error": each.error,
                }
                for folder, each in zip(self.folders, self.records, strict=True)
            ],
        }


def spread(found: Spread | None) -> str:
    """Return a mean with its range over the seeds."""
    if found is None:
        return ""
    unit = f" {found.unit}" if found.unit else ""
    if len(found.values) == 1:
        return f"{found.mean:.4g}{unit}"
    return f"{found.mean:.4g} ({found.low:.4g} to {found.high:.4g}){unit}"


def difference(found: Difference | None) -> str:
    """Return a difference with its interval, if it has one."""
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{found.mean:+.3g}{interval}"


def table(found: Comparison) -> list[tuple[str, ...]]:
    """Return the rows of the table, with the heading."""
    heading = ("recipe", "steps", "ratio", "seeds", *found.numbers, f"difference of {found.by}", "verdict")
    return [heading] + [
        (
            row.recipe,
            f"{row.steps:,}",
            f"{row.ratio:.3f}",
            str(row.finished),
            *(spread(row.numbers.get(name)) for name in found.numbers),
            difference(row.differences.get(found.by or "")),
            row.verdict,
        )
        for row in found.rows
    ]


def text(found: Comparison) -> str:
    """Return the comparison as aligned text."""
    return f"{found.head}\n\n{aligned(table(found))}"


def markdown(found: Comparison) -> str:
    """Return the comparison as Markdown."""
    heading, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table(found))
    lines = ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows)]
    notes = (
        "Numbers: mean (range over the seeds). Difference: to "
        f"{PLAIN}, paired by seed, with its 95 % interval (t distribution)."
    )
    recipes = [f"- {row.recipe}: {_code(row)}" for row in found.rows]
    return "\n".join([found.head, "", *lines, "", notes, "", *recipes]) + "\n"


def _code(row: Row) -> str:
    return " ".join(f"`{each}`" for each in row.overrides) or "the config as it is"


def page(found: Comparison) -> str:
    """Return the comparison as HTML."""
    plain = next(row for row in found.rows if row.recipe == PLAIN)
    plots = [
        DotPlot(
            name,
            [
                DotRow(row.recipe, tuple(each.values.values()), each.mean)
                for row in found.rows
                if (each := row.numbers.get(name)) is not None
            ],
            f"{name}{f' in {unit}' if unit else ''}",
            plain.numbers[name].mean if name in plain.numbers else None,
            f"{better.capitalize()} is better. Dots: seeds; bars: means; line: {PLAIN}.",
        ).html
        for name in found.numbers
        for unit, better in [_unit(found.rows, name)]
    ]
    heading, *rows = table(found)
    others = [
        (row.recipe, *(difference(row.differences.get(name)) for name in found.numbers))
        for row in found.rows
        if row.recipe != PLAIN
    ]
    return render_page(
        f"{found.name}: comparison of recipes",
        _TEMPLATE,
        comparison=found,
        heading=heading,
        rows=rows,
        others=others,
        plots=plots,
        diverged=[(each, folder) for each, folder in zip(found.records, found.folders, strict=True) if each.error],
    )


def _unit(rows: Sequence[Row], name: str) -> tuple[str, str]:
    found = next(row.numbers[name] for row in rows if name in row.numbers)
    return found.unit, found.better


def line(run: Run, record: Record, names: Sequence[str]) -> str:
    """Return a line on a run that has ended."""
    values = "  ".join(f"{name} {record.numbers[name].value:.4g}" for name in names if name in record.numbers)
    state = values if record.state == "finished" else record.state
    return f"{run.name}, {run.task.steps:,} steps, {record.seconds:,.0f} s: {state}"


def write(found: Comparison, folder: Path) -> None:
    """Write ``ablation.json``, ``ablation.md`` and ``ablation.html`` into a folder."""
    contents = {
        "ablation.json": json.dumps(found.to_json(), indent=2) + "\n",
        "ablation.md": markdown(found),
        "ablation.html": page(found),
    }
    for name, content in contents.items():
        write_atomically(folder / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))  # type: ignore[misc]


_TEMPLATE: Any = """
<header><h1>{{ comparison.name }}: comparison of recipes</h1><p>{{ comparison.head }}</p></header>
<main>
<section><h2>Recipes</h2><div class="scroll"><table><tr>{% for cell in heading %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<p>Numbers are means, with the range over the seeds. Differences are to plain, paired by seed, with their 95 % intervals. Of
twenty recipes that change nothing, one is expected to look better or worse.</p></section>
<section><h2>Numbers</h2><div class="charts two">{% for each in plots %}{{ each }}{% endfor %}</div></section>
<section><h2>Differences to plain</h2><div class="scroll"><table><tr><th>recipe</th>
{% for name in comparison.numbers %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in others %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div></section>
<section><h2>Changes of the config</h2><table><tr><th>recipe</th><th>overrides</th></tr>
{% for row in comparison.rows %}<tr><td>{{ row.recipe }}</td>
<td>{% for each in row.overrides %}<code>{{ each }}</code> {% endfor %}</td></tr>{% endfor %}</table></section>
{% if diverged %}<section><h2>Diverged runs</h2><table><tr><th>run</th><th>error</th></tr>
{% for record, folder in diverged %}<tr><td>{{ folder.name }}</td><td>{{ record.error }}</td></tr>{% endfor %}</table></section>
{% endif %}
</main>
"""
