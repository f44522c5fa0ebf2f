"""The command that serves models over HTTP: ``tools/serve.py`` and ``ldm-serve``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ldm.cli.common import DTYPES, Debug, new_app, options_from, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import ConfigError, require_package, unknown
from ldm.image_marks import ImageMarks
from ldm.serving.limits import Limits

if TYPE_CHECKING:
    import uvicorn

    from ldm.serving.service import Service

DRAIN_SECONDS = 7.0
"""Seconds that running images have after SIGTERM; then they are cancelled and their clients get status 503."""

MAX_CONNECTIONS = 1000

app = new_app()


@app.command()
@options_from(Limits, into="limits")
@options_from(ImageMarks, into="marks")
def serve(
    model: Annotated[
        list[str] | None,
        Option(
            help="NAME=SOURCE of a model that requests can name, repeatable, or SOURCE alone; "
            "default: emoji, or none with --runs."
        ),
    ] = None,
    runs: Annotated[Path | None, Option(help="Folder of training runs to show, such as runs.")] = None,
    host: Annotated[str, Option(help="Address to listen on; any but 127.0.0.1 needs an API key.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on; 0: a free one.")] = 8000,
    gallery: Annotated[Path, Option(help="Folder of the generated images.")] = Path("gallery"),
    lora_folder: Annotated[
        Path | None, Option(help="Folder of the LoRAs that <lora:name:0.8> in prompts names.")
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        Option(help="NAME=SOURCE of a ControlNet that requests can name, repeatable, or SOURCE alone."),
    ] = None,
    memory: Annotated[
        float | None, Option(help="GB of parameters above which models that were not used for longest are unloaded.")
    ] = None,
    api_key_file: Annotated[Path | None, Option(help="File of API keys, one a line; LDM_API_KEY is another.")] = None,
    cors: Annotated[list[str] | None, Option(help="Origin whose pages may call the server, repeatable.")] = None,
    allow_host: Annotated[
        list[str] | None, Option(help="Further name in the Host header of a server on 127.0.0.1, repeatable.")
    ] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, Option(help="fp32, bf16 or fp16; default: bf16 if the device has it natively.")
    ] = None,
    exact: Annotated[
        bool | None,
        Option(
            "--exact/--fast", help="Batch only as images stay the same to the bit; default on the CPU, else --fast."
        ),
    ] = None,
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write prompts into the log, too.")] = False,
    debug: Debug = False,
    *,
    limits: dict[str, Any],
    marks: dict[str, Any],
) -> None:
    """Serve models over HTTP: OpenAI's images API, and jobs with previews; and show training runs."""
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require_package(package, "serving", "serve")
    import torch
    import uvicorn

    from ldm.devices import default_device, usable
    from ldm.serving.app import create_app
    from ldm.serving.security import api_keys, trusted_hosts
    from ldm.serving.service import Service, exact_by_default

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    controlnets = model_sources(controlnet or [], "--controlnet")
    sources = model_sources(model or (["emoji"] if runs is None else []))
    keys = api_keys(host, api_key_file)
    image_marks = ImageMarks(**marks)
    image_marks.check()
    set_up_log()
    use_idle_cores()
    on = default_device() if device is None else usable(device)
    service = Service(
        sources,
        gallery,
        Limits(**limits),
        exact_by_default(on) if exact is None else exact,
        log_prompts,
        image_marks,
        device=str(on),
        dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
        lora_folder=lora_folder,
        controlnets=controlnets,
        memory=None if memory is None else int(memory * 1e9),
    )
    hosts = None if keys else trusted_hosts(host, allow_host or ())
    application = create_app(service, keys, hosts, cors or (), runs)
    if sources:
        service.models.load(service.models.names[0])  # a source that cannot be read ends the command
    new_server(
        uvicorn.Config(
            application,
            host,
            port,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(DRAIN_SECONDS + 2),
        ),
        service,
        [*sources, *([] if runs is None else [f"the runs of {runs}"])],
    ).run()


def new_server(config: uvicorn.Config, service: Service, served: Sequence[str]) -> uvicorn.Server:
    """Return a server that prints its address and what is served, and at a signal lets running images finish for some seconds."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                for socket in server.sockets:
                    host, port = socket.getsockname()[:2]
                    print(f"serving {', '.join(served)} on http://{host}:{port}", flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            service.scheduler.drain(DRAIN_SECONDS)
            super().handle_exit(sig, frame)

    return Server(config)


def set_up_log() -> None:
    """Write the log of the server to stderr, one JSON object a line, without warnings, which quote prompts."""
    import logging
    import warnings

    from ldm.serving.security import JSONLines

    warnings.simplefilter("ignore", UserWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name, level in (("ldm.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def model_sources(values: list[str], flag: str = "--model") -> dict[str, str]:
    """Parse ``["name=source", "source"]``; a source alone has the name of its last part."""
    sources: dict[str, str] = {}
    for given in values:
        name, found, source = given.partition("=")
        if not found:
            name, source = Path(given).name, given
        if not name or not source:
            raise ConfigError(f"{flag} is {given!r}; write NAME=SOURCE.")
        if name in sources:
            raise ConfigError(f"{flag} names {name!r} twice; give each another name.")
        sources[name] = source
    return sources


def main() -> None:
    """The command."""
    run(app)
