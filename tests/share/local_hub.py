"""A hub on this machine: as much of the Hugging Face hub's protocol as huggingface_hub needs to upload and download.

Repositories with branches and commits, LFS for large files, etags, ranges, tokens, private repositories, and answers
that a test forces.
"""

from __future__ import annotations

import base64
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

import pytest

TOKEN = "hf_of-a-test"
LFS = 20_000
"""Files of at least so many bytes are LFS objects."""


@dataclass
class Repository:
    """Branches name commits, commits name files."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(repr((len(self.messages), branch, sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class Hub:
    """What the server holds. answers: (method, pattern of the path) -> status that it answers instead."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    card_error: str = ""
    """What the hub finds wrong in every model card."""
    cut: str = ""
    """A file of which only the first half arrives, once."""
    damaged: str = ""
    """A file whose last byte changes on its way to the client."""

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        self.repositories[name] = Repository()
        self.repositories[name].commit("main", files, "given")
        return self.repositories[name]


def oid_of(data: bytes) -> str:
    """The name of a git object."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(data: bytes) -> bool:
    return len(data) >= LFS


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keeps stderr clean."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        for (method, pattern), status in self.hub.answers.items():
            if method == self.command and re.search(pattern, path):
                self._error(status)
                return
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            self._error(401, message="Invalid credentials in Authorization header")
            return
        if self.command in ("POST", "PUT") and token is None and not path.startswith("/objects/"):
            self._error(401)
            return
        routes = (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self._info),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>.+)", self._tree),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<revision>.+)", self._branch),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self._preupload),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>.+)", self._commit),
            (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/objects/(?P<oid>[0-9a-f]{64})", self._object),
            (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        )
        for pattern, answer in routes:
            if found := re.fullmatch(pattern, path):
                self.body = body
                self._answer(answer, found, token)
                return
        self._error(404)

    def _answer(self, answer: Any, found: re.Match[str], token: str | None) -> None:
        named = found.groupdict()
        if "name" in named:
            repository = self.hub.repositories.get(named["name"])
            if repository is None or (repository.private and token is None):
                self._error(401 if token is None else 404, "RepoNotFound")
                return
            self.repository = repository
        answer(named)

    # --- answers ---

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        named = {"X_Error_Code": code, "X_Error_Message": message}
        self._send(status, b"{}", **{key: value for key, value in named.items() if value})

    def _create(self, _: object) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._send(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
            return
        repository = Repository(wanted.get("visibility") == "private" or wanted.get("private") is True)
        repository.commit("main", {".gitattributes": b""}, "initial commit")
        self.hub.repositories[name] = repository
        self._json({"url": f"{self.hub.url}/{name}"})

    def _validate(self, _: object) -> None:
        wrong = self.hub.card_error
        self._send(400 if wrong else 200, json.dumps({"errors": [{"message": wrong}] if wrong else []}).encode())

    def _at(self, named: dict[str, str | None]) -> tuple[str, dict[str, bytes]] | None:
        oid = self.repository.at(named.get("revision") or "main")
        if oid is None:
            self._error(404, "RevisionNotFound")
            return None
        return oid, self.repository.commits[oid]

    def _info(self, named: dict[str, str | None]) -> None:
        if found := self._at(named):
            oid, files = found
            siblings = [{"rfilename": file} for file in files]
            private = self.repository.private
            self._json({"id": named["name"], "sha": oid, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, named: dict[str, str | None]) -> None:
        if found := self._at(named):
            self._json([self._entry(file, data) for file, data in found[1].items()])

    def _entry(self, file: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": file, "size": len(data), "oid": oid_of(data)}
        if is_lfs(data):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _branch(self, named: dict[str, str]) -> None:
        if named["revision"] in self.repository.branches:
            self._error(409)
            return
        self.repository.branches[named["revision"]] = self.repository.branches["main"]
        self._json({})

    def _preupload(self, named: dict[str, str | None]) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, _: object) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/objects/{wanted['oid']}"}
            there = wanted["oid"] in self.hub.objects
            objects.append({**wanted, **({} if there else {"actions": {"upload": upload}})})
        self._json({"transfer": "basic", "objects": objects})

    def _object(self, named: dict[str, str]) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == named["oid"]
            self.hub.objects[named["oid"]] = self.body
        self._send(200)

    def _commit(self, named: dict[str, str]) -> None:
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        branch = named["revision"]
        files = dict(self.repository.commits[self.repository.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        oid = self.repository.commit(branch, files, header["value"]["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{named['name']}/commit/{oid}", "commitOid": oid})

    def _resolve(self, named: dict[str, str | None]) -> None:
        if not (found := self._at(named)):
            return
        oid, files = found
        data = files.get(named["file"] or "")
        if data is None:
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        etag = hashlib.sha256(data).hexdigest() if is_lfs(data) else oid_of(data)
        if named["file"] == self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"X_Repo_Commit": oid, "ETag": f'"{etag}"'}
        if named["file"] == self.hub.cut and self.command == "GET":
            self.hub.cut = ""
            self.close_connection = True
            self._send(200, data[: len(data) // 2], Content_Length=str(len(data)), **headers)
            return
        self.hub.ranges.append(self.headers.get("Range") or "")
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(begin[1])
            where = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(206, data[first:], Content_Range=where, **headers)
            return
        self._send(200, data, Content_Length=str(len(data)), **headers)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers while inside."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def used(hub: Hub, cache: Path, token: str | None = TOKEN, *, offline: bool = False) -> Iterator[None]:
    """huggingface_hub of this process talks to `hub`, with an empty cache; a fresh process needs `environment`."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # so that half of a small file is kept
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        yield


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """The same for a fresh process."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
