"""Servers of the tests of remote shards: Python's file server, with requests for ranges, and moto's S3 server.

They have processes of their own: worker processes would inherit their connections, and keep them open.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from ldm.benchmarks.s3_server import s3_server

ROOT = Path(__file__).parents[2]


class WebServer:
    """A running server: its address, and control of its failures."""

    def __init__(self, url: str):
        self.url = url

    def fail(self, ending: str, times: int) -> None:
        """Let further requests of paths with this ending get the answer 503."""
        self._ask(f"fail/{times}/{ending}")

    def failures(self, ending: str) -> int:
        """Number of such answers that are still to be given."""
        return int(self._ask(f"left/{ending}"))

    def requests(self) -> list[str]:
        """Paths that were read, in order."""
        return list(self._ask("requests"))

    def _ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/-/{what}") as answer:
            return json.load(answer)


class Ranges(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    left: ClassVar[Counter[str]] = Counter()
    read: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path.startswith("/-/"):
            self._control(self.path[3:].split("/"))
            return
        self.read.append(self.path)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if self._fails():
            return
        if found is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
        self._answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def do_HEAD(self) -> None:
        if not self._fails():
            super().do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass

    def _fails(self) -> bool:
        for ending, left in self.left.items():
            if self.path.endswith(ending) and left > 0:
                self.left[ending] -= 1
                self.send_error(503)
                return True
        return False

    def _control(self, words: list[str]) -> None:
        if words[0] == "fail":
            self.left[words[2]] = int(words[1])
        answer: Any = self.read if words[0] == "requests" else self.left[words[-1]]
        self._answer(200, json.dumps(answer).encode(), {})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """A server of the files of a folder."""
    command = [sys.executable, "-m", "tests.data.servers", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield WebServer(f"http://127.0.0.1:{process.stdout.readline().strip()}")
        finally:
            process.kill()


@contextmanager
def s3_bucket() -> Iterator[str]:
    """An empty bucket of an S3 server, to which the environment leads."""
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as address, mock.patch.dict(os.environ, names | {"AWS_ENDPOINT_URL": address}):
        import boto3

        boto3.client("s3").create_bucket(Bucket="data")
        yield "s3://data"


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=sys.argv[1])) as server:
        sys.stdout.write(f"{server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever()
