"""What the Hub of `hub_server` does, seen through the real client; and what that client does when it misbehaves."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import fresh
from httpx2 import RemoteProtocolError, TimeoutException
from hub_server import hub as hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils.hub import hf_api

REPO = "me/x"
WEIGHTS = save({"weight": torch.arange(30_000, dtype=torch.float32)})
CARD = b"---\ntags: [small]\nlibrary_name: nemo_hf\n---\n# X\n"
FILES = {"README.md": CARD, "config.json": b"{}", "sub/deep/vocab.txt": b"a\nb\n", "model.safetensors": WEIGHTS}


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi()
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def pushed(hub, api, folder) -> HfApi:
    """The folder is on the Hub, and the log begins after that."""
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.log.clear()
    return api


@contextmanager
def refused(status: int, kind: type = HfHubHTTPError):
    with pytest.raises(kind) as error:
        yield error
    assert error.value.response.status_code == status


def put(api: HfApi, content: bytes = b"1", name: str = "new", **options) -> str:
    return api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=name, **options).oid


def fetched(name: str = "model.safetensors", **options) -> bytes:
    return Path(hf_hub_download(REPO, name, **options)).read_bytes()


def cached() -> list[bytes]:
    """The contents of everything that the cache keeps as a file of a repository, finished or not."""
    files = Path(constants.HF_HUB_CACHE).glob("models--*/[bs]*/**/*")
    return [path.read_bytes() for path in files if path.is_file()]


def test_repository_is_created_once(hub, api):
    for private in (False, True):
        name = f"me/{private}"
        assert api.create_repo(name, private=private).repo_id == name
        assert api.create_repo(name, private=private, exist_ok=True).url == f"{hub.endpoint}/{name}"
        with refused(409):
            api.create_repo(name)
        assert api.model_info(name).private is private
    assert api.create_repo("named").repo_id == "me/named"
    assert [commit.title for commit in hub.commits(REPO)] == ["initial commit"]


def test_repository_of_another_is_not_created(hub, api):
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_me", 403)):
        with refused(status):
            api.create_repo("you/x", token=token)
    assert list(hub.repos) == [REPO]


def test_folder_comes_back_equal(hub, pushed):
    assert {name: content for name, content in hub.files(REPO).items() if name in FILES} == FILES
    for name, content in FILES.items():
        assert fetched(name) == content
    snapshot = Path(snapshot_download(REPO))
    found = {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    assert found == hub.files(REPO)
    assert pushed.verify_repo_checksums(REPO).mismatches == []


def test_more_than_ten_megabytes_are_large_whatever_the_name(hub, api):
    content = bytes(range(256)) * (11 * 2**12)
    put(api, content, "table.dat")
    assert [line.received for line in hub.requests("PUT")] == [len(content)]
    assert fetched("table.dat") == content


def test_second_push_changes_nothing(hub, pushed, folder):
    before = hub.commits(REPO)
    assert pushed.upload_folder(repo_id=REPO, folder_path=folder).oid == before[0].oid
    assert hub.commits(REPO) == before
    assert [line.path for line in hub.log if line.method == "PUT" or "/commit/" in line.path] == []
    assert sum(line.received for line in hub.log) < 3000
    (folder / "config.json").write_text('{"a": 1}')
    pushed.upload_folder(repo_id=REPO, folder_path=folder)
    after = hub.commits(REPO)
    assert after[1:] == before
    assert not hub.requests("PUT")
    assert [name for name in FILES if after[0].tree[name] is not before[0].tree[name]] == ["config.json"]


def test_commit_ids_depend_on_contents(hub, pushed, folder):
    for name in ("me/y", "me/z"):
        pushed.create_repo(name)
        pushed.upload_folder(repo_id=name, folder_path=folder)
        (folder / "config.json").write_text("[]")
    same, also, other = (hub.commits(name)[0].oid for name in (REPO, "me/y", "me/z"))
    assert same == also != other
    assert re.fullmatch("[0-9a-f]{40}", other)


def test_branches_and_revisions(hub, pushed):
    first = hub.commits(REPO)[0].oid
    pushed.create_branch(REPO, branch="a/b", revision=first)
    pushed.create_branch(REPO, branch="a/b", exist_ok=True)
    with refused(409):
        pushed.create_branch(REPO, branch="a/b")
    second = put(pushed, b"[]", "config.json", revision="a/b", parent_commit=first)
    with refused(412):
        put(pushed, b"[1]", "config.json", revision="a/b", parent_commit=first)
    with refused(404, RevisionNotFoundError):
        put(pushed, revision="absent")
    contents = [fetched("config.json", revision=revision) for revision in ("main", first, "a/b", second)]
    assert contents == [b"{}", b"{}", b"[]", b"[]"]
    assert {name: commit.oid for name, commit in hub.repos[REPO].branches.items()} == {"main": first, "a/b": second}


def test_private_repository(hub, pushed):
    hub.repos[REPO].private = True
    hub.add_user("you", "hf_you")
    assert fetched("config.json", token="hf_me") == b"{}"
    for token, status in ((False, 401), ("hf_you", 404)):
        with refused(status, RepositoryNotFoundError):
            fetched("README.md", token=token)
    with refused(401) as error:
        fetched("README.md", token="hf_wrong")
    assert not isinstance(error.value, RepositoryNotFoundError)
    assert CARD not in cached()


def test_writing_needs_rights(hub, pushed):
    hub.add_user("you", "hf_you")
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_you", 403)):
        with refused(status):
            put(pushed, token=token)
    assert len(hub.commits(REPO)) == 2


def test_what_is_missing_is_told_apart(hub, pushed):
    with refused(404, EntryNotFoundError):
        fetched("absent")
    with refused(404, EntryNotFoundError):
        list(pushed.list_repo_tree(REPO, "absent"))
    with refused(404, RevisionNotFoundError):
        fetched("config.json", revision="absent")
    for token, status in ((False, 401), ("hf_me", 404)):
        with refused(status, RepositoryNotFoundError):
            hf_hub_download("me/absent", "config.json", token=token)


def test_ranges(hub, pushed):
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    for asked, part in (("5-9", slice(5, 10)), ("100-", slice(100, None)), ("-7", slice(-7, None))):
        response = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.content) == (206, WEIGHTS[part])
        assert (hub.log[-1].range, hub.log[-1].sent) == (f"bytes={asked}", len(WEIGHTS[part]))
    whole = get_session().get(url)
    assert (whole.status_code, whole.content, whole.headers["Accept-Ranges"]) == (200, WEIGHTS, "bytes")
    beyond = get_session().get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")


def test_log_holds_no_token(hub, pushed):
    fetched("config.json")
    fetched("README.md", token=False)
    head, got, *anonymous = hub.log
    assert (head.method, head.status, head.sent) == ("HEAD", 200, 0)
    assert (got.method, got.path, got.status, got.sent) == ("GET", f"/{REPO}/resolve/main/config.json", 200, 2)
    assert [line.authorized for line in (head, got, *anonymous)] == [True, True, False, False]
    assert "hf_me" not in repr(hub.log)
    fetched("config.json")
    assert [line.method for line in hub.log[4:]] == ["HEAD"]  # the cache has the rest


@pytest.mark.parametrize(("status", "wait"), [(500, 1), (503, 1), (429, 8)])
def test_push_is_tried_again_when_the_hub_is_busy(hub, pushed, status, wait):
    hub.misbehave(kind="status", path="/preupload/", status=status, retry_after=7 if status == 429 else None)
    put(pushed)
    assert [line.status for line in hub.requests(path="/preupload/")] == [status, 200]
    assert (hub.waits, hub.files(REPO)["new"]) == ([wait], b"1")


def test_client_gives_up_after_six_tries(hub, pushed):
    rule = hub.misbehave(kind="status", path="/preupload/", status=503, times=None)
    with refused(503):
        put(pushed)
    assert (rule.hits, hub.waits) == (6, [1, 2, 4, 8, 8])
    hub.rules.remove(rule)
    put(pushed)
    assert hub.files(REPO)["new"] == b"1"


def test_client_tries_a_file_again_only_when_it_asked_too_often(hub, pushed):
    for status in (500, 503, 401):
        hub.misbehave(kind="status", method="GET", path="/resolve/", status=status)
        with refused(status):
            fetched()
    assert WEIGHTS not in cached()
    hub.misbehave(kind="status", method="GET", path="/resolve/", status=429, retry_after=3)
    assert (fetched(), hub.waits) == (WEIGHTS, [4])
    assert [line.status for line in hub.requests("GET", "/resolve/")] == [500, 503, 401, 429, 200]


def test_client_asks_for_the_head_of_a_file_seven_times(hub, pushed):
    rule = hub.misbehave(kind="status", method="HEAD", status=503, times=2)
    assert (fetched("config.json"), rule.hits) == (b"{}", 2)
    rule = hub.misbehave(kind="status", method="HEAD", status=503, times=None)
    with pytest.raises(LocalEntryNotFoundError):
        fetched("README.md")
    assert (rule.hits, CARD in cached()) == (7, False)
    assert fetched("config.json") == b"{}"  # from the cache, to which a dropped connection does not lead the client:
    hub.rules = []
    hub.misbehave(kind="die_after", method="HEAD")
    with pytest.raises(RemoteProtocolError):
        fetched("config.json")


def test_cut_download_is_continued(hub, pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # only whole chunks are kept
    hub.misbehave(kind="cut", method="GET", path="/resolve/", at=2500)
    assert fetched() == WEIGHTS
    seen = [(line.range, line.status, line.sent) for line in hub.requests("GET")]
    assert seen == [(None, 200, 2500), ("bytes=2000-", 206, len(WEIGHTS) - 2000)]


def test_ignored_range_does_no_harm(hub, pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.misbehave(kind="cut", method="GET", path="/resolve/")
    hub.misbehave(kind="ignore_range", path="/resolve/")
    assert fetched() == WEIGHTS
    seen = [(line.range, line.status, line.sent) for line in hub.requests("GET")]
    assert seen == [(None, 200, len(WEIGHTS) // 2), ("bytes=60000-", 200, len(WEIGHTS))]


def test_download_that_is_always_cut_leaves_no_file(hub, pushed):
    rule = hub.misbehave(kind="cut", method="GET", path="/resolve/", times=None)
    with pytest.raises(RemoteProtocolError):
        fetched()
    assert (rule.hits, hub.waits) == (6, [1] * 5)
    with pytest.raises(RemoteProtocolError):
        snapshot_download(REPO)
    assert cached() == []


def test_client_takes_wrong_bytes_of_the_right_length(hub, pushed):
    """Known behaviour: downloads are not compared with their checksums, unless one asks for that afterwards."""
    hub.misbehave(kind="wrong_bytes", method="GET", path="model.safetensors")
    wrong = fetched()
    assert wrong == bytes(255 - byte for byte in WEIGHTS)
    assert fetched() == wrong
    assert [found["path"] for found in pushed.verify_repo_checksums(REPO).mismatches] == ["model.safetensors"]
    assert fetched(force_download=True) == WEIGHTS


def test_slow_answers_arrive(hub, pushed):
    rule = hub.misbehave(kind="slow", seconds=0.3, times=2)
    with pytest.raises(TimeoutException):
        get_session().get(f"{hub.endpoint}/api/models/{REPO}", timeout=0.1)
    assert pushed.model_info(REPO).id == REPO
    assert rule.hits == 2


def test_push_that_dies_half_way_is_finished_by_the_next(hub, api, folder):
    second = save({"other": torch.zeros(9000)})
    (folder / "second.safetensors").write_bytes(second)
    rule = hub.misbehave(kind="die_after", method="PUT", after=1, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert (rule.hits, len(hub.commits(REPO))) == (6, 1)
    assert sorted(line.status for line in hub.requests("PUT")) == [0] * 6 + [200]
    (kept,) = hub.repos[REPO].large.values()
    hub.rules.clear()
    hub.log.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    (missing,) = {WEIGHTS, second} - {kept}
    assert [line.received for line in hub.requests("PUT")] == [len(missing)]
    assert hub.files(REPO).items() > {**FILES, "second.safetensors": second}.items()


def test_client_does_not_try_a_commit_again(hub, pushed):
    hub.misbehave(kind="die_after", path="/commit/")
    hub.misbehave(kind="cut", path="/commit/")
    for commits in (2, 3):  # the second is made, but its answer is lost
        with pytest.raises(RemoteProtocolError):
            put(pushed)
        assert len(hub.commits(REPO)) == commits
    put(pushed)
    assert (len(hub.requests(path="/commit/")), len(hub.commits(REPO))) == (2, 3)


def test_wrong_large_content_is_refused(hub, pushed):
    oid = "0" * 64
    url = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    asked = {"operation": "upload", "objects": [{"oid": oid, "size": 3}]}
    (known,) = get_session().post(url, json=asked, headers=build_hf_headers()).json()["objects"]
    for content in (b"abc", b"abcd"):
        assert get_session().put(known["actions"]["upload"]["href"], content=content).status_code == 400
    assert oid not in hub.repos[REPO].large


def test_transformers_push_and_load(hub, tmp_path):
    model = fresh("bert")
    model.push_to_hub(REPO)
    assert AutoConfig.from_pretrained(REPO).id2label == model.config.id2label
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    commits = hub.commits(REPO)
    model.push_to_hub(REPO)
    assert hub.commits(REPO) == commits
    hub.repos[REPO].private = True
    for name, options in ((REPO, {"token": False, "cache_dir": tmp_path}), ("me/absent", {})):
        with pytest.raises(OSError, match="not a valid model identifier"):
            AutoConfig.from_pretrained(name, **options)


def test_unknown_kinds_are_refused(hub):
    with pytest.raises(ValueError, match="slwo"):
        hub.misbehave(kind="slwo")
    assert hub.rules == []


def test_client_is_as_before_afterwards():
    assert constants.HF_HUB_OFFLINE
    assert "127.0.0.1" not in constants.ENDPOINT + HfApi().endpoint + hf_api().endpoint
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info(REPO)
