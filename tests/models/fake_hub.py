"""A Hugging Face hub on 127.0.0.1 with one model: what huggingface_hub asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"
GATED = "someone/gated"
TOKEN = "hf_allowed"


@dataclass
class FakeHub:
    """The server's address, and the paths it was asked for."""

    url: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serves the files of ``folder`` as `REPO`, and as `GATED` to who shows `TOKEN`."""
    hub = FakeHub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            repo = next((name for name in (REPO, GATED) if f"/{name}/" in f"{path}/"), None)
            if repo is None:
                self._refuse(401, "RepoNotFound")
            elif repo == GATED and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._refuse(403, "GatedRepo")
            else:
                self._answer(path.removeprefix("/api/models").removeprefix(f"/{repo}").split("/")[1:])

        def _answer(self, parts: list[str]) -> None:
            kind, revision, name = parts[0], parts[1], "/".join(parts[2:])
            if revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            elif kind == "revision":
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": files}).encode())
            elif kind == "tree":
                self._send(json.dumps([_entry(file) for file in sorted(folder.iterdir())]).encode())
            elif not (folder / name).is_file():
                self._refuse(404, "EntryNotFound")
            else:
                self._send((folder / name).read_bytes(), ETag=f'"{_digest(folder / name)}"')

        def _send(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for key, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
