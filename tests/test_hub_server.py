"""The Hub of `hub_server` does what the real one does, where a wrong server would hide faults of ours."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import hub as hub
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from transformers.utils.hub import hf_api

REPO = "me/x"


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi()
    api.create_repo(REPO)
    put(api, b"{}")
    return api


@contextmanager
def refused(status: int, kind: type = hub_errors.HfHubHTTPError):
    with pytest.raises(kind) as error:
        yield
    assert error.value.response.status_code == status


def put(api: HfApi, content: bytes = b"1", **options) -> str:
    return api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo="file", **options).oid


def fetched(name: str = "file", **options) -> bytes:
    return Path(hf_hub_download(REPO, name, **options)).read_bytes()


def test_revisions_are_apart(hub, api):
    first = hub.commits(REPO)[0].oid
    api.create_branch(REPO, branch="a", revision=first)
    second = put(api, b"[]", revision="a", parent_commit=first)
    with refused(412):
        put(api, b"[1]", revision="a", parent_commit=first)
    assert [fetched(revision=name) for name in ("main", first, "a", second)] == [b"{}", b"{}", b"[]", b"[]"]
    for name, revision, kind in (("file", "b", "RevisionNotFoundError"), ("no", "a", "EntryNotFoundError")):
        with refused(404, getattr(hub_errors, kind)):
            fetched(name, revision=revision)


def test_private_repositories_and_writing_need_rights(hub, api):
    with refused(409):
        api.create_repo(REPO)
    hub.repos[REPO].private = True
    for token, status in ((False, 401), ("hf_you", 404)):
        with refused(status, hub_errors.RepositoryNotFoundError):
            fetched(token=token)
    assert fetched(token="hf_me") == b"{}"
    hub.repos[REPO].private = False
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_you", 403)):
        with refused(status):
            put(api, token=token)


def test_the_client_takes_wrong_bytes(hub, api):
    """Wrong bytes of the right length are the reason for our own check of checksums."""
    hub.misbehave(kind="wrong_bytes", method="GET", path="/resolve/")
    assert fetched() == bytes(255 - byte for byte in b"{}")


def test_the_client_is_as_before_afterwards():
    assert constants.HF_HUB_OFFLINE
    assert "127.0.0.1" not in constants.ENDPOINT + HfApi().endpoint + hf_api().endpoint
    with pytest.raises(hub_errors.OfflineModeIsEnabled):
        HfApi().model_info(REPO)
