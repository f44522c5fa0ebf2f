"""A hub on localhost: of the protocol of the Hugging Face hub, what its client asks for to fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories that are served at ``url`` until :meth:`stop`, and what was fetched of them."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}  # of a model: the folder of each commit, the newest last
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token: str | None = None  # that opens the two
        self.cut = 0  # bytes that every file is sent too short
        self.breaks = 0  # downloads to break off in the middle
        self.fetched: list[str] = []  # names of files, in the order of their downloads
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Answer no more; a second time, do nothing."""
        self._server.shutdown()
        self._server.server_close()

    def commit(self, model: str, folder: Path) -> str:
        """Make ``folder`` the newest commit of ``model``, and return its name."""
        commits = self.commits.setdefault(model, {})
        name = hashlib.sha1(f"{model} {len(commits)}".encode()).hexdigest()
        commits[name] = folder
        return name


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        status, headers, content = self._reply([unquote(part) for part in urlsplit(self.path).path.split("/")[1:]])
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if self.hub.breaks and "ETag" in headers:
                self.hub.breaks -= 1
                content = content[: len(content) // 2]
            self.wfile.write(content)

    def _reply(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        """What /api/models/{model}[/revision/{commit}|/tree/{commit}] and /{model}/resolve/{commit}/{file} say."""
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        model, action, revision = f"{owner}/{name}", rest[0] if rest else "", rest[1] if rest else "main"
        commits = self.hub.commits.get(model, {})
        commit = list(commits)[-1] if commits and revision == "main" else revision
        opened = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not commits or (model in self.hub.private and not opened):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = {path.relative_to(commits[commit]).as_posix(): path for path in commits[commit].rglob("*.*")}
        if action == "tree":
            rows = [(file, path.stat().st_size, _oid(path)) for file, path in files.items()]
            tree = [{"type": "file", "path": file, "size": size, "oid": oid} for file, size, oid in rows]
            return 200, {}, json.dumps(tree).encode()
        if api:
            info = {"id": model, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return 200, {}, json.dumps(info).encode()
        if model in self.hub.gated and not opened:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = files[file].read_bytes()
        headers = {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": commit}
        if self.command == "HEAD":
            return 200, headers, content
        self.hub.fetched.append(file)
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            return 206, headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}, content[first:]
        return 200, headers, content[: len(content) - self.hub.cut]


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
