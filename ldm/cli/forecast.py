"""Forecast of a training: ``tools/forecast.py`` and ``ldm-forecast``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import ConfigError, unknown

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
RATES = ("auto", "config", "test")

app = new_app()


@app.command()
def forecast(
    config: Annotated[Path, Option(help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, Argument(help="Overrides of the config as key=value, such as denoiser.train.batch_size=64.")
    ] = None,
    budget: Annotated[
        str | None,
        Option(help="Time of the full run, such as '8 h', '90 min' or '2 d'; default: denoiser.train.max_steps steps."),
    ] = None,
    learning_rate: Annotated[
        str,
        Option(
            help="Learning rate: config, test (that of the range test), or auto (the config's if the test finds it usable)."
        ),
    ] = "auto",
    train_stages: Annotated[
        bool, Option("--train-stages", help="Train stages 1 and 2 first, if their results are missing.")
    ] = False,
    worthwhile: Annotated[
        float, Option(help="Fall of the loss by twice the steps, as a share of it, that is worth them.")
    ] = 0.01,
    share: Annotated[
        float, Option(help="Part of the time of the full run that the ladder may take, at most 0.2.")
    ] = 0.2,
    verify: Annotated[
        bool, Option("--verify", help="Then train the full run as well, and say whether it is in the forecast.")
    ] = False,
    out: Annotated[
        Path | None, Option(help="HTML page to write; default: forecast/forecast.html in the run folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Forecast what the training of the denoiser will reach, from a ladder of small runs on the data of the config."""
    if learning_rate not in RATES:
        raise ConfigError(unknown("--learning-rate", learning_rate, RATES))
    if not 0 < share <= 0.2:
        raise ConfigError(f"--share is {share:g}; give a part of the full run above 0 and at most 0.2.")
    if not 0 < worthwhile < 1:
        raise ConfigError(f"--worthwhile is {worthwhile:g}; give a share of the loss above 0 and below 1.")
    seconds = None if budget is None else seconds_of(budget)
    from ldm.forecast.page import page
    from ldm.forecast.runner import RESULT, run_forecast
    from ldm.forecast.runner import verify as verified
    from ldm.forecast.sentences import table
    from ldm.formats.tensors import write_atomically
    from ldm.training.experiment import load_config

    keep_freed_memory()
    use_idle_cores()
    rate: Any = learning_rate
    outcome = run_forecast(
        load_config(config, overrides or []),
        seconds,
        learning_rate=rate,
        train_stages=train_stages,
        worthwhile=worthwhile,
        share=share,
    )
    print("", *table(outcome.results), "", *outcome.sentences, sep="\n")
    path = out or outcome.folder / "forecast.html"
    write_atomically(path, lambda temporary: temporary.write_text(page(outcome), encoding="utf-8"))
    print(f"\ncharts: {path}\nnumbers: {outcome.folder / RESULT}")
    if verify:
        print("", *verified(outcome).sentences, sep="\n")


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as ``8 h`` or ``1.5 d``.

    Raises:
        ConfigError: it is not one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise ConfigError(
            f"--budget is {text!r}; give a time above 0 with its unit ({', '.join(UNITS)}), such as '8 h'."
        )
    return float(found[1]) * UNITS[found[2]]


def main() -> None:
    """Run the command."""
    run(app)
