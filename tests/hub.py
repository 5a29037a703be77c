"""A hub on loopback: enough of its interface for the real client libraries to load from it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, bytes]
"""Paths in a repository and their content."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        for name, files in self.repositories.items():
            kind, repository = name.split(":")
            prefix = "" if kind == "models" else f"{kind}/"
            if path.startswith(f"/{prefix}{repository}/resolve/"):
                file = path.split("/resolve/", 1)[1].split("/", 1)[1]
                return self._file(files.get(file))
            if path.startswith(f"/api/{kind}/{repository}"):
                rest = path.removeprefix(f"/api/{kind}/{repository}")
                return self._api(kind, repository, rest, files, body)
        return self._send(
            404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        )

    def _api(self, kind: str, repository: str, rest: str, files: Files, body: bytes) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
            for name, data in files.items()
        ]
        if rest.startswith("/tree/"):
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

    def _file(self, data: bytes | None) -> None:
        if data is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"}
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
            self.wfile.write(data)


@contextmanager
def hub(repositories: dict[str, Files]) -> Iterator[str]:
    """Serve repositories ("models:me/x", "datasets:me/y"); yields the endpoint's address."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
