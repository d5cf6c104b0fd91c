"""Tables and the picture of the benchmark of training methods, made of small results."""

import json
from functools import partial

import pytest
from conftest import benchmark_script

compact, tables, pages = (benchmark_script(name) for name in ("compact", "training_tables", "readme_tables"))
SEEDS = [0, 1, 2]


def method(name, seed, accuracy, lost=None, **more):
    return {"method": name, "seed": seed, "accuracy": accuracy, "lost": lost, **more}


def module(name, way, accuracy, validation=0.5, kind="pairs", retention=0.1, **more):
    row = {"method": name, "way": way, "kind": kind, "retention": retention, "module": accuracy, "seeds": SEEDS}
    measured = {"sets": 6, "restricted": 0.9, "other": 0.6, "rejection": 0.8, "weights": 0.11}
    return {**row, "validation": validation, **measured, **more}


def own(name, kind, tuned, weights, **more):
    row = {"method": name, "kind": kind, "seeds": [0], "sets": 5, "restricted": 0.95, "module": 0.9, "tuned": tuned}
    return {**row, "weights": weights, **more}


@pytest.fixture
def results(tmp_path):
    """Results as a benchmark writes and the tables read them: of a known task with modules, and of one without."""
    found = {
        "methods": [
            *(method("plain", seed, 0.96, 0.0, cpu_seconds=40, peak_mib=50.0) for seed in SEEDS),
            *(method("nemo", s, 0.95 - s / 100, s + 1.0, cpu_seconds=60, peak_mib=75.0, coupling=0.4) for s in SEEDS),
            method("mwt", 0, 0.9, 6.0),
        ],
        "modules": [
            module("plain", "raw", 0.7),
            module("plain", "raw", 1.0, kind="singles", restricted=1.0),  # one label leaves nothing to choose
            module("plain", "reconstructed", 0.8),
            module("plain", "reconstructed", 0.85, retention=0.2),
            module("plain", "fine-tuned", 0.88),
            module("nemo", "raw", 0.3, 0.4),
            module("nemo", "reconstructed", 0.84, 0.6, other=None),
            module("nemo", "reconstructed, relevance", 0.79, 0.7, other=0.5),
            module("nemo", "fine-tuned", 0.99, sets=1),  # not as many sets as the others
            module("mwt", "raw", 0.82, 0.8),
        ],
        "own": [
            own("nemo", "pairs", 0.92, 0.3),
            own("nemo", "fives", 0.9, 0.5),
            own("mwt", "pairs", 0.9, 0.6),
            own("mwt", "fives", 0.88, 1.0),
            own("mwt", "triples", 0.1, 0.1),
        ],
    }
    for task, names in {"digits": found, "new": ["methods"]}.items():
        path = tmp_path / f"training_{task}.json"
        for name in names:
            about = {**compact.load(path), "command": "run", "task": "Some data", "epochs": 3}
            compact.update(path, about, name, found[name], *found[name][0])
    return tables.stored_results(tmp_path)


def rows_of(table):
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_methods_stand_beside_the_plain_model(results):
    assert list(results) == ["digits", "new"]
    assert rows_of(tables.methods_table(results["digits"])) == [
        ["plain", "0-2", "0.960 ± 0.000", "-", "-", "-", "1.00"],
        ["nemo", "0-2", "0.940 ± 0.010", "2.00 (at most 3.69)", "-", "0.40", "1.50"],
        ["mwt", "0", "0.900", "6.00", "-", "-", "-"],
    ]


def test_validation_chooses_among_modules_of_the_same_sets(results):
    assert rows_of(tables.modules_table(results["digits"])) == [
        ["pairs", "0.2", "plain", "0.900", "-", "0.850", "-", "0.600", "0.800", "0.11", "6", "0-2"],
        ["pairs", "0.1", "plain", "0.900", "0.700", "0.800", "0.880", "0.600", "0.800", "0.11", "6", "0-2"],
        ["pairs", "0.1", "nemo", "0.900", "0.300", "0.790", "-", "0.500", "0.800", "0.11", "6", "0-2"],
        ["pairs", "0.1", "mwt", "0.900", "0.820", "-", "-", "0.600", "0.800", "0.11", "6", "0-2"],
    ]


