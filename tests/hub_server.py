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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml  # comes with huggingface_hub
from huggingface_hub import HfFileSystem, constants, file_download, hf_api
from huggingface_hub.utils import _cache_manager, _http, close_session
from transformers.utils import hub as transformers_hub

DATE = "2025-01-01T00:00:00.000Z"  # one date for all, so that commit ids depend on contents alone
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npz", ".pkl", ".h5", ".ckpt", ".msgpack", ".zip")
LARGE_SIZE = 10 * 2**20
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()
INVERTED = bytes(range(255, -1, -1))
GROUPS = {"repo": r"[\w.-]+(?:/[\w.-]+)?", "rev": "[^/]+", "branch": "[^/]+", "path": ".+", "slug": r"[\w.-]+/[\w.-]+"}
KINDS = ("status", "cut", "wrong_bytes", "ignore_range", "slow", "die_after")
ROUTES: list[tuple[str, re.Pattern, bool, Callable]] = []


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool = False  # kept by Git LFS

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        content = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        return {**entry, "lfs": lfs} if self.large else entry


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    author: str
    tree: dict[str, Blob]
    parent: "Commit | None" = None

    @cached_property
    def oid(self) -> str:
        files = sorted((path, blob.oid) for path, blob in self.tree.items())
        parent = self.parent.oid if self.parent else None
        return hashlib.sha1(json.dumps([parent, self.title, self.message, self.author, files]).encode()).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: str | bool = False  # with "manual", files are for the owner and for the users of `granted`
    granted: set[str] = field(default_factory=set)
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    announced: dict[str, int] = field(default_factory=dict)  # sizes of the LFS objects that may be put

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def add(self, branch: str, commit: Commit) -> Commit:
        self.branches[branch] = self.commits[commit.oid] = commit
        return commit

    def find(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


@dataclass
class Request:
    """A line of the log, too: bytes are those of bodies, and a dropped request has the status 0."""

    method: str
    path: str
    query: dict[str, str]
    range: str | None
    authorized: bool  # whether a token came along, valid or not
    received: int
    status: int = 0
    sent: int = 0
    user: tuple[str, ...] = ()  # the name, then organisations
    body: bytes = field(default=b"", repr=False)  # until it is answered

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **extra):
        super().__init__(message)
        about = {"X-Error-Message": message, "X-Error-Code": code}
        known = {name: value for name, value in about.items() if value}
        self.answer = answer({"error": message, **extra}, status, known | (headers or {}))


@dataclass(kw_only=True)
class Rule:
    """Misbehaves at the requests it matches: not at the first `after`, then `times` times (None: always)."""

    kind: str  # one of KINDS
    method: str | None = None
    path: str = ""  # searched for as a regular expression
    times: int | None = 1
    after: int = 0
    status: int = 500
    retry_after: int | None = None
    seconds: float = 0.05
    at: int | None = None  # how many bytes are sent before the cut: half of them by default
    seen: int = 0
    hits: int = 0

    def fires(self, request: Request) -> bool:
        if self.method not in (None, request.method) or not re.search(self.path, request.path):
            return False
        if self.kind == "ignore_range" and request.range is None:
            return False
        self.seen += 1
        if self.seen <= self.after or self.hits == self.times:
            return False
        self.hits += 1
        return True


def answer(content: dict | list, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def route(method: str, pattern: str, writes: bool | None = None) -> Callable:
    """Registers a method of the server; the groups of the path become its arguments."""
    for name, expression in GROUPS.items():
        pattern = pattern.replace(f"<{name}>", f"(?P<{name}>{expression})")

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), method != "GET" if writes is None else writes, function))
        return function

    return register


def identifier(*parts: str) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()[:24]


def metadata(card: bytes) -> dict:
    match = re.match(r"---[ \t]*\n(.*?)\n---", card.decode(), re.DOTALL)
    return (yaml.safe_load(match[1]) if match else None) or {}


