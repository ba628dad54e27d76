"""A server on this machine that speaks the endpoints of the Hugging Face Hub which `huggingface_hub` calls for models.

Commits are whole or not at all, as on the Hub; large files are uploaded before them. Faults are injected by path.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_secretsecretsecretsecretsecret12"
LARGE = (".safetensors", ".gz")
"""Suffixes of files that are stored as large ones."""


@dataclass
class Fault:
    """An answer in place of the right one."""

    pattern: str
    """Of `METHOD /path`."""
    status: int | None
    """None cuts the connection."""
    times: int = 10**9
    skip: int = 0
    """Let so many pass first."""
    done_first: bool = False
    """Do what was asked, then fail."""


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Hash of a commit to all files there; large ones too, by content."""
    branches: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        seed = f"{len(self.commits)}{sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())}"
        name = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[name] = files
        return name


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.writable = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are part of the tests."""

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.branches["main"] = repo.commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.branches[branch]]

    def asked(self, pattern: str) -> list[str]:
        return [one for one in self.requests if re.search(pattern, one)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        asked = f"{self.command} {unquote(parts.path)}"
        self.server.requests.append(asked)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = next((one for one in self.server.faults if re.search(one.pattern, asked) and one.times > 0), None)
        if fault is not None and fault.skip > 0:
            fault.skip -= 1
            fault = None
        if fault is not None:
            fault.times -= 1
            if not fault.done_first:
                return self._fail(fault)
        try:
            status, content, headers = self._route(parts.path, parse_qs(parts.query), body)
        except Refused as error:
            status, content, headers = error.status, {"error": str(error)}, error.headers
        if fault is not None:
            return self._fail(fault)
        self._send(status, content, headers)

    def _fail(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._send(fault.status, {"error": f"injected {fault.status}"}, {})

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, action in ROUTES:
            if method in (self.command, {"HEAD": "GET"}.get(self.command)) and (found := re.fullmatch(pattern, path)):
                groups = [unquote(one) if one is not None else None for one in found.groups()]
                return getattr(self, action)(*groups, query=query, body=body)
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writer(self) -> None:
        if not self._authorised():
            raise Refused(401, "Invalid credentials in Authorization header", "")
        if not self.server.writable:
            raise Refused(403, "You don't have the rights to create a model under this namespace")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._authorised()):
            raise Refused(404 if self._authorised() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str | None) -> str:
        found = repo.branches.get(revision or "main") or (revision if revision in repo.commits else None)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create(self, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self._writer()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo")
        self.server.add_repo(name, private=asked.get("private") or asked.get("visibility") == "private")
        return 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name}, {}

    def info(self, name: str, revision: str | None, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name)
        commit = self._commit_of(repo, revision)
        siblings = []
        for path, data in repo.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in query:
                sibling |= {"size": len(data), "blobId": oid(data)}
                if path.endswith(LARGE):
                    digest = hashlib.sha256(data).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        found = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
        return 200, found, {}

    def branch(self, name: str, branch: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self._writer()
        repo = self._repo(name)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = self._commit_of(repo, json.loads(body or b"{}").get("startingPoint"))
        return 200, {}, {}

    def validate(self, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(found.group(1)) if found else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        if not isinstance(metadata, dict):
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, name: str, revision: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self._writer()
        repo = self._repo(name)
        there = repo.commits[self._commit_of(repo, revision)]
        files = []
        for one in json.loads(body)["files"]:
            large = one["path"].endswith(LARGE)
            data = there.get(one["path"])
            known = None if data is None else hashlib.sha256(data).hexdigest() if large else oid(data)
            mode = "lfs" if large else "regular"
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return 200, {"files": files}, {}

    def batch(self, name: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self._writer()
        self._repo(name)
        objects = []
        for one in json.loads(body)["objects"]:
            found = dict(one)
            if one["oid"] not in self.server.large:
                verify = {"href": f"{self.server.url}/verify"}
                found["actions"] = {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}, "verify": verify}
            objects.append(found)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, digest: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != digest:
            raise Refused(400, "the hash does not fit")
        self.server.large[digest] = body
        return 200, {}, {}

    def verify(self, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if json.loads(body)["oid"] not in self.server.large:
            raise Refused(404, "not uploaded")
        return 200, {}, {}

    def commit(self, name: str, revision: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self._writer()
        repo = self._repo(name)
        parent = self._commit_of(repo, revision)
        files = dict(repo.commits[parent])
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header" and value.get("parentCommit") not in (None, parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refused(400, f"LFS file {value['path']} was not uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        new = repo.commit(files)
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/{name}/commit/{new}"}
        if "create_pr" in query:
            number = str(len(repo.pulls) + 1)
            repo.pulls[number] = repo.branches[f"refs/pr/{number}"] = new
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        else:
            repo.branches[revision] = new
        return 200, answer, {}

    def tree(self, name: str, revision: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name)
        files = repo.commits[self._commit_of(repo, revision)]
        rows = [{"type": "file", "path": path, "size": len(data), "oid": oid(data)} for path, data in files.items()]
        return 200, rows, {}

    def resolve(self, name: str, revision: str, path: str, query: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name)
        commit = self._commit_of(repo, revision)
        data = repo.commits[commit].get(path)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        digest = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else oid(data)
        return 200, data, {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", "commit"),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", "tree"),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", "info"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(\w+)", "upload"),
    ("POST", "/verify", "verify"),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
