"""Process of one run of a comparison, which tools/ablate.py starts: ``python -m ldm.cli.ablation_run FOLDER``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from ldm.cli.common import Debug, keep_freed_memory, new_app, run

app = new_app()


@app.command()
def ablation_run(
    folder: Annotated[Path, Argument(help="Folder of the run.")],
    debug: Debug = False,
) -> None:
    """Train and measure a run of a comparison, or go on with it."""
    from ldm.ablation.processes import stop_with_parent
    from ldm.ablation.work import work

    stop_with_parent()
    keep_freed_memory()
    work(folder)


if __name__ == "__main__":
    run(app)
