"""A module's report against naive recounts, with metrics of the library `evaluate` and its evaluators."""

import copy
import sys
from functools import cache

import datasets
import pytest
import torch
from conftest import fresh, generated, image_samples, randomize_relevance, tiny, tokenizer
from torch.utils.data import DataLoader
from transformers import pipeline

from nemo_hf import evaluate_module, make_parent
from nemo_hf.evaluation.latency import count_macs
from nemo_hf.evaluation.report import other_groups, random_masks
from nemo_hf.models.extraction import make_plan

SAMPLES = image_samples(40, seed=3)
METRIC = """
import datasets
import evaluate
import numpy

class Agreement(evaluate.Metric):
    def _info(self):
        ids = datasets.Value("int32")
        ids = datasets.Sequence(ids) if self.config_name == "multilabel" else ids
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, factor=1.0):
        right = numpy.array(predictions) == numpy.array(references)
        return {"agreement": factor * right.mean(), "highest_id": numpy.max([predictions, references])}
"""


@cache
def built(family="vit", seed=0, targets=("ffn", "attention")):
    parent = make_parent(fresh(family), generated(relevance_threshold=0.6, targets=list(targets))).eval()
    randomize_relevance(parent, seed)
    return parent


@pytest.fixture
def parent():
    return copy.deepcopy(built())


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    script = tmp_path_factory.mktemp("metric") / "agreement.py"
    script.write_text(METRIC)
    return str(script)


def report_of(parent, labels, samples=SAMPLES, **options):
    return evaluate_module(parent, labels, DataLoader(samples, batch_size=15), show_progress=False, **options)


@torch.no_grad()
def naive_accuracy(model, ids, static=None, restrict=True):
    chosen = [sample for sample in SAMPLES if sample["labels"] in ids]
    options = {} if static is None else {"static_masks": static}
    right = 0
    for sample in chosen:
        logits = model(sample["pixel_values"][None], **options).logits[0]
        right += ids[int((logits[ids] if restrict else logits).argmax())] == sample["labels"]
    return right / len(chosen)


@pytest.mark.parametrize("ids", [[3, 1], [0], [0, 1, 2, 3, 4]])
def test_accuracies_equal_a_naive_recount(parent, ids):
    if len(ids) == 1:  # other groups without a neuron are the empty mask
        for mask in parent.masks.site_masks():
            mask.relevance[1:] = 0
    report, module = report_of(parent, ids), parent.extract_module(ids)
    assert len(ids) != 1 or report.controls["other"] == report.controls["empty"]
    assert report.accuracy == pytest.approx(naive_accuracy(module, ids, restrict=False))
    assert report.accuracy == pytest.approx(naive_accuracy(parent, ids, make_plan(parent, ids).static))
    assert report.parent_restricted_accuracy == pytest.approx(naive_accuracy(parent, ids))
    empty = {site.key: torch.zeros(site.neurons) for site in parent.sites}
    assert report.controls["empty"] == pytest.approx(naive_accuracy(parent, ids, empty))
    assert (report.controls["other"] is None) == (len(ids) == 5)
    assert report.samples == sum(sample["labels"] in ids for sample in SAMPLES)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}, {"round_to": 16}])
def test_a_given_module_is_measured_by_its_own_plan(parent, options):
    module = parent.extract_module([3, 1], **options)
    report = report_of(parent, ["dog", "ship"], module=module, seed=5, **options)
    plan = make_plan(parent, [3, 1], **options)
    assert module.report == report.to_dict()
    assert report.neuron_retention_rate == module.config.retained_neurons
    assert report.threshold == module.config.relevance_threshold == options.get("threshold", 0.6)
    assert report.labels == ["ship", "dog"]
    drawn = random_masks(plan.static, parent, seed=5)
    for entry, site in zip(module.config.sites, parent.sites, strict=True):
        for masks in drawn:
            assert masks[site.key].sum() == plan.static[site.key].sum() == entry["kept"][-1]
    random = [naive_accuracy(parent, [3, 1], masks) for masks in drawn]
    assert report.controls["random"] == pytest.approx(sum(random) / 5)
    other = make_plan(parent, other_groups(parent, plan.groups, 5), **options).static
    assert report.controls["other"] == pytest.approx(naive_accuracy(parent, [3, 1], other))


def test_what_is_not_the_modules_is_refused(parent):
    module = parent.extract_module(["cat"], round_to=16)
    strangers = [other.extract_module(["cat"]) for other in (built(seed=1), built("deit"), built(targets=("ffn",)))]
    for labels, options, message in [
        (["dog"], {}, r"labels=\['dog'\] and a module of \['cat'\] .*expected the module's own"),
        (["cat"], {"threshold": 0.5}, "Got threshold=0.5 and a module .* cut with {'threshold': 0.6"),
        (["cat"], {"round_to": 8}, "Got round_to=8 and a module .*'round_to': 16"),
        (["cat"], {"module": parent}, "Got a parent as module; expected a module"),
        *((["cat"], {"module": stranger}, "expected a module of this parent") for stranger in strangers),
    ]:
        with pytest.raises(ValueError, match=message):
            report_of(parent, labels, **{"module": module, **options})


