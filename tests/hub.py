"""A Hugging Face Hub on localhost: what loading a model or a data set asks for, and faults.

It has no accounts, no storage for big files, and lists whatever it has on one page.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

# [/api][/models or /datasets]/OWNER/NAME[/WHAT/REVISION[/PATH]][?...]
ROUTE = r"(/api)?(?:/(models|datasets))?/([^/]+/[^/?]+)"
ROUTE += r"(?:/(resolve|revision|tree)/([^/?]+)/?([^?]*))?(?:\?.*)?"


class Hub(ThreadingHTTPServer):
    """Repositories by "models/owner/name", and the requests so far, such as "HEAD /"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits = {}  # repository: {commit: {path: bytes}}
        self.branches = {}  # name: commit, of every repository
        self.requests, self.fault = [], None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextmanager
    def broken(self, fault: str | None) -> Iterator[None]:
        """Count anew; it "hangs", "refuses" everyone (401), or "cuts" a model's weights in half."""
        self.requests.clear()
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection serves several requests

    def answer(self) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        if hub.fault == "hangs":
            threading.Event().wait(60)
        if hub.fault == "refuses":
            return self.send(401, {"error": "Invalid credentials"})
        if self.path == "/":
            return self.send(200, {})
        is_call, kind, name, what, revision, path = re.fullmatch(ROUTE, unquote(self.path)).groups()
        repository = f"{kind or 'models'}/{name}"
        if repository not in hub.commits:
            return self.missing(401, "RepoNotFound")
        commit = hub.branches.get(revision or "main", revision)
        files = hub.commits[repository].get(commit)
        if files is None:
            return self.missing(404, "RevisionNotFound")
        if not is_call:
            return self.send_file(files.get(path), path, commit)
        if what == "tree":
            names = below(files, path, is_deep="recursive=true" in self.path)
            return self.send(200, [describe(name, files.get(name)) for name in names])
        siblings = [{"rfilename": name} for name in files]
        self.send(200, {"id": name, "sha": commit, "siblings": siblings})

    do_GET = do_HEAD = answer

    def send_file(self, content: bytes | None, path: str, commit: str) -> None:
        """A file, or the rest of it from the byte that is asked for."""
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.missing(404, "EntryNotFound", headers)
        size, start = len(content), int(self.headers.get("Range", "bytes=0-")[6:-1])
        headers["ETag"] = f'"{sha1(content).hexdigest()}"'
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        is_cut = self.server.fault == "cuts" and path.startswith("model.")
        end = max(start, size // 2) if is_cut else size
        self.send(206 if start else 200, content[start:], headers, end - start)

    def missing(self, status: int, what: str, headers: dict | None = None) -> None:
        self.send(status, {"error": what}, {"X-Error-Code": what} | (headers or {}))

    def send(self, status: int, body: object, headers: dict | None = None, most=10**9) -> None:
        """Send bytes, or else JSON; after `most` bytes the connection is closed."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:most])
            self.close_connection = most < len(content)

    def log_message(self, *_: object) -> None:
        """Say nothing: the Hub has a list of its requests."""


def below(files: dict, folder: str, is_deep: bool) -> list[str]:
    """The files below a folder, or the files and folders in it."""
    start = f"{folder}/" if folder else ""
    names = [name.removeprefix(start) for name in files if name.startswith(start)]
    return [start + name for name in (names if is_deep else {name.partition("/")[0] for name in names})]


def describe(path: str, content: bytes | None) -> dict:
    """A file, or else a folder, as the Hub lists it."""
    kind, content = ("directory", b"") if content is None else ("file", content)
    return {"type": kind, "path": path, "size": len(content), "oid": sha1(content).hexdigest()}
