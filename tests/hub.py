"""A small Hub on loopback: as much of the Hugging Face Hub's interface as downloading a model takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 100_000  # as the Hub does: larger files have the hash of their content for an etag


@dataclass
class Repository:
    """A repository: the files of each commit, and which commit `main` is.

    gated   its files are refused
    breaks  name -> how many bytes of the file come before the connection breaks, once
    stalls  name -> how many bytes of the file come before nothing more does
    lies    name -> other content than what is listed
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    gated: bool = False
    breaks: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit with these files, which `main` is from now on."""
        digest = hashlib.sha1()
        for name, content in sorted(files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        self.main = digest.hexdigest()
        self.commits[self.main] = dict(files)
        return self.main


@dataclass
class Hub:
    """Repositories by name, and the requests that came: method, path, the range that was asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """A repository with these files."""
        repository = self.repositories[name] = Repository()
        repository.commit(files)
        return repository

    def fetched(self) -> list[str]:
        """The names of files that were downloaded whole, or up to where the connection broke."""
        return [path.rpartition("/")[2] for method, path, span in self.requests
                if method == "GET" and "/resolve/" in path and not span]  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def etag(content: bytes) -> str:
    """What the Hub calls a content by: sha256 of large files, git's hash of small ones."""
    if len(content) > LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _listed(name: str, content: bytes) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
    if len(content) > LFS_BYTES:
        item |= {"oid": "0" * 40, "lfs": {"oid": etag(content), "size": len(content), "pointerSize": 134}}
    return item


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        found = re.fullmatch(
            r"/(?P<api>api/models/)?(?P<repo>[^/]+/[^/]+?)"
            r"(?:/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?",
            path,
        )
        repository = self.hub.repositories.get(found["repo"]) if found else None
        if found is None or repository is None:
            self._refuse(404, "RepoNotFound")
            return
        commit = repository.main if found["revision"] in (None, "main") else str(found["revision"])
        files = repository.commits.get(commit)
        if files is None:
            self._refuse(404, "RevisionNotFound")
        elif found["what"] == "tree":
            self._answer(json.dumps([_listed(*item) for item in files.items()]).encode(), commit)
        elif found["api"]:
            self._answer(json.dumps({"id": found["repo"], "sha": commit, "siblings": []}).encode(), commit)
        elif repository.gated:
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif found["file"] not in files:
            self._refuse(404, "EntryNotFound")
        else:
            content = repository.lies.get(found["file"], files[found["file"]])
            is_whole = self.command == "GET" and "Range" not in self.headers
            stop = repository.breaks.pop(found["file"], None) if is_whole else None
            stalls = is_whole and found["file"] in repository.stalls
            self._answer(content, commit, repository.stalls[found["file"]] if stalls else stop)
            if stalls:
                self.wfile.flush()
                self.hub.is_over.wait()

    def _answer(self, content: bytes, commit: str, stop: int | None = None) -> None:
        """All of `content`, or the range that was asked for; the connection breaks after `stop` bytes."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        sent = content[int(span[1]) : int(span[2]) + 1 if span[2] else None] if span else content
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(sent)))
        if span:
            self.send_header(
                "Content-Range", f"bytes {span[1]}-{int(span[1]) + len(sent) - 1}/{len(content)}"
            )
        self.send_header("ETag", f'"{etag(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent[:stop])
            if stop is not None:
                self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("X-Error-Code", code)
        self.end_headers()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A Hub that listens as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
