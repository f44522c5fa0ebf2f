"""What the commands share: how an error is told."""

from __future__ import annotations

import ctypes
import sys
from typing import Annotated

import typer

from ldm.errors import LdmError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
"""An option for every command; :func:`run` heeds it."""


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of torch's dtypes by those of commands."""


def new_app() -> typer.Typer:
    """A typer application that tells errors in plain sentences."""
    return typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def run(app: typer.Typer) -> None:
    """Run a command on ``sys.argv`` and leave the process.

    Exit codes: 2 for a user's mistake, told in one sentence on stderr; 130 for Ctrl-C; 1 with a traceback for
    a defect of ours, and with ``--debug`` for any mistake.
    """
    try:
        app()
    except LdmError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation instead of returning it to the kernel.

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
