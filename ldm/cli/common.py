"""Shared parts of the commands: options made from dataclasses, and error reporting."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.cores import shorten_waiting
from ldm.errors import Interrupted, LdmError, SamplingError, first_line
from ldm.paths import expanded

Debug = Annotated[bool, typer.Option("--debug", help="Traceback of an error instead of its message alone.")]
"""An option of every command, which :func:`run` looks for."""


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of torch's dtypes by their short names on the command line."""

OPTION_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "Sequence[int]": list[int],
}
"""Types of options by the first type in a field's annotation; all others are strings. Integers of a list are given one by one in
repeated options, floats of a list in one option, separated by commas."""


Backend = Annotated[
    str | None,
    typer.Option(
        "--compile",
        metavar="BACKEND",
        help="Compile the networks: auto (the fastest that is installed), openvino, inductor, or cudagraphs; pays for "
        "large images or many.",
    ),
]
BackendOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compile-option", help="Option of --compile, repeatable: quantization=int8_weights, freezing=true, ..."
    ),
]
"""Arguments of :meth:`ldm.pipeline.Pipeline.compile`, for :func:`backend_of`."""


def backend_of(backend: str | None, options: list[str] | None) -> dict[str, Any] | None:
    """Return the arguments of ``Pipeline.compile``, or None if no backend was given.

    Raises:
        SamplingError: options were given alone.
    """
    if options and not backend:
        raise SamplingError("--compile-option is about compiled networks; give --compile with a backend too.")
    return {"backend": backend, **values_of(options)} if backend else None


def values_of(given: list[str] | None) -> dict[str, Any]:
    """Parse ``["order=3", "projection.eta=0"]`` as nested values of YAML.

    Raises:
        SamplingError: one has no equals sign.
    """
    from ldm.config import with_overrides

    for item in given or []:
        if "=" not in item:
            raise SamplingError(f"{item!r} is no setting; write name=value, such as order=3.")
    return with_overrides({}, given or [], "the settings")


def options_from(record: type, into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command to give it an option for each field of the dataclass ``record`` that has a help sentence.

    The command gets them in its parameter ``into``, a dict from the names of fields to values. In a field's metadata,
    ``flags`` names the option differently from the field, and an empty one leaves it out; ``formerly`` adds an older name.
    """
    entries = {entry.name: entry for entry in dataclasses.fields(record)}
    types = {name: str(entry.type).split(" | ")[0] for name, entry in entries.items()}
    flags = {}
    for name, entry in entries.items():
        dashed = name.replace("_", "-")
        former = [f"--{each.replace('_', '-')}" for each in (entry.metadata.get("formerly"),) if each]
        derived = (f"--{dashed}/--no-{dashed}" if types[name] == "bool" else f"--{dashed}", *former)
        names = entry.metadata.get("flags")
        names = derived if names is None else names
        if names and entry.metadata.get("help"):
            flags[name] = names

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            options = {name: values.pop(name) for name in flags}
            for name, value in options.items():
                if types[name] == "Sequence[float]" and value is not None:
                    options[name] = _numbers(flags[name][0], value)
            command(**values, **{into: {name: value for name, value in options.items() if value not in (None, [])}})

        signature = inspect.signature(command, eval_str=True)
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=entries[name].default,
                annotation=Annotated[
                    OPTION_TYPES.get(types[name], str) | None, typer.Option(*names, help=entries[name].metadata["help"])
                ],
            )
            for name, names in flags.items()
        ]
        own = [parameter for name, parameter in signature.parameters.items() if name != into]
        call.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return call

    return decorate


def _numbers(flag: str, given: str) -> list[float]:
    try:
        return [float(item) for item in given.split(",")]
    except ValueError:
        raise SamplingError(f"{flag} is {given!r}; write decreasing numbers separated by commas.") from None


class App(typer.Typer):
    """Typer application whose commands receive paths with ``~`` and environment variables expanded."""

    def command(self, *args: Any, **options: Any) -> Any:
        register = super().command(*args, **options)

        def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(command)
            def call(**values: Any) -> None:
                command(**{name: _expanded(value) for name, value in values.items()})

            call.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
            register(call)
            return command

        return decorate


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return Path(expanded(value)) if isinstance(value, Path) else value


def new_app(group: type[typer.core.TyperGroup] | None = None) -> typer.Typer:
    """Create a typer application that reports usage errors in one sentence; ``group`` is the class of its commands' group."""
    return App(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, cls=group
    )


def run(app: typer.Typer) -> None:
    """Run a command on ``sys.argv`` and exit the process.

    Exit codes: 2 for a user's mistake, and for what the operating system refuses (a full disk, a file that cannot be
    read), reported in one sentence on stderr; 75 (``EX_TEMPFAIL``) for a training that a
    signal stopped and the same command resumes; 130 for Ctrl-C; 1 with a traceback for a defect of ldm, and with ``--debug``
    for any mistake.
    """
    shorten_waiting()
    try:
        app()
    except (LdmError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error if isinstance(error, LdmError) else _refusal(error)}", file=sys.stderr)
        sys.exit(75 if isinstance(error, Interrupted) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _refusal(error: OSError) -> str:
    """Return the sentence for an error of the operating system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {error.filename or 'a file'} cannot be written; free some space and repeat the command."
        )
    if error.filename is None or error.strerror is None:
        return f"{first_line(error) or type(error).__name__}; repeat the command with --debug to see where."
    return f"{error.filename} cannot be used ({error.strerror}); repeat the command with --debug to see where."


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next allocation instead of returning it to the kernel.

    A step on the CPU frees and allocates the same large tensors again and again; on virtual machines the page faults
    of fresh memory cost more than the arithmetic. Without effect where the C library is not glibc.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # names of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
