"""The experiment on ranged reads: its page, its arithmetic, and one small parent that is really read by ranges."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import benchmark_script, fresh
from hub_server import hub as hub
from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors.torch import save_file

from nemo_hf import make_parent
from nemo_hf.pruning.tensor_slices import cut_tensor

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"
REPO = "me/parent"


@pytest.fixture(scope="module")
def script():
    """The script that makes the page, as a module."""
    return benchmark_script("ranged_reads")


def prepared(script, layout: str, share: float = 0.3):
    """A tiny parent whose first label has a random relevance, its cuts, and the readers that are transposed."""
    parent = make_parent(fresh("vit")).eval()
    generator = torch.Generator().manual_seed(0)
    is_transposed, by_group = script.LAYOUTS[layout]
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        mask.relevance[:1] = script.random_relevance(mask.site, share, by_group, generator)
    relevance = {key: rows[:1] for key, rows in parent.masks.relevance().items()}
    cuts = script.cuts_of(parent, relevance, [0])
    return parent, cuts, script.readers(cuts) if is_transposed else set()


def layouts(test):
    return pytest.mark.parametrize(
        "layout", ["row-major", "readers transposed", "readers transposed, neurons by group"]
    )(test)


def save(parent, transposed, path) -> None:
    state = {name: (t.T if name in transposed else t).contiguous() for name, t in parent.state_dict().items()}
    save_file(state, path, {"format": "pt"})


def test_the_page_is_what_the_results_say(script):
    results = json.loads((BENCHMARKS / "ranged_reads.json").read_text())
    assert (BENCHMARKS / "ranged_reads.md").read_text() == script.render(results)


def test_the_results_are_what_the_script_counts(script):
    results = json.loads((BENCHMARKS / "ranged_reads.json").read_text())
    layout = list(script.LAYOUTS)[-1]
    counted = script.measure(script.build(script.PARENTS["ViT-B"]), 0.2, layout)
    keys = {"parent": "ViT-B", "layout": layout, "share": 0.2}
    stored = [row for row in results["rows"] if all(row[key] == value for key, value in keys.items())]
    assert stored == [{"parent": "ViT-B", **row} for row in counted]
    assert len(results["rows"]) == len(script.PARENTS) * len(script.LAYOUTS) * len(script.SHARES) * len(script.GAPS)


@layouts
def test_tensors_lie_where_a_real_file_has_them(script, tmp_path, layout):
    parent, _, transposed = prepared(script, layout)
    save(parent, transposed, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entries, before, size = script.entries_of(parent.state_dict(), transposed)
    assert (before, size) == (8 + length, len(content))
    del header["__metadata__"]
    assert {name: (start - before, list(shape)) for name, (start, shape, _) in entries.items()} == {
        name: (entry["data_offsets"][0], entry["shape"]) for name, entry in header.items()
    }


@layouts
def test_ranges_are_those_of_the_numbers_that_a_module_takes(script, layout):
    """The naive way: number all bytes, cut these numbers as the tensors are cut."""
    parent, cuts, transposed = prepared(script, layout)
    entries, _, size = script.entries_of(parent.state_dict(), transposed)
    needed = torch.zeros(size, dtype=torch.bool)
    for name, cut in cuts.items():
        start, shape, width = entries[name]
        places = torch.arange(parent.state_dict()[name].numel(), dtype=torch.float64).view(shape)
        places = places.T if name in transposed else places
        for dim, index in cut.indices.items():
            places = places.index_select(dim, index[index >= 0])
        for byte in range(width):
            needed[start + places.flatten().long() * width + byte] = True
    counted = torch.zeros(size, dtype=torch.bool)
    for first, end in script.needed_ranges(entries, cuts, transposed).tolist():
        assert not counted[first:end].any()
        counted[first:end] = True
    assert torch.equal(counted, needed)


@pytest.mark.parametrize(("gap", "expected"), [(0, 3), (1, 3), (2, 2), (9, 2), (10, 1)])
def test_gaps_are_joined_up_to_a_size(script, gap, expected):
    import numpy as np

    ranges = np.array([[0, 3], [5, 6], [6, 10], [20, 21]])
    joined = script.coalesced(ranges, gap)
    assert len(joined) == expected
    assert (joined[0, 0], joined[-1, 1]) == (0, 21)
    assert all(after - before > gap for before, after in zip(joined[:-1, 1], joined[1:, 0], strict=True))


def test_time_is_that_of_waiting_or_of_the_bytes(script):
    assert script.seconds(1, 0) == pytest.approx(0.1)
    assert script.seconds(17, 0) == pytest.approx(0.05 + 3 * 0.05)
    assert script.seconds(17, 20_000_000) == pytest.approx(1.05)


@layouts
@pytest.mark.parametrize("gap", [64, 512])
def test_a_module_is_read_by_ranges(script, hub, tmp_path, layout, gap):
    parent, cuts, transposed = prepared(script, layout)
    save(parent, transposed, tmp_path / "model.safetensors")
    HfApi().create_repo(REPO)
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=tmp_path / "model.safetensors", path_in_repo="model.safetensors")
    hub.log.clear()
    entries, _, size = script.entries_of(parent.state_dict(), transposed)
    ranges = script.coalesced(script.needed_ranges(entries, cuts, transposed), gap)
    content = bytearray(b"\xff" * size)  # which no weight is: these numbers are none
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    for first, end in ranges.tolist():
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}"}
        answer = get_session().get(url, headers=headers)
        assert answer.status_code == 206
        content[first:end] = answer.content
    assert len(hub.requests("GET", "/resolve/")) == len(ranges) > 1
    assert sum(line.sent for line in hub.log) == int((ranges[:, 1] - ranges[:, 0]).sum()) < size
    state = parent.extract_module([0]).state_dict()
    assert set(cuts) == set(state)
    for name, cut in cuts.items():
        start, shape, _ = entries[name]
        whole = torch.frombuffer(content, dtype=torch.float32, count=parent.state_dict()[name].numel(), offset=start)
        whole = whole.view(shape).T if name in transposed else whole.view(shape)
        tensor = cut_tensor(whole.index_select, cut) if cut.indices else whole
        assert torch.equal(tensor, state[name]), name
