"""Real servers on this machine, for the tests of remote shards: S3 by moto, and HTTP with requests for ranges."""

from __future__ import annotations

import functools
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Ranges(SimpleHTTPRequestHandler):
    """Python's file server, with requests for ranges, and answers of 503 on demand."""

    protocol_version = "HTTP/1.1"
    failures: Counter[str]
    """Number of further answers of 503, by the end of the path."""
    requests: list[str]
    """Paths that were asked for."""

    def do_GET(self) -> None:
        self.requests.append(self.path)
        for ending in [ending for ending, left in self.failures.items() if self.path.endswith(ending) and left > 0]:
            self.failures[ending] -= 1
            self.send_error(503)
            return
        path, found = (
            Path(self.translate_path(self.path)),
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")),
        )
        if found is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def do_HEAD(self) -> None:
        for ending in [ending for ending, left in self.failures.items() if self.path.endswith(ending) and left > 0]:
            self.failures[ending] -= 1
            self.send_error(503)
            return
        super().do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def http_server(folder: Path) -> Iterator[tuple[str, type[Ranges]]]:
    """A server of the files of a folder: its address, and its handler."""
    handler = type("Handler", (Ranges,), {"failures": Counter(), "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server: its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
