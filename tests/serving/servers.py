"""Real servers in a thread of the test's process, and the tiny model that they serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from ldm import Pipeline
from ldm.serving.app import create_app
from ldm.serving.limits import Limits
from ldm.serving.security import trusted_hosts
from ldm.serving.service import Service
from tests.tiny import tiny_model


@dataclass
class Running:
    """A server that runs, with a client for it and a pipeline of its model."""

    url: str
    service: Service
    http: httpx.Client
    pipe: Pipeline


@contextmanager
def serving(
    folder: Path, keys: tuple[str, ...] = (), limits: Limits | None = None, **options: Any
) -> Iterator[Running]:
    """Serve the tiny model on a free port, with its gallery in ``folder``."""
    pipe = Pipeline(tiny_model())
    source = pipe.save_pretrained(folder / "tiny.safetensors")
    sources = options.pop("sources", {"tiny": source, "other": source})
    origins, runs = options.pop("origins", ()), options.pop("runs", None)
    service = Service(sources, folder / "gallery", limits, device="cpu", **options)
    app = create_app(service, keys, None if keys else trusted_hosts("127.0.0.1"), origins, runs)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_keep_alive=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60, limits=httpx.Limits(max_connections=200)) as http:
            yield Running(url, service, http, Pipeline.from_pretrained(source, device="cpu"))
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
