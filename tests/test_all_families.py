"""Every classification family of transformers: what is supported is cut exactly, as the table of models says."""

import math
import os
import site
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import transformers
from conftest import benchmark_script

KINDS = ("attention", "ffn", "conv")
FAST = [
    "T5ForSequenceClassification",  # encoder and decoder, position biases by head
    "WhisperForAudioClassification",  # features instead of waveforms
]


def assert_sound(row: dict) -> None:
    """A class that is supported is so in every respect that was tried; another has its reason."""
    assert row.get("same_when_fresh", True)
    if row["status"] != "supported":
        assert row["whole"] if row["status"] == "refused" else row["remark"]
        assert not any(kind in row for kind in KINDS)
        return
    for kind in KINDS:
        assert kind in row or kind == "conv" or row["whole"][kind], kind  # most models have no convolution
        assert kind not in row or row[kind]["effect"] > 100 * row[kind]["tolerance"], kind
    assert row["module"]["difference"] <= row["module"]["tolerance"]
    assert row["module"]["difference_after_loading"] == 0
    assert row["module"]["difference_when_cut_on_load"] == 0
    assert row["module"]["parameters"] < 1
    assert row["reconstruction"]["refused"] or row["reconstruction"]["reconstructed"] <= row["reconstruction"]["raw"]
    assert len(row["training"]["losses"]) == 2
    assert all(math.isfinite(loss) for loss in row["training"]["losses"])
    assert row["training"]["generators_moved"] > 0.5


def assert_as_stored(found: dict, stored: dict) -> None:
    assert_sound(found)
    assert found["status"] == stored["status"]
    assert bool(found.get("reconstruction", {}).get("refused")) == bool(stored.get("refused"))
    for kind in KINDS:
        for name in ("pruning_modes", "neurons"):
            assert found.get(kind, {}).get(name) == stored.get(kind, {}).get(name), (kind, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAST)
def test_a_family_is_supported_in_every_respect(name):
    script = benchmark_script("families")
    row = script.check(*next(found for found in script.families() if found[2] == name))
    assert row["status"] == "supported"
    assert_sound(row)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_all_families_are_as_the_table_says(monkeypatch):
    script = benchmark_script("families")
    data = script.stored()
    rows = {row["class"]: row for row in data["families"]}
    # Other versions have other classes, and may cut some in another way: sound all the same.
    is_same_version = {made["transformers"] for made in data["made_with"]} == {transformers.__version__}
    classes = list(script.families())
    assert not is_same_version or {name for _, _, name in classes} == set(rows)
    tried = [found for found in classes if found[2] in rows and rows[found[2]]["status"] != "not built"]
    assert len(tried) > 0.8 * len(rows)
    wrong = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A new process finds the script only in its own search path.
    folder = str(Path(script.__file__).parent)
    workers = {"initializer": site.addsitedir, "initargs": (folder,), "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(os.cpu_count(), **workers) as pool:
        for row in pool.map(script.check, *zip(*tried, strict=True)):
            try:
                assert_as_stored(row, rows[row["class"]] if is_same_version else row)
            except AssertionError as error:
                wrong.append(f"{row['class']}: {str(error).splitlines()[0]}")
    assert not wrong
