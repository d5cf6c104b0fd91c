"""Modules cut on load from a repository: the same as cut locally, from files that come once and undamaged."""

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from conftest import fresh, generated, randomize_relevance
from hub_server import hub as hub
from huggingface_hub import HfApi, constants
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.files import check_content

REPO = "me/parent"
LABELS = ["frog", "cat"]
WEIGHTS = r"/resolve/.*\.safetensors$"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Directories `whole`, `sharded` and `other`, a parent with other weights, and `bert`."""
    root = tmp_path_factory.mktemp("saved")
    for name, family, seed, size in (
        ("whole", "vit", 0, "5GB"), ("sharded", "vit", 0, "30KB"),
        ("other", "vit", 1, "5GB"), ("bert", "bert", 0, "30KB"),
    ):  # fmt: skip
        torch.manual_seed(seed)
        parent = make_parent(fresh(family), generated()).eval()
        with torch.no_grad():
            next(iter(parent.model.parameters())).add_(seed)
        randomize_relevance(parent, seed)
        parent.report = {"metrics": {"seed": seed}}
        parent.save_pretrained(root / name, max_shard_size=size)
    return root


@pytest.fixture
def api(hub, saved) -> HfApi:
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=saved / "sharded")
    hub.log.clear()
    return api


def cut(source, model=NeMoForImageClassification, **options):
    return model.from_pretrained(source, labels=LABELS, **options)


@pytest.fixture(scope="module")
def expected(saved):
    """The module as cut from a local directory."""
    return cut(saved / "whole")


def assert_same(module, other) -> None:
    """Equal in every tensor and in what the configuration says of it."""
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    ours, theirs = ({**each.config.to_dict(), "equivalence": None, "parent": None} for each in (module, other))
    assert ours == theirs


@pytest.mark.parametrize("name", ["sharded", "whole", "bert"])
def test_cutting_on_load_is_cutting_locally(saved, name):
    model = NeMoForSequenceClassification if name == "bert" else NeMoForImageClassification
    assert (name == "whole") == (len(list((saved / name).glob("*.safetensors"))) == 1)
    assert_same(cut(saved / name, model), model.from_pretrained(saved / name).extract_module(LABELS))


@pytest.mark.parametrize("model", [NeMoForImageClassification, AutoModelForImageClassification])
def test_files_come_once(hub, api, saved, expected, model):
    assert_same(cut(REPO, model), expected)
    fetched = [line.path for line in hub.requests("GET", WEIGHTS)]
    assert len(fetched) == len(set(fetched)) == len(list((saved / "sharded").glob("*.safetensors"))) > 2
    hub.log.clear()
    other = model.from_pretrained(REPO, labels=["dog"])
    assert (other.config.names, hub.requests("GET", WEIGHTS)) == ({0: "dog"}, [])
    assert_same(cut(REPO, model, local_files_only=True), expected)
    whole = model.from_pretrained(REPO)
    assert (whole.is_parent, hub.requests("GET", WEIGHTS)) == (True, [])
    cut(REPO, model, force_download=True)
    assert sorted(line.path for line in hub.requests("GET", WEIGHTS)) == sorted(fetched)


def push_other(api, saved):
    old = [path.name for path in (saved / "sharded").glob("model*")]
    return api.upload_folder(repo_id=REPO, folder_path=saved / "other", delete_patterns=old)


def test_a_revision_is_that_commit_in_all_files(hub, api, saved, expected):
    first = hub.commits(REPO)[0].oid
    push_other(api, saved)
    api.create_branch(REPO, branch="old", revision=first)
    after = cut(saved / "other")
    assert expected.config.sites != after.config.sites
    for revision, wanted, report in ((first, expected, 0), ("old", expected, 0), (None, after, 1)):
        assert_same(cut(REPO, revision=revision), wanted)
        whole = NeMoForImageClassification.from_pretrained(REPO, revision=revision)
        assert whole.report == {"metrics": {"seed": report}}
    with pytest.raises(OSError, match="absent"):
        cut(REPO, revision="absent")


def test_a_commit_in_between_changes_nothing(hub, api, saved, expected, monkeypatch):
    """All files are of the commit that was the latest when loading began."""
    original, pushing = hub.handle, []

    def push(request, *args):
        answer = original(request, *args)
        if request.path.endswith("config.json") and "resolve" in request.path and not pushing:
            pushing.append(push_other(api, saved))
        return answer

    monkeypatch.setattr(hub, "handle", push)
    assert_same(cut(REPO), expected)
    assert len(hub.commits(REPO)) == 3
    assert_same(cut(REPO), cut(saved / "other"))


def test_private_parents_need_a_token(hub, api, expected, monkeypatch):
    hub.repos[REPO].private = True
    monkeypatch.delenv("HF_TOKEN")
    for token in (False, "hf_you", "hf_wrong", None):
        with pytest.raises(OSError, match="me/parent"):
            cut(REPO, token=token)
    assert hub.requests("GET", WEIGHTS) == []
    assert_same(cut(REPO, token="hf_me"), expected)


@pytest.mark.parametrize(
    "rule",
    [
        {"path": WEIGHTS, "kind": "status", "times": None},
        {"path": WEIGHTS, "kind": "cut", "times": None},
        {"path": WEIGHTS, "kind": "cut"},
        {"path": WEIGHTS, "kind": "wrong_bytes", "times": None},
        {"path": r"index\.json$", "kind": "cut"},
    ],
)
def test_a_faulty_server_gives_the_right_module_or_an_error(hub, api, expected, rule):
    """And leaves nothing in the cache that a later load would not put right."""
    hub.misbehave(**rule, method="GET")
    for options in ({"labels": LABELS}, {}):
        with suppress(OSError, ValueError):
            loaded = NeMoForImageClassification.from_pretrained(REPO, **options)
            if options:
                assert_same(loaded, expected)
    hub.rules.clear()
    assert_same(cut(REPO), expected)
    assert list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete")) == []


@pytest.mark.parametrize(("path", "name"), [(WEIGHTS, r"model-\S+"), (r"/config\.json$", r"config\.json")])
def test_wrong_bytes_are_found_and_removed(hub, api, expected, path, name):
    """The Hub client does not notice them; a wrong bit in a weight would give a wrong module."""
    hub.misbehave(kind="wrong_bytes", method="GET", path=path)
    if path != WEIGHTS:
        with pytest.raises(OSError, match=name):
            cut(REPO, AutoModelForImageClassification)  # which reads it before it knows whose model it is
    with pytest.raises(OSError, match=rf"^Got '{name}' from the Hub whose content .* checksum [0-9a-f]+; expected"):
        cut(REPO)
    assert_same(cut(REPO, AutoModelForImageClassification), expected)


def test_large_files_are_compared_when_they_arrive_only(tmp_path):
    large, wrong = bytes(2**20 + 1), hashlib.sha256(b"other").hexdigest()
    for name, content, since, is_kept in (
        (hashlib.sha256(large).hexdigest(), large, 0, True),
        (wrong, large, float("inf"), True),  # older than the download
        (wrong, large, 0, False),
        (wrong, b"a", float("inf"), False),
        ("an-etag-of-another-kind", b"a", 0, True),
    ):
        blob, path = tmp_path / "blobs" / name, tmp_path / "model.safetensors"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        path.symlink_to(blob)
        with nullcontext() if is_kept else pytest.raises(OSError, match="checksum"):
            check_content(path, since)
        assert blob.exists() == path.is_symlink() == is_kept
        path.unlink(missing_ok=True)


PEAK = """
import sys, threading, time
from nemo_hf import NeMoForImageClassification

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while watching:
        peaks.append(anonymous())
        time.sleep(0.001)

NeMoForImageClassification.from_pretrained(sys.argv[1], labels=[0])  # what is imported on the way
watching, start, peaks = True, anonymous(), [0]
thread = threading.Thread(target=watch)
thread.start()
module = NeMoForImageClassification.from_pretrained(sys.argv[2], labels=[3])
watching = False
thread.join()
sizes = [tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()]
print(max(peaks) - start, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_the_module_and_a_tensor(saved, tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    parent = attach_masks(ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=10)))
    generator = torch.Generator().manual_seed(0)
    for mask in parent.masks.site_masks():
        mask.relevance.copy_(255 * (torch.rand(mask.relevance.shape, generator=generator) < 0.2))
    parent.config.relevance_source = "exact"
    parent.save_pretrained(tmp_path, max_shard_size="20MB")
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, saved / "whole", tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    peak, module, largest = (json.loads(number) for number in done.stdout.split())
    assert whole > 5e7
    assert 0.15 < module / whole < 0.25
    assert peak <= module + largest + 8 * 2**20  # objects of layers, and what an allocator keeps
