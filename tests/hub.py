"""A hub on loopback: enough of its interface for the real client libraries to load from it."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, bytes]
"""Paths in a repository and their content."""


LARGE = (".tar", ".parquet", ".safetensors", ".bin", ".pt")
"""What the hub keeps in LFS: such files are named by their SHA-256."""


@dataclass
class Fault:
    """What goes wrong for requests whose path holds ``path``, the first ``times`` times.

    ``how`` is a status code (with ``headers``), or "slow", "short" (fewer bytes than were said),
    "wrong" (other bytes), "html" (a page in place of the file), "close" (no answer). Only GET
    requests of files are touched, unless ``every``, and only of whole files, if ``whole``.
    """

    how: int | str
    path: str = ""
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)
    every: bool = False
    whole: bool = False
    seconds: float = 3.0


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else _oid(data)


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry


def _children(entries: list[dict[str, object]], below: str) -> list[dict[str, object]]:
    """What lies directly in a folder: its files, and its folders."""
    prefix = f"{below}/" if below else ""
    found = {}
    for entry in entries:
        path = str(entry["path"])
        if path.startswith(prefix):
            name, _, deeper = path.removeprefix(prefix).partition("/")
            folder = {"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40}
            found[name] = folder if deeper else entry
    return list(found.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, Files]
    faults: list[Fault]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _fault(self, path: str, span: str) -> Fault | None:
        """The fault of this request, if it has one; counted."""
        file = self.command == "GET" and "/resolve/" in path
        for fault in self.faults:
            touched = fault.every or (file and not (fault.whole and span))
            if fault.path in path and touched and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range", "")
        self.asked.append(f"{self.command} {path} {span}".rstrip())
        self.fault = self._fault(path, span)
        if self.fault is not None:
            if isinstance(self.fault.how, int):
                return self._send(self.fault.how, b"{}", self.fault.headers)
            if self.fault.how == "close":
                self.close_connection = True
                return None
            if self.fault.how == "slow":
                time.sleep(self.fault.seconds)
        for name, files in self.repositories.items():
            kind, repository = name.split(":")
            prefix = "" if kind == "models" else f"{kind}/"
            if path.startswith(f"/{prefix}{repository}/resolve/"):
                file = path.split("/resolve/", 1)[1].split("/", 1)[1]
                return self._file(file, files.get(file))
            if path.startswith(f"/api/{kind}/{repository}"):
                rest = path.removeprefix(f"/api/{kind}/{repository}")
                return self._api(kind, repository, rest, files, body)
        return self._send(
            404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        )

    def _api(self, kind: str, repository: str, rest: str, files: Files, body: bytes) -> None:
        entries = [_entry(name, data) for name, data in files.items()]
        if rest.startswith("/tree/"):
            if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true":
                return self._json(entries)
            return self._json(_children(entries, rest.removeprefix("/tree/").partition("/")[2]))
        if rest.startswith("/paths-info/"):
            asked = parse_qs(body.decode()).get("paths", [])
            return self._json([entry for entry in entries if entry["path"] in asked])
        info = {
            "id": repository,
            "sha": COMMIT,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": name} for name in files],
        }
        return self._json(info)

    def _file(self, name: str, data: bytes | None) -> None:
        if data is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        etag = f'"{_etag(name, data)}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag, "Accept-Ranges": "bytes"}
        how = self.fault.how if self.fault else ""
        if how == "html":
            return self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        if how == "wrong":
            data = data[:-100] + bytes(100 - 1) + b"!" if len(data) > 100 else b"!" * len(data)
        span = self.headers.get("Range")
        if span and self.command == "GET":
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last) if last else len(data) - 1, len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            return self._send(206, data[int(first) : end + 1], headers)
        return self._send(200, data, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault and self.fault.how == "short":
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that give up are what is tested here."""


@contextmanager
def hub(
    repositories: dict[str, Files],
    *,
    faults: list[Fault] | None = None,
    asked: list[str] | None = None,
) -> Iterator[str]:
    """Serve repositories ("models:me/x", "datasets:me/y"); yields the endpoint's address.

    ``faults`` go wrong on purpose; ``asked`` gets every request, as "GET /path", or as
    "GET /path bytes=0-99" where a part is asked for.
    """
    state = {"faults": faults or [], "asked": [] if asked is None else asked, "fault": None}
    handler = type("Handler", (_Handler,), {"repositories": repositories, **state})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
