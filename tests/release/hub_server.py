"""A small Hub on localhost, enough for the real client to create a repository and push files to it.

It speaks the calls that `huggingface_hub` makes for a push: create, info, tree, validate-yaml,
preupload, LFS batch, upload, verify, commit. It keeps what it was sent, notes every call, and fails
where a test tells it to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import yaml

TOKEN = "hf_" + "localtesttokenlocaltesttoken01"
# A fault that is no status: the connection is closed when half of the call has arrived.
DROPPED = 0


@dataclass
class Repository:
    """What stands in one repository: the files of its last commit by name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def head(self) -> str:
        """The name of the last commit."""
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """Everything the server holds.

    `faults` are statuses to answer a kind of call with, one after the other; DROPPED for no answer.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    faults: dict[str, list[int]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def count(self, kind: str) -> int:
        """How often a kind of call was made."""
        return self.calls.count(kind)

    def next_fault(self, kind: str) -> int | None:
        """The fault that this call is to meet, if there is one left."""
        faults = self.faults.get(kind)
        return faults.pop(0) if faults else None


def git_oid(content: bytes) -> str:
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    """Whether the Hub keeps a file apart from git."""
    return name.endswith(".safetensors")


def create(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    name = f"{body.get('organization') or 'me'}/{body['name']}"
    private = body.get("visibility") == "private"
    known = name in hub.repositories
    hub.repositories.setdefault(name, Repository(private))
    answer = {"url": f"{hub.url}/{name}", "name": name}
    return (409 if known else 200), answer


def info(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    name = path.removeprefix("/api/models/").partition("/revision/")[0]
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    repository = hub.repositories[name]
    siblings = [{"rfilename": file} for file in repository.files]
    return 200, {
        "id": name,
        "private": repository.private,
        "sha": repository.head,
        "siblings": siblings,
        "tags": [],
    }


def tree(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    repository = hub.repositories[path.removeprefix("/api/models/").partition("/tree/")[0]]
    entries = []
    for name, content in repository.files.items():
        entries.append(
            {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        )
    return 200, entries


def validate(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    try:
        content = body["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        ok = "library_name" in metadata
    except yaml.YAMLError:
        ok = False
    if ok:
        return 200, {"errors": [], "warnings": []}
    return 400, {"errors": [{"message": "bad card"}], "warnings": []}


def preupload(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    repository = hub.repositories[path.removeprefix("/api/models/").partition("/preupload")[0]]
    answers = []
    for file in body["files"]:
        name = file["path"]
        upload_mode = {
            "path": name,
            "uploadMode": "lfs" if is_lfs(name) else "regular",
            "shouldIgnore": False,
        }
        old = repository.files.get(name)
        if old is not None:
            oid = hashlib.sha256(old).hexdigest() if is_lfs(name) else git_oid(old)
            upload_mode["oid"] = oid
        answers.append(upload_mode)
    return 200, {"files": answers}


def batch(hub: Hub, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    objects = []
    for wanted in body["objects"]:
        blob = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.blobs:
            blob["actions"] = {
                "upload": {"href": f"{hub.url}/upload/{wanted['oid']}"},
                "verify": {"href": f"{hub.url}/verify"},
            }
        objects.append(blob)
    return 200, {"transfer": "basic", "objects": objects}


def upload(hub: Hub, path: str, body: bytes) -> tuple[int, Any]:
    oid = path.rpartition("/")[2]
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "wrong bytes"}
    hub.blobs[oid] = body
    return 200, {}


def commit(hub: Hub, path: str, body: bytes) -> tuple[int, Any]:
    name = path.removeprefix("/api/models/").partition("/commit/")[0]
    repository = hub.repositories[name]
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repository.files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
            del repository.files[value["path"]]
    repository.commits += 1
    return 200, {
        "success": True,
        "commitUrl": f"{hub.url}/{name}/commit/{repository.head}",
        "commitOid": repository.head,
    }


def kind_of(method: str, path: str) -> str:
    """What a call is for."""
    if path == "/api/repos/create":
        return "create"
    if path == "/api/validate-yaml":
        return "validate"
    for name in ("preupload", "commit", "tree"):
        if f"/{name}/" in path:
            return name
    if path.endswith("/objects/batch"):
        return "batch"
    if path == "/verify":
        return "verify"
    return "upload" if method == "PUT" else "info"


# Calls whose body is JSON; the others bring bytes.
_JSON_HANDLERS = {
    "create": create,
    "info": info,
    "tree": tree,
    "validate": validate,
    "preupload": preupload,
    "batch": batch,
}
_BYTES_HANDLERS = {"upload": upload, "commit": commit}


def answer(hub: Hub, kind: str, path: str, raw: bytes) -> tuple[int, Any]:
    """The status and body that a call is answered with."""
    if kind == "verify":
        return 200, {}
    if kind in _BYTES_HANDLERS:
        return _BYTES_HANDLERS[kind](hub, path, raw)
    return _JSON_HANDLERS[kind](hub, path, json.loads(raw) if raw else {})


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            path = urlparse(self.path).path
            kind = kind_of(self.command, path)
            hub.calls.append(kind)
            hub.tokens.add(self.headers.get("Authorization", ""))
            length = int(self.headers.get("Content-Length") or 0)
            fault = hub.next_fault(kind)
            if fault == DROPPED:
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            raw = self.rfile.read(length)
            if fault is None:
                self._send(*answer(hub, kind, path, raw))
            else:
                self._send(fault, {"error": f"told to answer {fault}"})

        def _send(self, status: int, content: Any) -> None:
            # A gateway that fails says so in HTML, not in JSON.
            is_json = status < 500
            sent = json.dumps(content).encode() if is_json else b"<html>bad gateway</html>"
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if is_json else "text/html")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
