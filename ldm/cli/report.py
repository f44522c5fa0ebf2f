"""Report of a run: ``tools/report.py`` and ``ldm-report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, new_app, run

app = new_app()


@app.command()
def report(
    folder: Annotated[Path, Argument(metavar="RUN", help="Run folder, of a finished or an unfinished training.")],
    out: Annotated[Path | None, Option(help="HTML file to write; default: report.html in the run folder.")] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page with the curves, images, data, config and environment of a run."""
    from ldm.formats.tensors import write_atomically
    from ldm.report.page import page
    from ldm.report.run import Run

    text, path = page(Run(folder)), out or folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(path)


def main() -> None:
    """Run the command."""
    run(app)
