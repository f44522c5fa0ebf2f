"""Page of a diagnosis: one HTML file with its images."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from ldm.diagnosis.runner import Diagnosis, Outcome, topic_name

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
.verdict { padding: .8em 1em; border-left: 5px solid #2a7; background: #f2faf6; font-size: 1.1em }
.verdict.fault { border-color: #c33; background: #fdf3f3 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .35em .6em }
tr { border-bottom: 1px solid #ddd } .fault-row { background: #fdf3f3 } .skipped { color: #888 }
img { max-width: 100%; image-rendering: pixelated } figure { margin: 1em 0 } figcaption { color: #555 }
"""


def page(diagnosis: Diagnosis, title: str) -> str:
    """Return the HTML of a diagnosis; ``title`` names the run."""
    escaped, cause = html.escape(title), diagnosis.cause
    rows = "\n".join(_row(outcome) for outcome in diagnosis.outcomes)
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in diagnosis.notes)
    figures = "\n".join(
        f'<figure><img src="{_inlined(figure.image)}" alt=""><figcaption>{html.escape(figure.caption)}</figcaption></figure>'
        for outcome in diagnosis.outcomes
        for figure in outcome.figures
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Diagnosis of {escaped}</title><style>{STYLE}</style></head>
<body>
<h1>Diagnosis of {escaped}</h1>
<p class="verdict{" fault" if cause else ""}">{html.escape(diagnosis.verdict)}</p>
{f"<h2>Also noticed</h2><ul>{notes}</ul>" if notes else ""}
<h2>Checks, in causal order</h2>
<table><tr><th>part</th><th>check</th><th>result</th><th>time</th></tr>
{rows}
</table>
<h2>Images</h2>
{figures}
</body>
</html>
"""


def _row(outcome: Outcome) -> str:
    faulty = any(finding.certain for finding in outcome.findings)
    texts = [*outcome.measured, *(f"{each.cause}: {each.problem}" for each in outcome.findings)]
    text = f"not checked: {outcome.skipped}" if outcome.skipped else "; ".join(texts) or "does not apply"
    kind = "skipped" if outcome.skipped else "fault-row" if faulty else ""
    cells = (topic_name(outcome.check.topic), outcome.check.title, text, f"{outcome.seconds:.1f} s")
    return f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _inlined(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