def test_sizes_and_operations_are_recounted(parent):
    report, module = report_of(parent, [3, 1]), parent.extract_module([3, 1])
    assert report.parameters == sum(p.numel() for p in module.model.parameters())
    assert report.parent_parameters == sum(p.numel() for p in parent.model.parameters())
    assert report.weight_retention_rate == report.parameters / report.parent_parameters
    assert report.megabytes * 1e6 == 4 * report.parameters
    kept = sum(int(mask.sum()) for mask in make_plan(parent, [3, 1]).static.values())
    assert report.neuron_retention_rate == kept / sum(site.neurons for site in parent.sites)
    assert list(report.latency_ms) == list(report.parent_latency_ms) == ["1", "8", "32"]
    tokens, hidden, heads, head_dim, inner = 17, 32, 4, 8, 48
    patches = 16 * 3 * 4 * 4 * hidden
    attention = 4 * tokens * hidden * hidden + 2 * heads * tokens * tokens * head_dim
    feed_forward = 2 * tokens * hidden * inner
    assert count_macs(parent) == patches + 2 * (attention + feed_forward) + hidden * 5
    assert count_macs(module) < count_macs(parent)


def test_evaluation_ignores_autocast_and_leaves_the_parent_as_it_was(parent):
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    forward = parent.forward

    def autocast(*args, **kwargs):  # accelerate wraps the forward of a model that it prepared
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    module = parent.extract_module([3, 1]).train()
    parent.forward = autocast
    parent.train()
    assert report_of(parent, [3, 1], module=module).parent_restricted_accuracy == naive_accuracy(built(), [3, 1])
    assert all(layer.training for model in (parent, module) for layer in model.modules())
    assert parent.forward is autocast
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())


def test_random_inputs_do_not_move_the_statistics_of_norms():
    model = make_parent(
        tiny("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), generated()
    )
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert count_macs(model) > 0
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_data_without_labels_are_refused(parent):
    others = [sample for sample in SAMPLES if sample["labels"] != 2]
    without = [{"pixel_values": sample["pixel_values"]} for sample in others]
    for samples, message in ((without, "expected 'labels'"), (others, r"without a sample of the labels \['car'\]")):
        with pytest.raises(ValueError, match=message):
            report_of(parent, [2], samples)


def test_library_metrics_get_ids_of_the_modules_labels_and_survive_files(parent, metric, tmp_path):
    module = parent.extract_module([3, 1])
    report = report_of(parent, [3, 1], module=module, metrics={metric: {"factor": 2.0}})
    assert report.metrics["agreement"] == pytest.approx(2 * report.accuracy)
    assert report.parent_metrics["agreement"] == pytest.approx(2 * report.parent_restricted_accuracy)
    assert report.metrics["highest_id"] == report.parent_metrics["highest_id"] == 1
    module.save_pretrained(tmp_path)
    assert type(module).from_pretrained(tmp_path).report == report.to_dict()


def test_library_metrics_get_zeros_and_ones_where_samples_have_several_labels(metric):
    base = fresh("vit")
    base.config.problem_type = "multi_label_classification"
    parent = make_parent(base, generated(relevance_threshold=0.6)).eval()
    randomize_relevance(parent)
    samples = [{**s, "labels": torch.eye(5)[s["labels"]]} for s in SAMPLES]
    report = report_of(parent, [3, 0], samples, metrics=metric)
    pixels, labels = (torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        runs = [parent(pixels, static_masks=masks).logits for masks in (make_plan(parent, [3, 0]).static, None)]
    right = [((logits > 0) == (labels > 0))[:, [3, 0]].float().mean().item() for logits in runs]
    assert [report.accuracy, report.parent_restricted_accuracy] == pytest.approx(right)
    assert [report.metrics["agreement"], report.parent_metrics["agreement"]] == pytest.approx(right)
    module = parent.extract_module([3])
    module.config.rejection = {"weight": 1.0, "bias": 0.0, "threshold": 0.5, "accepted": 0.9, "rejected": 0.9}
    others = [sample for sample in samples if not sample["labels"][3]]
    assert report_of(parent, [3], others, module=module).rejection["accepted"] is None  # of no own sample


def test_metrics_that_can_not_be_loaded_or_computed_are_refused(parent, metric, tmp_path, monkeypatch):
    for metrics, error, message in [
        ([str(tmp_path / "none.py")], OSError, r"none.py' can't be loaded .*path of a metric script"),
        ({metric: {"average": "macro"}}, ValueError, r"can't be computed with .* {'average': 'macro'}"),
        ({metric: {"factor": float("nan")}}, ValueError, r"Got agreement=.*nan.*expected a finite number"),
    ]:
        with pytest.raises(error, match=message):
            report_of(parent, [3, 1], metrics=metrics)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install 'nemo-hf\[metrics\]'"):
        report_of(parent, [3, 1], metrics=["f1"])
    assert report_of(parent, [3, 1]).metrics == {}


def test_evaluators_run_a_module_by_name_and_as_a_pipeline(metric, tmp_path, monkeypatch):
    import evaluate

    module = built("bert").extract_module(["ship", "dog"])
    module.attach_processor(tokenizer())
    module.save_pretrained(tmp_path)
    words = torch.randint(0, 118, (12, 6), generator=torch.Generator().manual_seed(0)).tolist()
    texts, names = [" ".join(f"w{word}" for word in text) for text in words], ["ship"] * 5 + ["dog"] * 7
    data = datasets.Dataset.from_dict({"text": texts, "label": [module.config.label2id[name] for name in names]})
    pipe = pipeline(module.task, model=str(tmp_path))
    answers = [pipe(text)[0]["label"] for text in texts]
    for given in (str(tmp_path), pipe):
        if given is pipe:  # evaluate 0.4.6 compares it with a class that transformers 5 has not
            monkeypatch.setattr("transformers.TFPreTrainedModel", (), raising=False)
        result = evaluate.evaluator(module.task).compute(
            model_or_pipeline=given, data=data, metric=evaluate.load(metric), label_mapping=module.config.label2id
        )
        assert result["agreement"] == sum(a == name for a, name in zip(answers, names, strict=True)) / 12
