"""Diagnosis of a run: ``tools/diagnose.py`` and ``ldm-diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores

app = new_app()


@app.command()
def diagnose(
    folder: Annotated[Path, Argument(help="Run folder, such as runs/mine; nothing in it is changed.")],
    overrides: Annotated[
        list[str] | None,
        Argument(help="Changes of its config as key=value, such as denoiser.sampling.guidance_scale=4."),
    ] = None,
    out: Annotated[Path, Option(help="HTML page to write, with the images.")] = Path("diagnosis.html"),
    seconds: Annotated[float, Option(help="Time for all checks; one that has begun may take a little longer.")] = 150.0,
    everything: Annotated[
        bool, Option("--all", help="Go on with later parts after a fault was found, although they depend on it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Find out why a run, finished or not, makes poor images: checks data, stages, training and sampling in causal order."""
    from tqdm import tqdm

    from ldm.diagnosis.check import checks_in_order
    from ldm.diagnosis.opened_run import OpenedRun
    from ldm.diagnosis.page import page
    from ldm.diagnosis.runner import diagnose, topic_name
    from ldm.formats.tensors import write_atomically

    keep_freed_memory()
    use_idle_cores()
    opened = OpenedRun(folder, overrides or [])
    with tqdm(total=len(checks_in_order()), unit="check", leave=False, dynamic_ncols=True) as bar:

        def advance(title: str) -> None:
            bar.set_description(title)
            bar.update()

        result = diagnose(opened, seconds, everything, advance)
    for outcome in result.outcomes:
        if outcome.measured:
            print(f"{topic_name(outcome.check.topic):12} {outcome.check.title}: {'; '.join(outcome.measured)}")
    for reason in dict.fromkeys(outcome.skipped for outcome in result.outcomes if outcome.skipped):
        titles = [outcome.check.title for outcome in result.outcomes if outcome.skipped == reason]
        print(f"not checked, since {reason}: {', '.join(titles)}")
    for note in result.notes:
        print(f"\nalso noticed: {note}")
    print(f"\n{result.verdict}")
    write_atomically(out, lambda path: path.write_text(page(result, str(folder)), encoding="utf-8"))
    print(f"details and images: {out}")


def main() -> None:
    """Run the command."""
    run(app)
