"""Every classification family of transformers: what the support table says is so, and none is silently wrong."""

import math
import os
import site
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import transformers
from conftest import benchmark_script

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"
DATA = benchmark_script("families").stored()
ROWS = {row["class"]: row for row in DATA["families"]}
KINDS = ("attention", "ffn", "conv")
IS_SAME_VERSION = DATA["made_with"][0]["transformers"] == transformers.__version__
"""Other versions have classes that are not written, and may cut some in another way: sound all the same."""

ONE_OF_EACH_STRUCTURE = [
    "AlbertForSequenceClassification",  # one layer at all depths
    "BartForSequenceClassification",  # embeddings tied, encoder and decoder
    "BloomForSequenceClassification",  # q, k and v of a head side by side
    "ConvNextV2ForImageClassification",  # response norm between the projections
    "DebertaV2ForSequenceClassification",  # relative positions through the same projections
    "DeepseekV3ForSequenceClassification",  # latent attention, routed experts
    "GPTNeoForSequenceClassification",  # no softmax scale
    "MraForSequenceClassification",  # attention without effect
    "ModernBertForSequenceClassification",  # fused q, k, v and fused GLU
    "Qwen3ForSequenceClassification",  # norms of q and k
    "Qwen3NextForSequenceClassification",  # a gate beside q, layers without attention
    "ReformerForSequenceClassification",  # random hashing
    "BitForImageClassification",  # norms over groups of channels
    "RegNetForImageClassification",  # grouped convolutions, squeeze-and-excite
    "ResNetForImageClassification",  # convolutions alone
    "SegformerForImageClassification",  # stages, depthwise convolution between the projections
    "Swinv2ForImageClassification",  # cosine attention
    "T5ForSequenceClassification",  # position biases by head
    "WavLMForSequenceClassification",  # weights read without a call
    "WhisperForAudioClassification",  # features instead of waveforms
    "XLNetForSequenceClassification",  # samples in the second dimension
]


@pytest.fixture(scope="module")
def sweep():
    """The script that makes the table, as a module."""
    return benchmark_script("families")


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
    assert len(row["training"]["losses"]) == 2
    assert all(math.isfinite(loss) for loss in row["training"]["losses"])
    assert row["training"]["generators_moved"] > 0.5


def assert_same(found: dict, written: dict) -> None:
    assert_sound(found)
    if not IS_SAME_VERSION:
        return
    assert found["status"] == written["status"]
    assert found.get("whole") == written.get("whole")
    for kind in KINDS:
        parts = [row.get(kind, {}) for row in (found, written)]
        assert [part.get("pruning_modes") for part in parts] == [parts[1].get("pruning_modes")] * 2, kind
        assert [part.get("neurons") for part in parts] == [parts[1].get("neurons")] * 2, kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_OF_EACH_STRUCTURE)
def test_one_family_of_each_structure_is_as_written(sweep, name):
    written = ROWS[name]
    assert_same(sweep.check(written["task"], written["model_type"], name), written)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_families_are_as_written(sweep, monkeypatch):
    classes = list(sweep.families())
    if IS_SAME_VERSION:
        assert {name for _, _, name in classes} == set(ROWS)
    written = [c for c in classes if c[2] in ROWS]
    assert len(written) > 0.9 * len(ROWS)
    tried = [c for c in written if ROWS[c[2]]["status"] != "not built" and c[2] not in ONE_OF_EACH_STRUCTURE]
    wrong = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A new process finds the script only in its own search path.
    workers = {"initializer": site.addsitedir, "initargs": (str(BENCHMARKS),), "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(os.cpu_count(), **workers) as pool:
        for row in pool.map(sweep.check, *zip(*tried, strict=True)):
            try:
                assert_same(row, ROWS[row["class"]])
            except AssertionError as error:
                wrong.append(f"{row['class']}: {str(error).splitlines()[0]}")
    assert not wrong
