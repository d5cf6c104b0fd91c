"""A small Hugging Face Hub on loopback, for the real client to read and write.

A test module gets the fixture by `from hub_server import hub as hub`, with the alias to please the linter.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants, file_download, hf_api
from huggingface_hub.utils import _cache_manager, _http, close_session
from transformers.utils import hub as transformers_hub

DATE = "2025-01-01T00:00:00.000Z"  # one date for all, so that commit ids depend on contents alone
LARGE_SUFFIXES = (".safetensors", ".bin", ".onnx")
INVERTED = bytes(range(255, -1, -1))


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool = False  # kept by Git LFS

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    tree: dict[str, Blob]
    parent: "Commit | None" = None

    @cached_property
    def oid(self) -> str:
        files = sorted((path, blob.oid) for path, blob in self.tree.items())
        content = [self.parent and self.parent.oid, self.title, self.message, files]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, Commit]
    commits: dict[str, Commit]
    large: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def find(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


@dataclass
class Request:
    """A line of the log, too."""

    method: str
    path: str
    range: str | None
    user: str | None = None
    body: bytes = field(default=b"", repr=False)  # until it is answered

    def json(self) -> dict:
        return json.loads(self.body)

    def fits(self, method: str | None, path: str) -> bool:
        return method in (None, self.method) and bool(re.search(path, self.path))


class Answer(NamedTuple):
    body: bytes
    status: int
    headers: dict[str, str]


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: Mapping = {}, **extra):
        super().__init__(message)
        about = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.answer = answer({"error": message, **extra}, status, about)


def answer(content: dict | list, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass(kw_only=True)
class Rule:
    """Misbehaves at the first `times` requests that it matches (None: always)."""

    kind: str  # status, cut or wrong_bytes
    method: str | None = None
    path: str = ""  # searched for as a regular expression
    times: int | None = 1
    status: int = 500
    hits: int = 0

    def fires(self, request: Request) -> bool:
        is_firing = request.fits(self.method, self.path) and self.hits != self.times
        self.hits += is_firing
        return is_firing


class HubServer(ThreadingHTTPServer):
    """Keeps all in memory. Tests may read and change `repos`, `rules` and `log`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.users = {"hf_me": "me", "hf_you": "you"}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.rules: list[Rule] = []
        self.log: list[Request] = []
        self.failures: list[BaseException | None] = []
        self.lock = threading.Lock()

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave as they like
            self.failures.append(sys.exception())

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo].find(revision).tree.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The latest first, down to the one that creating the repository made."""
        commits = [self.repos[repo].find(revision)]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def misbehave(self, **how) -> Rule:
        """Adds a rule to `rules`, of which the first that fires decides."""
        self.rules.append(Rule(**how))
        return self.rules[-1]

    def requests(self, method: str | None = None, path: str = "") -> list[Request]:
        return [line for line in self.log if line.fits(method, path)]

    def handle(self, request: Request, parts: list[str], token: str | None) -> Answer:
        try:
            with self.lock:
                if token is not None and token not in self.users:
                    raise RefusedError(401, "Invalid credentials in Authorization header")
                request.user = self.users.get(token)
                return self.routed(request, "GET" if request.method == "HEAD" else request.method, parts)
        except RefusedError as refused:
            return refused.answer
        except Exception as error:
            self.failures.append(error)
            return answer({"error": repr(error)}, 500)

    def routed(self, request: Request, method: str, parts: list[str]) -> Answer:
        match [method, *parts]:
            case ["POST", "api", "validate-yaml"]:
                return answer({"errors": [], "warnings": []})
            case ["POST", "api", "repos", "create"]:
                return self.create_repo(request)
            case [_, "api", "collections", *slug]:
                return self.collected(request, method, slug)
            case ["PUT", "lfs", owner, name, oid]:  # without a token, as the Hub signs addresses of its storage
                if hashlib.sha256(request.body).hexdigest() != oid:
                    raise RefusedError(400, "The content is not what was announced")
                self.repos[f"{owner}/{name}"].large[oid] = request.body
                return answer({})
            case ["GET", "api", "models", owner, name, *rest]:
                return self.described(self.repo(request, f"{owner}/{name}"), rest)
            case ["GET", owner, name, "resolve", revision, *path]:
                return self.sent(request, self.repo(request, f"{owner}/{name}").find(revision), "/".join(path))
            case ["POST", "api", "models", owner, name, *rest] | ["POST", owner, name, *rest]:
                repo = self.repo(request, f"{owner}/{name.removesuffix('.git')}")
                self.check_writes(request, repo.owner)
                return self.written(request, repo, rest)
        raise RefusedError(404, f"This Hub has no {method} {request.path}")

    def repo(self, request: Request, name: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and repo.owner != request.user):
            # Strangers cannot tell a private repository from a missing one.
            raise RefusedError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def check_writes(self, request: Request, owner: str) -> None:
        if request.user != owner:
            raise RefusedError(403 if request.user else 401, f"You don't have the rights to write to {owner}'s")

    def create_repo(self, request: Request) -> Answer:
        asked = request.json()
        owner = asked.get("organization") or request.user
        self.check_writes(request, owner or "you")
        url = f"{self.endpoint}/{owner}/{asked['name']}"
        if f"{owner}/{asked['name']}" in self.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        first = Commit("initial commit", "", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        is_private = asked.get("visibility") == "private"
        repo = Repo(f"{owner}/{asked['name']}", is_private, {"main": first}, {first.oid: first})
        self.repos[repo.id] = repo
        return answer({"url": url, "name": repo.id})

    def described(self, repo: Repo, rest: list[str]) -> Answer:
        """About a repository, or the files of a folder without the folders in it."""
        commit = repo.find(rest[1] if rest else "main")
        if rest[:1] != ["tree"]:
            about = {"id": repo.id, "sha": commit.oid, "private": repo.private}
            return answer({**about, "siblings": [{"rfilename": path} for path in sorted(commit.tree)]})
        entries, folder = [], "".join(f"{part}/" for part in rest[2:])
        for path, blob in sorted(commit.tree.items()):
            lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}} if blob.large else {}
            if path.startswith(folder):
                entries.append({"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data), **lfs})
        if folder and not entries:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        return answer(entries)

    def sent(self, request: Request, commit: Commit, path: str) -> Answer:
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.tree[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        start = int(re.fullmatch(r"bytes=(\d+)-.*", request.range)[1]) if request.range else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(blob.data) - 1}/{len(blob.data)}"
        return Answer(blob.data[start:], 206 if start else 200, headers)

    def written(self, request: Request, repo: Repo, rest: list[str]) -> Answer:
        match rest:
            case ["branch", branch]:
                if branch in repo.branches:
                    raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
                repo.branches[branch] = repo.find(request.json().get("startingPoint") or "main")
                return answer({})
            case ["preupload", revision]:
                tree, files = repo.find(revision).tree, []
                for file in request.json()["files"]:
                    path, mode = file["path"], "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular"
                    # The checksum tells the client what is unchanged.
                    oid = tree[path].etag if path in tree else None
                    files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
                return answer({"files": files})
            case ["info", "lfs", "objects", "batch"]:
                objects = [{"oid": file["oid"], "size": file["size"]} for file in request.json()["objects"]]
                for known in objects:
                    if known["oid"] not in repo.large:
                        known["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{repo.id}/{known['oid']}"}}
                return answer({"transfer": "basic", "objects": objects})
            case ["commit", branch]:
                return self.commit(request, repo, branch)
        raise RefusedError(404, f"This Hub has no {request.path}")

    def commit(self, request: Request, repo: Repo, branch: str) -> Answer:
        head = repo.find(branch)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if not head.oid.startswith(header["value"].get("parentCommit", "")):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                tree[value["path"]] = Blob(repo.large[value["oid"]], large=True)
            else:
                del tree[value["path"]]
        commit = Commit(header["value"]["summary"], header["value"].get("description", ""), tree, head)
        repo.branches[branch] = repo.commits[commit.oid] = commit
        url = f"{self.endpoint}/{repo.id}/commit/{commit.oid}"
        return answer({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def collected(self, request: Request, method: str, slug: list[str]) -> Answer:
        if method == "POST" and not slug:
            asked = request.json()
            name = f"{asked['namespace']}/{re.sub('[^a-z0-9]+', '-', asked['title'].lower())}-{24 * '0'}"
            about = {"slug": name, "title": asked["title"], "owner": asked["namespace"], "private": asked["private"]}
            about |= {"description": None, "lastUpdated": DATE, "theme": "green", "upvotes": 0, "items": []}
            self.collections[name] = about
        elif not slug:  # as on the Hub: the first four items only
            return answer([{**each, "items": each["items"][:4]} for each in self.collections.values()])
        else:
            about = self.collections["/".join(slug[:2])]
        if slug[2:] == ["items"]:
            item, items = request.json()["item"], about["items"]
            if any(old["id"] == item["id"] for old in items):
                raise RefusedError(409, "This item is already in the collection")
            items.append({**item, "_id": f"{len(items):024}", "position": len(items)})
        return answer({**about, "position": 0})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart, and would wait for each other
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def respond(self) -> None:
        path, token = urlsplit(self.path).path, self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, unquote(path), self.headers.get("Range"), body=body)
        with self.server.lock:
            rule = next((rule for rule in self.server.rules if rule.fires(request)), Rule(kind="none"))
        if rule.kind == "status":
            reply = answer({"error": "misbehaving"}, rule.status)
        else:
            parts = [unquote(part) for part in path.strip("/").split("/")]
            reply = self.server.handle(request, parts, token and token.removeprefix("Bearer "))
        request.body = b""
        self.server.log.append(request)  # before it is answered, as the client may look as soon as it has the answer
        self.close_connection |= rule.kind == "cut"
        sent = reply.body.translate(INVERTED) if rule.kind == "wrong_bytes" else reply.body
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent[: len(sent) // 2] if rule.kind == "cut" else sent)

    do_GET = do_HEAD = do_POST = do_PUT = respond


def point_client(server: HubServer, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads its settings when it is imported, so they are replaced wherever they were copied to."""
    home = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN_PATH": str(cache / "token")}
    home |= {"HF_STORED_TOKENS_PATH": str(cache / "stored_tokens")}
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    endpoint = {"ENDPOINT": server.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    # With telemetry on, the first request of a process asks the Hub for something of its own.
    flags = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    for name, value in {**home, **endpoint, **flags}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", home["HF_HUB_CACHE"])
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(file_download, "time", quick)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(request, tmp_path_factory, monkeypatch):
    """A Hub of its own for the test, with the client signed in as `me` and nothing in its cache."""
    # The client uploads in a way its HTTP library warns of: ignored in later fixtures, and in the test.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    request.node.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))
    server = HubServer()
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    point_client(server, tmp_path_factory.mktemp("hub"), monkeypatch)
    close_session()  # it may know other proxies
    HfFileSystem.clear_instance_cache()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    close_session()
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()
    assert not server.failures
