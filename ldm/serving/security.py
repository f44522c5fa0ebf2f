"""What a request must pass before an API sees it: key, origin, host, size and time; and the log line of each request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from ldm.errors import ConfigError
from ldm.serving.limits import Limits
from ldm.serving.metrics import Metrics

LOG = logging.getLogger("ldm.serving")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]

KEY_VARIABLE = "LDM_API_KEY"
"""Environment variable of the API key."""

MIN_KEY = 16
"""Least number of characters of an API key."""

OPEN_PATHS = ("/health", "/files/", "/page/")
"""Paths that need no key, as does ``/``: whether the server works, images, whose names cannot be guessed, and the pages."""


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_keys(host: str, file: Path | None) -> tuple[str, ...]:
    """Return the API keys of a server: the lines of ``file``, and that of the environment variable ``LDM_API_KEY``.

    Raises:
        ConfigError: there is none, though others than this machine can reach ``host``; the file cannot be read; one is short.
    """
    try:
        lines = [] if file is None else file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file of API keys {file} cannot be read ({error}); give a text file, a key a line."
        ) from None
    keys = tuple(key for key in (*lines, os.environ.get(KEY_VARIABLE, "")) if key)
    if any(len(key) < MIN_KEY for key in keys):
        raise ConfigError(f"an API key has less than {MIN_KEY} characters; make a longer one.")
    if not keys and (file is not None or not is_loopback(host)):
        where = f"the file {file} has no API key" if file is not None else f"{host} can be reached from other machines"
        raise ConfigError(f"{where}; give a key in a file (--api-key-file) or in the variable {KEY_VARIABLE}.")
    return keys


class Refused(HTTPException):
    """A request that is refused before an API has seen all of it; the connection is closed."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message, {"connection": "close"})


class Guard:
    """ASGI middleware that refuses requests without a key, of other origins, too large or too slow, and logs all of them.

    Args:
        app: the application.
        limits: bounds of size and time.
        keys: API keys; empty: none is needed.
        hosts: names in the Host header that are accepted; None: all. Without a key they protect from pages in a browser
            on this machine whose name has been made to point to it (DNS rebinding).
        origins: pages of other origins that may call the server from a browser.
        metrics: counts the requests.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        limits: Limits,
        keys: Collection[str] = (),
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
        metrics: Metrics | None = None,
    ):
        self.app, self.limits, self.keys, self.hosts, self.origins = app, limits, keys, hosts, origins
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, start, status = secrets.token_hex(8), time.monotonic(), 499  # as nginx: the client has gone

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            scope.setdefault("state", {})["client"] = self._client(scope, headers)
            await self.app(scope, self._bounded(receive), send_with_id)
        except Refused as refusal:
            await _answer(send_with_id, refusal)
        except Exception:
            status = 500  # of a defect, which the application's outermost layer answers
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            if self.metrics is not None:
                self.metrics.requests.labels(path, str(status)).inc()
            record = {
                "request": request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(time.monotonic() - start, 3),
            }
            LOG.info("request", extra={"record": record})

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _without_port(host) not in self.hosts:
            raise Refused(421, "the Host header names another server; call this one by its address.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and origin not in self.origins:
            raise Refused(
                403, "pages of other origins may not call this server; start it with --cors ORIGIN to allow one."
            )
        if self.keys and scope["method"] != "OPTIONS" and not _is_open(scope["path"]):
            given = _key(headers).encode()
            # each key is compared, so that the time does not tell which one is near
            if sum([hmac.compare_digest(given, key.encode()) for key in self.keys]) == 0:
                raise Refused(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.limits.max_upload_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the request is larger than {self.limits.max_upload_bytes} bytes; send smaller images.")

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        """Return a name of who asks: a digest of the key, or without keys the address."""
        if self.keys:
            return f"key-{hashlib.sha256(_key(headers).encode()).hexdigest()[:16]}"
        return (scope.get("client") or ("",))[0]

    def _bounded(self, receive: Receive) -> Receive:
        """Return ``receive`` with bounds on the size of the body, and on the time until it has arrived."""
        size, complete, deadline = 0, False, time.monotonic() + self.limits.upload_seconds

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                seconds = self.limits.upload_seconds
                raise Refused(408, f"the request has not arrived within {seconds:g} seconds; send it again.") from None
            size += len(message.get("body", b""))
            if size > self.limits.max_upload_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        return bounded


def _is_open(path: str) -> bool:
    return path == "/" or path.startswith(OPEN_PATHS)


def _key(headers: dict[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _answer(send: Send, refusal: Refused) -> None:
    body = json.dumps(error_body(refusal.detail, refusal.status_code)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if refusal.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error response, as OpenAI's API has it; ``detail`` is what clients of A1111 read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}, "detail": message}


class JSONLines(logging.Formatter):
    """Formats records of the log as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"time": self.formatTime(record), "event": record.getMessage()}
        fields |= getattr(record, "record", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def trusted_hosts(host: str, names: Iterable[str] = ()) -> frozenset[str] | None:
    """Return the names by which a server on ``host`` may be called without a key."""
    return frozenset({"127.0.0.1", "localhost", "::1", host, *names}) if is_loopback(host) else None
