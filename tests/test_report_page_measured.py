"""What a page says is measured: on which data, beside which controls, and what is refused before."""

import functools
import re

import pytest
import torch
from conftest import LABELS, fresh, generated, image_samples, parent_of

from nemo_hf import calibrate_rejection, evaluate_module, extract_module, make_parent, write_report_page
from nemo_hf.evaluation.controls import ModuleAnswers, cut_beside_controls
from nemo_hf.hub.page_facts import Measured, page_facts
from nemo_hf.hub.page_texts import headline, key_figures, known_accuracies, measured_on
from nemo_hf.hub.report_page import page_words, render_page

OWN = ["cat", "dog"]


def text_of(page):
    """The page without styles, scripts and markup."""
    text = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def batches_of(count=40, seed=0, labels=None):
    """Labelled batches; `labels` are those in place of the samples' own."""
    samples = image_samples(count, seed)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    given = torch.arange(count) % len(LABELS) if labels is None else labels
    return [{"pixel_values": pixels[:25], "labels": given[:25]}, {"pixel_values": pixels[25:], "labels": given[25:]}]


@functools.cache
def module_of_plain():
    return extract_module(
        fresh("vit"), OWN, batches_of(), 0.5, validation=batches_of(seed=1), reconstruct=False, show_progress=False
    )


def answered(module, wrong=0):
    """Other data, labelled as the module answers them, but for some of them."""
    pixels = torch.cat([batch["pixel_values"] for batch in batches_of(seed=2)])
    with torch.no_grad():
        found = module.own_logits(pixel_values=pixels).argmax(-1)
    found[:wrong] = 1 - found[:wrong]
    labels = torch.tensor(module.config.label_ids)[found]
    labels[30:] = 4  # of another label
    return batches_of(seed=2, labels=labels)


def test_a_module_alone_is_measured_on_the_data_that_are_given(tmp_path):
    module = module_of_plain()
    assert 0 < module.config.extraction["validation"]["accuracy"] < 1
    for wrong, told in ((0, "100.0%"), (6, "80.0%")):
        write_report_page(module, tmp_path / "x.html", batches=answered(module, wrong), show_progress=False)
        text = text_of((tmp_path / "x.html").read_text())
        assert f"and answers {told} of its samples right" in text
        assert "right answers on 30 samples" in text
        assert "the whole model" not in text.partition("Not measured")[0].partition("Reconstruction")[0]
        assert "Accuracy beside the whole model is measured by" in text


def test_a_report_of_other_data_gives_the_page_its_latency_alone(tmp_path):
    parent = parent_of("vit")
    module = parent.extract_module(OWN)
    calibrate_rejection(module, batches_of(), show_progress=False)
    report = evaluate_module(parent, OWN, batches_of(), module, show_progress=False)
    assert report.accuracy < 1
    assert report.rejection["accepted"] is not None
    write_report_page(module, tmp_path / "alone.html", batches=answered(module), show_progress=False)
    write_report_page(module, tmp_path / "beside.html", origin=parent, batches=answered(module), show_progress=False)
    alone, beside = ((tmp_path / name).read_text() for name in ("alone.html", "beside.html"))
    assert "and answers 100.0% of its samples right" in text_of(alone)
    assert ["choosing among" in text_of(page) for page in (alone, beside)] == [False, True]
    assert ["random neurons" in text_of(page) for page in (alone, beside)] == [False, True]
    assert ['class="mark"' in page for page in (alone, beside)] == [False, True]  # the module's threshold
    assert ['id="rejection"' in page for page in (alone, beside)] == [True, True]


def test_the_figures_of_a_report_give_way_to_answers_on_other_data():
    module = parent_of("vit").extract_module(OWN)
    times = {"latency_ms": {"1": 1.0}, "parent_latency_ms": {"1": 2.0}, "device": "a CPU"}
    module.report = {"accuracy": 0.3, "samples": 3, "rejection": {"auroc": 0.7}, **times}
    answers = ModuleAnswers({"module": 0.9}, 9)
    found = {}
    for name, measured in {"report": Measured(module), "answers": Measured(module, answers)}.items():
        facts = page_facts(module, None, measured, page_words(module, None, {}))
        found[name] = {title: value for title, value, _ in key_figures(facts)}
        found[name]["samples"] = measured_on(facts)
    size = found["report"]["size"]
    shared = {"size": size, "latency, batch of 1": "1 ms"}
    assert found["report"] == {**shared, "right answers": "30.0%", "AUROC of rejection": "0.700", "samples": 3}
    assert found["answers"] == {**shared, "right answers": "90.0%", "samples": 9}


