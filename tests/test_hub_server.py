"""The Hub of `hub_server` does what the real one does, as far as other tests rely on it; the real client is used."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import hub as hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import hf_api

REPO = "me/x"
FILES = {"config.json": b"{}", "sub/deep/vocab.txt": b"a\nb\n", "model.safetensors": bytes(range(256)) * 400}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def pushed(hub, folder) -> HfApi:
    """The folder is on the Hub, and the log begins after that."""
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.log.clear()
    return api


@contextmanager
def refused(status: int, kind: type = HfHubHTTPError):
    with pytest.raises(kind) as error:
        yield
    assert error.value.response.status_code == status


def put(api: HfApi, content: bytes = b"1", name: str = "new", **options) -> str:
    return api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=name, **options).oid


def fetched(name: str = "model.safetensors", **options) -> bytes:
    return Path(hf_hub_download(REPO, name, **options)).read_bytes()


def test_a_folder_comes_back_equal_and_a_second_push_changes_nothing(hub, pushed, folder):
    snapshot = Path(snapshot_download(REPO))
    found = {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    assert found == hub.files(REPO)
    assert found.items() > FILES.items()
    before = hub.commits(REPO)
    pushed.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.commits(REPO) == before
    assert not hub.requests("PUT")
    pushed.create_repo(REPO, exist_ok=True)
    with refused(409):
        pushed.create_repo(REPO)


def test_revisions_are_apart(hub, pushed):
    first = hub.commits(REPO)[0].oid
    pushed.create_branch(REPO, branch="a", revision=first)
    second = put(pushed, b"[]", "config.json", revision="a", parent_commit=first)
    with refused(412):
        put(pushed, b"[1]", "config.json", revision="a", parent_commit=first)
    contents = [fetched("config.json", revision=revision) for revision in ("main", first, "a", second)]
    assert contents == [b"{}", b"{}", b"[]", b"[]"]
    for name, revision, kind in (("config.json", "absent", RevisionNotFoundError), ("no", "a", EntryNotFoundError)):
        with refused(404, kind):
            fetched(name, revision=revision)


def test_private_repositories_and_writing_need_rights(hub, pushed):
    hub.repos[REPO].private = True
    assert fetched("config.json", token="hf_me") == b"{}"
    for token, status in ((False, 401), ("hf_you", 404)):
        with refused(status, RepositoryNotFoundError):
            fetched("model.safetensors", token=token)
    hub.repos[REPO].private = False
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_you", 403)):
        with refused(status):
            put(pushed, token=token)


def test_faults_reach_the_client(hub, pushed):
    """It takes wrong bytes of the right length, which is the reason for our own check of checksums."""
    rule = hub.misbehave(kind="status", path="/preupload/", status=503)
    put(pushed)
    assert (rule.hits, hub.waits, hub.files(REPO)["new"]) == (1, [1], b"1")
    hub.misbehave(kind="wrong_bytes", method="GET", path="/resolve/")
    assert fetched() == FILES["model.safetensors"][::-1]


def test_the_client_is_as_before_afterwards():
    assert constants.HF_HUB_OFFLINE
    assert "127.0.0.1" not in constants.ENDPOINT + HfApi().endpoint + hf_api().endpoint
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info(REPO)
