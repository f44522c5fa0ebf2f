"""A local S3 server, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ldm.benchmarks.case import peer_package

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server in a process of its own; yield its address.

    Raises:
        LdmError: moto is not installed.
    """
    peer_package("moto.server")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()