def test_a_module_that_was_trained_further_has_not_the_accuracy_of_its_cut():
    module = extract_module(
        fresh("vit"), OWN, batches_of(), 0.5, validation=batches_of(seed=1), reconstruct=False, show_progress=False
    )
    words = page_words(module, None, {})
    told = module.config.extraction["validation"]["accuracy"]
    assert known_accuracies(page_facts(module, None, Measured(), words))["accuracy"] == told
    with torch.no_grad():
        for weights in module.model.classifier.parameters():
            weights.neg_()
    module.drop_stale_results()
    assert module.config.is_tuned
    facts = page_facts(module, None, Measured(), words)
    assert known_accuracies(facts) == {}
    assert "right" not in headline(facts)[0]
    assert 'id="accuracy"' not in render_page(facts)


@pytest.mark.parametrize("kept", ["all", "own", "none"])
def test_the_control_of_other_labels_is_cut_on_samples_of_them_or_left_out(kept, tmp_path):
    plain, batches = fresh("vit"), batches_of()
    if kept == "own":
        samples = [{n: v[batch["labels"] < 2] for n, v in batch.items()} for batch in batches]
    else:
        names = ("pixel_values", "labels") if kept == "all" else ("pixel_values",)
        samples = [{name: batch[name] for name in names} for batch in batches]
    found = cut_beside_controls(plain, [0, 1], samples, [0.3], reconstruct=False)[0]
    assert ("other" in found) == (kept == "all")
    module = found["accuracy"].model.state_dict()
    for control in {"random", "other"} & set(found):
        weights = found[control].model.state_dict()
        assert any(v.shape != weights[n].shape or not torch.allclose(v, weights[n]) for n, v in module.items()), control
    options = {"batches": batches, "calibration": samples, "labels": OWN, "retentions": 0.3, "show_progress": False}
    write_report_page(plain, tmp_path / "x.html", **options)
    text = text_of((tmp_path / "x.html").read_text())
    assert ("module of other labels" in text) == (kept == "all")
    assert ("A control of other labels needs labelled samples" in text) == (kept != "all")


def test_a_module_of_all_labels_has_no_control_of_others_and_the_page_asks_for_none(tmp_path):
    options = {"batches": batches_of(), "calibration": batches_of(), "retentions": [0.5], "show_progress": False}
    write_report_page(fresh("vit"), tmp_path / "x.html", labels=LABELS, **options)
    text = text_of((tmp_path / "x.html").read_text())
    assert "A module of 5 of 5 labels" in text
    assert "other labels needs" not in text
    assert "module of other labels" not in text


def test_one_retention_is_as_good_as_a_list_of_one(tmp_path):
    plain = fresh("vit")
    options = {"batches": batches_of(), "calibration": batches_of(), "labels": OWN, "show_progress": False}
    for name, retentions in (("one", 0.3), ("list", [0.3])):
        write_report_page(plain, tmp_path / name, retentions=retentions, **options)
    tables = [re.search("<tbody>.*?</tbody>", (tmp_path / name).read_text(), re.DOTALL)[0] for name in ("one", "list")]
    assert tables[0] == tables[1]
    assert tables[0].count("<tr") == 1
    text = text_of((tmp_path / "one").read_text())
    assert "; random neurons of the same size reach" in text
    assert "as many" not in text
    told = re.search(r"random neurons ([\d.]+%) of the same size", text)[1]
    assert f"the same size reach {told}" in text


@pytest.mark.parametrize(("options", "message"), [
    ({"labels": ["nonsense"]}, "Got labels without samples to cut on"),
    ({"retentions": [7]}, "Got retentions without samples to cut on"),
])  # fmt: skip
def test_options_of_cuts_are_refused_without_samples(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report_page(fresh("vit"), tmp_path / "x.html", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_module_takes_no_other_labels_and_no_other_origin(tmp_path):
    module, batches = module_of_plain(), batches_of()
    measuring = {"origin": fresh("vit"), "batches": batches, "calibration": batches}
    with pytest.raises(ValueError, match="Got labels for the page of a module"):
        write_report_page(module, tmp_path / "x.html", labels=["car"], **measuring)
    other = fresh("vit")
    other.config.id2label = {index: f"label {index}" for index in range(len(LABELS))}
    for origin in (fresh("bert"), other, make_parent(fresh("bert"), generated()), module, "vit"):
        with pytest.raises(ValueError, match="expected the model that it was cut from"):
            write_report_page(module, tmp_path / "x.html", origin=origin)
    assert list(tmp_path.iterdir()) == []
    for origin in (fresh("vit"), make_parent(fresh("vit"), generated())):
        write_report_page(module, tmp_path / "x.html", origin=origin)


@pytest.mark.parametrize("name", ["batches", "calibration"])
def test_data_that_can_be_read_once_are_refused_before_they_are_read(name, tmp_path):
    given = {"batches": batches_of(), "calibration": batches_of()}
    given[name] = stream = iter(given[name])
    with pytest.raises(TypeError, match=f"Got {name} that can be read only once, a list_iterator"):
        write_report_page(fresh("vit"), tmp_path / "x.html", **given)
    assert next(stream)
    assert list(tmp_path.iterdir()) == []
