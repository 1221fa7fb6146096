"""A Hub on loopback: as much of its HTTP as the real `huggingface_hub` client pulls and pushes by, and faults.

It offers large files by the "basic" LFS transfer and knows nothing of Xet. A client with hf_xet installed would upload
by Xet alone, without asking: `environment` therefore sets HF_HUB_DISABLE_XET for it.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN, USER = "hf_TestTokenThatMustNotLeak", "me"
LFS_ENDINGS = (".safetensors", ".pth", ".png", ".jpg", ".parquet", ".tar")
NAME = (
    r"((?:datasets/|spaces/)?[^/]+/[^/]+)"  # names of datasets and Spaces have the prefix that they have in addresses
)


@dataclass
class Repo:
    """One repository: for each commit its message and files, newest last."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2] if self.commits else {}

    @property
    def messages(self) -> list[str]:
        return [message for _, message, _ in self.commits]

    def commit(self, files: dict[str, bytes], message: str = "by hand", deleted: Sequence[str] = ()) -> str:
        name = hashlib.sha1(f"{id(self)} {len(self.commits)} {message}".encode()).hexdigest()
        kept = {path: content for path, content in self.files.items() if path not in deleted}
        self.commits.append((name, message, kept | files))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return (self.commits[-1][0], self.files) if self.commits else ("0" * 40, {})
        name = self.tags.get(revision, revision)
        return next(((commit, files) for commit, _, files in self.commits if commit == name), None)


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind."""

    method: str
    path: str
    status: int | None
    times: int
    seconds: float
    body: str


class Server:
    """Repositories by name, what was asked for so far, and faults."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, list[tuple[int, int]]] = {}  # for each path the parts [start, end) that were read of it
        self.tokens = {TOKEN: {"name": USER, "role": "write"}}
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.gate = threading.Event()  # while it is cleared, nothing is answered
        self.gate.set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **how: Any) -> Repo:
        repo = self.repos[name] = Repo(**how)
        repo.commit(files)
        return repo

    def fail(
        self,
        path: str = "",
        *,
        method: str = "",
        status: int | None = 503,
        times: int = 1,
        seconds: float = 0,
        body: str = "",
    ) -> None:
        """The next requests whose path has this pattern get this status; None closes the connection; 0 only waits."""
        self.faults.append(Fault(method, path, status, times, seconds, body))

    def count(self, method: str, path: str) -> int:
        return sum(asked == method and re.search(path, where) is not None for asked, where in self.requests)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
        }


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server that lives as long as the block."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        hub = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._is_chunked() else b""
        if self._is_chunked():
            self.body = b"".join(self._chunks())
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = next((f for f in self.hub.faults if f.times and self._meets(f, path)), None)
            if fault:
                fault.times -= 1
        self.hub.gate.wait(60)
        if fault:
            time.sleep(fault.seconds)
            if fault.status is None:
                # A reset, not a polite end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return None
            if fault.status:
                return self._error(fault.status, "", fault.body or "injected")
        return self._route(path)

    def _meets(self, fault: Fault, path: str) -> bool:
        return fault.method in ("", self.command) and re.search(fault.path, path) is not None

    def _is_chunked(self) -> bool:
        return "chunked" in (self.headers.get("Transfer-Encoding") or "")

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _route(self, path: str) -> None:
        routes = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", rf"/api/(?:models/)?{NAME}(?:/revision/(.+))?", self._info),
            ("GET", rf"/api/(?:models/)?{NAME}/tree/([^/]+)(?:/(.+))?", self._tree),
            ("POST", rf"/api/(?:models/)?{NAME}/paths-info/([^/]+)", self._paths),
            ("POST", rf"/api/(?:models/)?{NAME}/preupload/(.+)", self._preupload),
            ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(\w+)", self._put),
            ("POST", rf"/api/(?:models/)?{NAME}/commit/(.+)", self._commit),
            ("GET|HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", self._resolve),
        )
        for methods, pattern, answer in routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                return answer(*found.groups())
        self._error(404, "", f"no such route {path}")

    # ---- Who may what

    def _token(self) -> dict[str, str] | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _readable(self, name: str) -> Repo | None:
        """The repository, or an answer that says there is none, as the Hub does for a private one, too."""
        repo = self.hub.repos.get(name)
        if self.headers.get("Authorization") and not self._token():
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not self._token()):
            self._error(401 if not self._token() else 404, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def _writable(self, name: str) -> Repo | None:
        token = self._token()
        if not token:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif token["role"] != "write" or name.split("/")[-2] != token["name"]:
            self._error(403, "", "You don't have the rights to write here")
        elif name not in self.hub.repos:
            self._error(404, "RepoNotFound", "Repository not found")
        else:
            return self.hub.repos[name]
        return None

    def _whoami(self) -> None:
        token = self._token()
        if not token:
            return self._error(401, "", "Invalid user token")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": token["role"]}}
        self._json({"type": "user", "name": token["name"], "orgs": [], "auth": auth})

    # ---- Repositories

    def _create(self) -> None:
        asked, token = json.loads(self.body), self._token()
        if not token:
            return self._error(401, "", "Invalid credentials in Authorization header")
        name = f"{asked.get('organization') or token['name']}/{asked['name']}"
        if token["role"] != "write" or name.split("/")[0] != token["name"]:
            return self._error(403, "", "You don't have the rights to create a model under this namespace")
        if asked.get("type") == "space" and not asked.get("sdk"):
            return self._error(400, "", "sdk is required")
        name = {"dataset": "datasets/", "space": "spaces/"}.get(asked.get("type"), "") + name
        if name in self.hub.repos:
            told = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return self._json(told, status=409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _info(self, name: str, revision: str | None) -> None:
        if not (repo := self._readable(name)):
            return
        found = repo.at(revision or "main")
        if not found:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in sorted(found[1])]
        self._json({"id": name, "sha": found[0], "private": repo.private, "gated": repo.gated, "siblings": siblings})

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        if not (repo := self._readable(name)):
            return
        if not (found := repo.at(revision)):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        inside = f"{folder}/" if folder else ""
        whole = "recursive=true" in self.path.lower() or "recursive=1" in self.path
        below = {path: content for path, content in found[1].items() if path.startswith(inside)}
        folders = {path[: at.start()] for path in below for at in re.finditer("/", path) if at.start() >= len(inside)}
        rows = [{"type": "directory", "path": path, "size": 0, "oid": _git_oid(path.encode())} for path in folders]
        rows += [_entry(path, content) for path, content in below.items()]
        self._json([row for row in rows if whole or "/" not in row["path"].removeprefix(inside)])

    def _paths(self, name: str, revision: str) -> None:
        if not (repo := self._readable(name)):
            return
        if not (found := repo.at(revision)):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        try:
            asked = json.loads(self.body)["paths"]
        except ValueError:
            asked = urllib.parse.parse_qs(self.body.decode())["paths"]
        self._json([_entry(path, found[1][path]) for path in asked if path in found[1]])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._readable(name)):
            return
        if not (found := repo.at(revision)):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if repo.gated and not path.endswith("README.md"):
            return self._error(403 if self._token() else 401, "GatedRepo", "Access to this model is restricted")
        if path not in found[1]:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found[0]})
        content = found[1][path]
        is_large = path.endswith(LFS_ENDINGS)
        tag = _sha256(content) if is_large else _git_oid(content)
        more = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))} if is_large else {}
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes", **more}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(part[1]), int(part[2] or len(content) - 1) + 1) if part else (0, len(content))
        end = min(end, len(content))
        if self.command == "GET":
            self.hub.sent.setdefault(f"{name}/{path}", []).append((start, end))
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206 if part else 200, content[start:end], headers)

    # ---- Pushing

    def _validate(self) -> None:
        """The shape that the Hub asks for: known keys of the right kind, a name and a link with an unknown license."""
        text, errors = json.loads(self.body)["content"], []
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            tree = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            tree, errors = None, [str(error)]
        if not isinstance(tree, dict):
            errors.append("metadata are missing")
        else:
            if tree.get("license") == "other" and not (tree.get("license_name") and tree.get("license_link")):
                errors.append("license_name and license_link are required")
            if "license" in tree and not re.fullmatch(r"[a-z0-9.-]+", str(tree["license"])):
                errors.append("license is not valid")
            if not isinstance(tree.get("base_model", ""), str) or not isinstance(tree.get("tags", []), list):
                errors.append("base_model or tags are not valid")
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(body, status=400 if errors else 200)

    def _preupload(self, name: str, revision: str) -> None:
        if not (repo := self._writable(name)):
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            is_large, old = asked["path"].endswith(LFS_ENDINGS), repo.files.get(asked["path"])
            row = {"path": asked["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if old is not None:
                row["oid"] = _sha256(old) if is_large else _git_oid(old)
            files.append(row)
        self._json({"files": files})

    def _batch(self, name: str) -> None:
        if self._writable(name) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(row)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self._error(400, "", "the content is not that of its name")
        self.hub.blobs[oid] = self.body
        self._send(200, b"", {})

    def _commit(self, name: str, revision: str) -> None:
        if not (repo := self._writable(name)):
            return
        message, files, deleted = "", {}, []
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                deleted.append(value["path"])
            else:
                return self._error(400, "", f"unknown operation {key}")
        oid = repo.commit(files, message, deleted)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    # ---- Answers

    def _json(self, tree: Any, status: int = 200) -> None:
        self._send(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": message, "Content-Type": "application/json", **(headers or {})}
        if code:
            more["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), more)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as listings have it."""
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(LFS_ENDINGS):
        row["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 127}
    return row


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