def test_training_pays_by_the_best_way_in_points(results):
    table = tables.pays_table(results)
    assert table.startswith("| data and model | kind | retention | way | plain | nemo | mwt |")
    assert rows_of(table) == [["Digits, ViT", "pairs", "0.1", "reconstructed", "0.800", "-1.0", "+2.0"]]


def test_the_paper_is_compared_over_the_kinds_that_both_methods_have(results):
    text = tables.claim(results)
    assert "| Digits, ViT | nemo | 0.40 | 0.950 | 0.900 | 0.910 |" in text
    assert "- nemo against mwt: +2.00 points and -50.00 % of size (1 task)" in text
    assert "- nemo against mwt in the paper (arXiv 2508.11348): +1.72 points and -58.10 % of size" in text
    assert "a fifth of the plain model" not in text
    assert tables.claim({"new": results["new"]}) == ""


def test_readme_has_the_methods_that_were_measured(results):
    assert rows_of(tables.headlines(results)) == [
        ["Digits, ViT", "plain", "0-2", "-", "0.850", "-"],
        ["Digits, ViT", "nemo", "0-2", "2.00 (at most 3.69)", "-", "-"],
        ["Digits, ViT", "mwt", "0", "6.00", "-", "-"],
    ]
    assert tables.headlines({}) == tables.training_page({}) == ""


def test_a_page_has_what_was_measured(results):
    page = tables.training_page({"new": results["new"]})
    assert page.startswith("![")
    assert "### new\n\nSome data; 3 epochs. `run`; cpu" in page
    assert "Where does training pay" not in page
    assert "| kind |" not in page
    whole = tables.training_page(results)
    assert [line for line in whole.splitlines() if line.startswith("#")] == [
        "### Where does training pay?", "### The paper's claim", "### Digits, ViT", "### new"
    ]  # fmt: skip


def test_the_picture_has_lines_of_what_was_measured(results, tmp_path):
    assert tables.curves(results["digits"], "pairs") == {
        "plain, raw": [(0.11, 0.7)],
        "plain, reconstructed": [(0.11, 0.8), (0.11, 0.85)],
        "plain, fine-tuned": [(0.11, 0.88)],
        "nemo, reconstructed": [(0.11, 0.79)],
    }
    tables.draw({"new": results["new"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    tables.draw(results, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size < 80_000


def test_kinds_of_steps_are_columns_whatever_was_measured():
    step = {"ms": 10.0, "ratio": 1.0, "peak_mib": 100.0, "generators": 0.0}
    rows = [
        {**step, "setting": "a", "step": "plain"},
        {**step, "setting": "a", "step": "masks", "ratio": 1.2, "peak_mib": 110.0, "generators": 0.05},
        {**step, "setting": "b", "step": "plain"},
        {**step, "setting": "b", "step": "taught modules", "ratio": 1.5},
    ]
    table = pages.training_steps(rows)
    assert table.startswith("| training step | plain ms | masks | taught modules | generators |")
    assert rows_of(table) == [["a", "10", "1.20, 1.10", "-", "5.0%"], ["b", "10", "-", "1.50, 1.00", "0.0%"]]


def test_blocks_are_written_between_markers_and_missing_ones_reported(monkeypatch):
    blocks = {"results": "new", "costs": "more", "training": ""}
    monkeypatch.setattr(pages, "BLOCKS", {name: partial(str, text) for name, text in blocks.items()})
    page = "above\n<!-- results -->\nold\n<!-- /results -->\n<!-- training --><!-- /training --> <!-- costs -->"
    empty = "<!-- training -->\n<!-- /training -->"
    assert pages.rendered(page) == page.replace("old", "new").replace("<!-- training --><!-- /training -->", empty)
    assert pages.missing(page, ["results", "costs", "training"]) == ["costs"]


def test_the_pages_have_their_blocks():
    for path, names in pages.PAGES.items():
        assert pages.missing(path.read_text(), names) == [], json.dumps(names)