def part_of(data: bytes, asked: str | None) -> Answer:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not match or match[0] == "bytes=-":
        return Answer(data)
    size = len(data)
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    stop = min(int(match[2]) + 1, size) if match[1] and match[2] else size
    if start >= stop:
        return answer({"error": "Range not satisfiable"}, 416, {"Content-Range": f"bytes */{size}"})
    return Answer(data[start:stop], 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def entries_of(tree: dict[str, Blob], inside: str = "", recursive: bool = True) -> dict[str, dict]:
    """The files and folders below a folder, as the API shows them."""
    entries = {}
    prefix = f"{inside}/" if inside else ""
    for path in sorted(path for path in tree if path.startswith(prefix)):
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": identifier(folder), "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = tree[path].entry(path)
    return entries


class HubServer(ThreadingHTTPServer):
    """Keeps all in memory. Tests may read and change `repos`, `rules`, `log` and `waits` (the client's sleeps)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.users: dict[str, tuple[str, ...]] = {}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.rules: list[Rule] = []
        self.log: list[Request] = []
        self.waits: list[float] = []
        self.failures: list[BaseException | None] = []
        self.page_size = 1000
        self.lock = threading.Lock()

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave as they like
            self.failures.append(sys.exception())

    # For tests

    def add_user(self, name: str, token: str, *organisations: str) -> None:
        self.users[token] = (name, *organisations)

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
        rule = Rule(**how)
        if rule.kind not in KINDS:
            raise ValueError(f"unknown kind {rule.kind!r}, not one of {KINDS}")
        self.rules.append(rule)
        return rule

    def requests(self, method: str | None = None, path: str = "") -> list[Request]:
        return [line for line in self.log if method in (None, line.method) and re.search(path, line.path)]

    # What every request goes through

    def handle(self, request: Request, raw_path: str, token: str | None) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        try:
            with self.lock:
                if token is not None and token not in self.users:
                    raise RefusedError(401, "Invalid credentials in Authorization header")
                request.user = self.users.get(token, ())
                for known, pattern, writes, function in ROUTES:
                    if known == method and (match := pattern.fullmatch(raw_path)):
                        groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                        return function(self, request, **self.found(request, groups, writes))
                raise RefusedError(404, f"This Hub has no {method} {request.path}")
        except RefusedError as refused:
            return refused.answer
        except Exception as error:
            self.failures.append(error)
            return answer({"error": repr(error)}, 500)

    def found(self, request: Request, groups: dict, writes: bool) -> dict:
        """The repository, commit or collection instead of its name."""
        if writes and not request.user:
            raise RefusedError(401, "Invalid username or password.")
        if "repo" in groups:
            groups["repo"] = self.repo(request, groups["repo"])
            if writes and groups["repo"].owner not in request.user:
                raise RefusedError(403, "You don't have the rights to write to this repository")
        if "rev" in groups:
            groups["commit"] = groups["repo"].find(groups.pop("rev") or "main")
        if "slug" in groups:
            groups["collection"] = found = self.collections.get(groups.pop("slug"))
            if found is None or (found["private"] and found["owner"] not in request.user):
                raise RefusedError(404, "Collection not found")
            if writes and found["owner"] not in request.user:
                raise RefusedError(403, "You don't have the rights to write to this collection")
        return groups

    def repo(self, request: Request, name: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and repo.owner not in request.user):
            # Strangers cannot tell a private repository from a missing one.
            raise RefusedError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    # Users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if not request.user:
            raise RefusedError(401, "Invalid username or password.")
        name, *organisations = request.user
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in organisations]
        return answer({"type": "user", "name": name, "fullname": name, "orgs": orgs, "auth": token})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        asked = request.json()
        owner = asked.get("organization") or request.user[0]
        if asked.get("type") not in (None, "model"):
            raise RefusedError(400, "This Hub keeps models only")
        if owner not in request.user:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.repos[name] = repo = Repo(name, private=asked.get("visibility") == "private")
        repo.add("main", Commit("initial commit", "", request.user[0], {".gitattributes": Blob(ATTRIBUTES)}))
        return answer({"url": url, "name": name})

    @route("POST", "/api/validate-yaml", writes=False)
    def validate_yaml(self, request: Request) -> Answer:
        try:
            known = metadata(request.json()["content"].encode())
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = [{"message": "empty or missing yaml metadata in repo card"}]
        return answer({"errors": [], "warnings": [] if known else missing})

    @route("GET", "/api/models/<repo>(?:/revision/<rev>)?")
    def model_info(self, request: Request, repo: Repo, commit: Commit) -> Answer:
        try:
            card = metadata(commit.tree["README.md"].data) if "README.md" in commit.tree else {}
        except yaml.YAMLError:
            card = {}
        siblings = []
        for path, blob in sorted(commit.tree.items()):
            known = blob.entry(path)
            sibling = {"rfilename": path, "size": known["size"], "blobId": known["oid"]}
            if blob.large:
                sibling["lfs"] = {**known["lfs"], "sha256": blob.sha256}
            siblings.append(sibling if request.query.get("blobs") == "true" else {"rfilename": path})
        about = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.oid, "lastModified": DATE}
        about |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
        about |= {"siblings": siblings, "cardData": card, "tags": list(card.get("tags") or [])}
        return answer(about | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})

    @route("GET", "/api/models/<repo>/refs")
    def refs(self, request: Request, repo: Repo) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
            for name, commit in repo.branches.items()
        ]
        return answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    @route("POST", "/api/models/<repo>/branch/<branch>")
    def create_branch(self, request: Request, repo: Repo, branch: str) -> Answer:
        if branch in repo.branches:
            raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.find(request.json().get("startingPoint") or "main")
        return answer({})

    # Reading files

    @route("GET", "/api/models/<repo>/tree/<rev>(?:/<path>)?")
    def tree(self, request: Request, repo: Repo, commit: Commit, path: str | None) -> Answer:
        entries = list(entries_of(commit.tree, path or "", request.query.get("recursive") == "true").values())
        if path and not entries:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        start = int(request.query.get("cursor", 0))
        stop = start + self.page_size
        following = f"{self.endpoint}{quote(request.path)}?{urlencode({**request.query, 'cursor': stop})}"
        headers = {"Link": f'<{following}>; rel="next"'} if stop < len(entries) else {}
        return answer(entries[start:stop], headers=headers)

    @route("POST", "/api/models/<repo>/paths-info/<rev>", writes=False)
    def paths_info(self, request: Request, repo: Repo, commit: Commit) -> Answer:
        entries = entries_of(commit.tree)
        paths = parse_qs(request.body.decode()).get("paths", [])
        return answer([entries[path.strip("/")] for path in paths if path.strip("/") in entries])

    @route("GET", "/<repo>/resolve/<rev>/<path>")
    def resolve(self, request: Request, repo: Repo, commit: Commit, path: str) -> Answer:
        if repo.gated and not repo.granted.union([repo.owner]).intersection(request.user):
            raise RefusedError(403 if request.user else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.tree[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        part = part_of(blob.data, request.range)
        part.headers = headers | part.headers
        return part

    # Writing files

    @route("POST", "/api/models/<repo>/preupload/<rev>")
    def preupload(self, request: Request, repo: Repo, commit: Commit) -> Answer:
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE_SUFFIXES) or file["size"] > LARGE_SIZE else "regular"
            oid = commit.tree[path].etag if path in commit.tree else None  # tells the client what is unchanged
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": files})

    @route("POST", r"/<repo>\.git/info/lfs/objects/batch")
    def announce_large(self, request: Request, repo: Repo) -> Answer:
        objects = []
        for file in request.json()["objects"]:
            known = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in repo.large:
                repo.announced[file["oid"]] = file["size"]
                known["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{repo.id}/{file['oid']}"}}
            objects.append(known)
        return answer({"transfer": "basic", "objects": objects})

    # No token comes along: on the Hub this is a signed address of the storage behind it.
    @route("PUT", "/lfs/(?P<name>.+)/(?P<oid>[0-9a-f]{64})", writes=False)
    def put_large(self, request: Request, name: str, oid: str) -> Answer:
        size = self.repos[name].announced.get(oid) if name in self.repos else None
        if size != len(request.body) or hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusedError(400, "The content is not what was announced")
        self.repos[name].large[oid] = request.body
        return answer({})

    @route("POST", "/api/models/<repo>/commit/<branch>")
    def commit(self, request: Request, repo: Repo, branch: str) -> Answer:
        if "create_pr" in request.query:
            raise RefusedError(400, "This Hub has no pull requests")
        if branch not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.branches[branch]
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if not head.oid.startswith(header["value"].get("parentCommit", "")):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            self.apply(repo, tree, operation["key"], operation["value"])
        title, message = header["value"]["summary"], header["value"].get("description", "")
        commit = repo.add(branch, Commit(title, message, request.user[0], tree, head))
        url = f"{self.endpoint}/{repo.id}/commit/{commit.oid}"
        return answer({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def apply(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.large:
                raise RefusedError(400, f"The LFS object of {path} was not uploaded")
            tree[path] = Blob(repo.large[value["oid"]], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [old for old in tree if (old == path if key == "deletedFile" else old.startswith(folder))]
            if not gone:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for old in gone:
                del tree[old]
        else:
            raise RefusedError(400, f"Unknown operation {key!r}")

    # Collections

    @route("POST", "/api/collections")
    def create_collection(self, request: Request) -> Answer:
        asked = request.json()
        owner, title = asked["namespace"], asked["title"]
        if owner not in request.user:
            raise RefusedError(403, f"You don't have the rights to create a collection of {owner!r}")
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower())}-{identifier(owner, title)}"
        if slug in self.collections:
            raise RefusedError(409, "A collection of this title exists", slug=slug)
        about = {"slug": slug, "title": title, "owner": owner, "private": asked["private"], "items": []}
        about |= {"description": asked.get("description"), "lastUpdated": DATE, "theme": "green", "upvotes": 0}
        self.collections[slug] = about
        return answer({**about, "position": 0})

    @route("GET", "/api/collections")
    def list_collections(self, request: Request) -> Answer:
        owner, item = request.query.get("owner"), request.query.get("item")
        listed = []
        for found in self.collections.values():
            items = [f"{item['type']}s/{item['id']}" for item in found["items"]]
            hidden = found["private"] and found["owner"] not in request.user
            if not hidden and owner in (None, found["owner"]) and (item is None or item in items):
                listed.append({**found, "items": found["items"][:4]})  # the client counts positions itself
        return answer(listed)

    @route("GET", "/api/collections/<slug>")
    def get_collection(self, request: Request, collection: dict) -> Answer:
        return answer({**collection, "position": 0})

    @route("POST", "/api/collections/<slug>/items")
    def add_item(self, request: Request, collection: dict) -> Answer:
        asked, items = request.json(), collection["items"]
        item = asked["item"]
        if item["type"] == "model":
            self.repo(request, item["id"])
        if any((old["id"], old["type"]) == (item["id"], item["type"]) for old in items):
            raise RefusedError(409, "This item is already in the collection")
        note = {"note": {"text": asked["note"]}} if "note" in asked else {}
        items.append({**item, **note, "_id": identifier(item["type"], item["id"]), "position": len(items)})
        return answer({**collection, "position": 0})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart, and would wait for each other
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def respond(self) -> None:
        url, token = urlsplit(self.path), self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        asked = (self.command, unquote(url.path), query, self.headers.get("Range"), token is not None)
        request = Request(*asked, received=len(body), body=body)
        with self.server.lock:
            rule = next((rule for rule in self.server.rules if rule.fires(request)), Rule(kind="none"))
        if rule.kind == "die_after":
            reply, self.close_connection = None, True
        elif rule.kind == "status":
            waiting = {} if rule.retry_after is None else {"Retry-After": str(rule.retry_after)}
            reply = answer({"error": "misbehaving"}, rule.status, waiting)
        else:
            if rule.kind == "slow":
                time.sleep(rule.seconds)
            if rule.kind == "ignore_range":
                request.range = None
            reply = self.server.handle(request, url.path, token and token.removeprefix("Bearer "))
            request.range = self.headers.get("Range")
        self.send(request, reply, rule)

    def send(self, request: Request, reply: Answer | None, rule: Rule) -> None:
        sent = b"" if reply is None or self.command == "HEAD" else reply.body
        if rule.kind == "wrong_bytes":
            sent = sent.translate(INVERTED)
        if rule.kind == "cut":
            sent = sent[: len(sent) // 2 if rule.at is None else rule.at]
            self.close_connection = True
        request.body, request.status, request.sent = b"", reply.status if reply else 0, len(sent)
        self.server.log.append(request)  # before it is sent, as the client may look as soon as it has the answer
        if reply is None:
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond


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
    quick = SimpleNamespace(**{**vars(time), "sleep": server.waits.append})
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(file_download, "time", quick)
    # The same for processes that a test starts.
    flags = {name: str(int(value)) for name, value in flags.items()} | {"DISABLE_SAFETENSORS_CONVERSION": "1"}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for name, value in {**home, **flags, **proxies, "HF_ENDPOINT": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    for name in ("TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(request, tmp_path_factory, monkeypatch):
    """A Hub of its own for the test, with the client signed in as `me` and nothing in its cache."""
    # The client uploads LFS files in a way its HTTP library warns of, and warnings are errors here: once for fixtures
    # that come after this one, once for the test.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    request.node.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))
    server = HubServer()
    server.add_user("me", "hf_me")
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
