"""A module's report against naive recounts."""

import pytest
import torch
from conftest import image_samples, randomize_relevance
from torch.utils.data import DataLoader

from nemo_hf import NeMoConfig, evaluate_module, make_parent
from nemo_hf.evaluation.latency import count_macs
from nemo_hf.evaluation.report import format_table
from nemo_hf.models.extraction import make_plan
from nemo_hf.neurons.trial_inputs import random_inputs


@pytest.fixture
def parent(vit):
    parent = make_parent(vit, NeMoConfig(relevance_threshold=0.6)).eval()
    randomize_relevance(parent)
    return parent


@pytest.fixture
def samples():
    return image_samples(60, seed=3)


def report_of(parent, samples, labels, **options):
    return evaluate_module(parent, labels, DataLoader(samples, batch_size=7), show_progress=False, **options)


@torch.no_grad()
def naive_accuracy(model, samples, ids, static=None, restrict=True):
    right = 0
    chosen = [sample for sample in samples if sample["labels"] in ids]
    for sample in chosen:
        options = {} if static is None else {"static_masks": static}
        logits = model(sample["pixel_values"][None], **options).logits[0]
        logits = logits[ids] if restrict else logits
        right += ids[int(logits.argmax())] == sample["labels"]
    return right / len(chosen)


@pytest.mark.parametrize("ids", [[3, 1], [0], [0, 1, 2, 3, 4]])
def test_accuracies_equal_a_naive_recount(parent, samples, ids):
    report = report_of(parent, samples, ids)
    module = parent.extract_module(ids)
    assert report.accuracy == pytest.approx(naive_accuracy(module, samples, ids, restrict=False))
    assert report.parent_restricted_accuracy == pytest.approx(naive_accuracy(parent, samples, ids))
    empty = {site.key: torch.zeros(site.neurons) for site in parent.sites}
    assert report.controls["empty"] == pytest.approx(naive_accuracy(parent, samples, ids, empty))
    assert report.samples == sum(sample["labels"] in ids for sample in samples)


def test_the_module_is_as_good_as_the_parent_under_its_mask(parent, samples):
    report = report_of(parent, samples, [3, 1])
    static = make_plan(parent, [3, 1]).static
    assert report.accuracy == pytest.approx(naive_accuracy(parent, samples, [3, 1], static))


def test_the_other_control_is_the_mask_of_disjoint_groups(parent, samples):
    report = report_of(parent, samples, [0, 1, 2])
    others = [[3, 4]]  # all that is left
    static = make_plan(parent, others[0]).static
    assert report.controls["other"] == pytest.approx(naive_accuracy(parent, samples, [0, 1, 2], static))
    assert report_of(parent, samples, [0, 1, 2, 3, 4]).controls["other"] is None


def test_random_controls_have_the_modules_size_and_follow_the_seed(parent, samples):
    from nemo_hf.evaluation.report import random_masks

    static = make_plan(parent, [0, 1]).static
    drawn = random_masks(static, parent, seed=5)
    assert len(drawn) == 5
    for masks in drawn:
        for site in parent.sites:
            sizes = list(site.parts.values())
            ours, theirs = masks[site.key].split(sizes), static[site.key].split(sizes)
            assert [part.sum() for part in ours] == [part.sum() for part in theirs]
    accuracies = [naive_accuracy(parent, samples, [0, 1], masks) for masks in drawn]
    report = report_of(parent, samples, [0, 1], seed=5)
    assert report.controls["random"] == pytest.approx(sum(accuracies) / 5)


def test_sizes_are_recounted_from_the_files(parent, samples, tmp_path):
    report = report_of(parent, samples, [3, 1])
    module = parent.extract_module([3, 1])
    assert report.parameters == sum(p.numel() for p in module.model.parameters())
    assert report.parent_parameters == sum(p.numel() for p in parent.model.parameters())
    assert report.weight_retention_rate == report.parameters / report.parent_parameters
    assert report.megabytes * 1e6 == 4 * report.parameters
    kept = sum(int(mask.sum()) for mask in make_plan(parent, [3, 1]).static.values())
    assert report.neuron_retention_rate == kept / sum(site.neurons for site in parent.sites)


def test_operations_are_those_of_the_matrix_products(parent):
    tokens, hidden, heads, head_dim, inner = 17, 32, 4, 8, 48
    patches = 16 * 3 * 4 * 4 * hidden
    attention = 4 * tokens * hidden * hidden + 2 * heads * tokens * tokens * head_dim
    feed_forward = 2 * tokens * hidden * inner
    assert count_macs(parent) == patches + 2 * (attention + feed_forward) + hidden * 5
    assert count_macs(parent.extract_module([3, 1])) < count_macs(parent)


def test_latency_is_reported_by_batch_size_for_module_and_parent(parent, samples):
    report = report_of(parent, samples, [3, 1])
    assert list(report.latency_ms) == list(report.parent_latency_ms) == ["1", "8", "32"]
    assert all(value > 0 for value in [*report.latency_ms.values(), *report.parent_latency_ms.values()])
    assert report.device.startswith("cpu (")


def test_measuring_leaves_the_parent_as_it_was(parent, samples):
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    parent.train()
    report_of(parent, samples, [3, 1])
    assert parent.training
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())
    inputs = random_inputs(parent)
    assert parent(**inputs).neuron_masks.keys() == {site.key for site in parent.sites}


def test_the_table_has_a_row_a_module(parent, samples):
    reports = [report_of(parent, samples, ids).to_dict() for ids in ([3, 1], [0, 1, 2, 3, 4])]
    lines = format_table(reports).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("ship,dog")
    assert f"{reports[0]['accuracy']:.3f}" in lines[2]


def test_other_groups_without_a_neuron_leave_the_report_alone(parent, samples):
    for mask in parent.masks.site_masks():
        mask.relevance[2:] = 0
    report = report_of(parent, samples, [0, 1])
    assert report.controls["other"] == report.controls["empty"]


def test_the_module_carries_its_report_until_it_trains(parent, samples, tmp_path):
    module = parent.extract_module([3, 1])
    report = report_of(parent, samples, [3, 1], module=module).to_dict()
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert loaded.report == report
    assert loaded.train().report is None


def test_an_autocast_around_the_parent_does_not_count(parent, samples):
    plain = report_of(parent, samples, [3, 1])
    forward = parent.forward

    def in_half_precision(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    parent.forward = in_half_precision
    assert report_of(parent, samples, [3, 1]).parent_restricted_accuracy == plain.parent_restricted_accuracy
    assert parent.forward is in_half_precision


def test_batches_without_labels_are_refused(parent):
    with pytest.raises(ValueError, match="expected 'labels'"):
        evaluate_module(parent, [0, 1], [{"pixel_values": torch.zeros(2, 3, 16, 16)}], show_progress=False)


def test_data_without_the_labels_is_refused(parent, samples):
    with pytest.raises(ValueError, match="expected at least one"):
        report_of(parent, [sample for sample in samples if sample["labels"] != 2], [2])
