"""Tensors that modules of one source have in common: once in memory and in the file, however they are used."""

import copy
import json
import logging

import pytest
import torch
from conftest import (
    LABELS,
    build,
    generated,
    image_samples,
    logits_of,
    parent_of,
    randomize,
    randomize_relevance,
    rewrite_weights,
)
from conftest import tiny as tiny_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from nemo_hf import calibrate_rejection, compose, make_parent
from nemo_hf.auto_classes import NeMoComposedForImageClassification
from nemo_hf.neurons.trial_inputs import random_inputs

PARTS = [["dog", "ship"], ["cat"], ["frog"]]
AUTO = {"vit": AutoModelForImageClassification}
BART = {
    "vocab_size": 120, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}  # fmt: skip


def source(family, **options):
    if family != "bart":
        return parent_of(family, **options)
    parent = make_parent(randomize(tiny_model("BartForSequenceClassification", **BART)), generated()).eval()
    randomize_relevance(parent)
    return parent


def cut(parent, labels=PARTS):
    return [parent.extract_module(each) for each in labels]


def inputs_of(module):
    inputs = random_inputs(module)
    if "input_ids" in inputs:
        inputs["input_ids"][:, -1] = 2  # where texts of BART end, once
        inputs["input_ids"][:, :-1] = inputs["input_ids"][:, :-1].clamp(min=3)
    return inputs


def kept_apart(parent):
    """A relevance by which each label uses neurons of its own: every fifth."""
    for mask in parent.masks.site_masks():
        mask.relevance.zero_()
        for label, row in enumerate(mask.relevance):
            row[label::5] = 255
    parent.config.relevance_source = "exact"
    return parent


def names_by_tensor(model):
    """The names of each parameter, as a set of sets."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in found.values()}


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2", "albert", "bart"])
def test_equal_tensors_are_one_in_memory_and_in_the_file(family, tmp_path):
    modules = cut(source(family))
    apart, inputs = copy.deepcopy(modules), inputs_of(modules[0])
    composed = compose(modules)
    assert torch.equal(logits_of(composed, **inputs), torch.cat([logits_of(each, **inputs) for each in apart], -1))
    states = [dict(each.named_parameters(remove_duplicate=False)) for each in apart]
    for name, parameter in states[0].items():
        for index in (1, 2):
            is_same = composed.get_parameter(f"part_0.{name}") is composed.get_parameter(f"part_{index}.{name}")
            other = states[index][name]
            assert is_same == (parameter.shape == other.shape and torch.equal(parameter, other)), name
    assert composed.num_parameters() < sum(each.num_parameters() for each in apart)
    for index, part in enumerate(apart):
        for name, parameter in part.named_parameters():
            assert torch.equal(composed.get_parameter(f"part_{index}.{name}"), parameter)
    composed.save_pretrained(tmp_path / "one")
    stored = load_file(tmp_path / "one" / "model.safetensors")
    buffers = [n for n, _ in composed.named_buffers() if n in composed.state_dict()]
    assert sum(t.numel() for n, t in stored.items() if n not in buffers) == composed.num_parameters()
    auto = AUTO.get(family, AutoModelForSequenceClassification)
    for changed in (auto.from_pretrained(tmp_path / "one"), copy.deepcopy(composed)):
        assert torch.equal(logits_of(changed, **inputs), logits_of(composed, **inputs))
        for each in (changed, changed.double(), changed.to("cpu")):
            assert names_by_tensor(each) == names_by_tensor(composed)
            assert each.num_parameters() == composed.num_parameters()
    loaded = auto.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert names_by_tensor(loaded) == names_by_tensor(composed)
    auto.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2"])
def test_modules_with_neurons_of_their_own_are_never_larger_than_the_source(family, tmp_path):
    parent = kept_apart(parent_of(family, targets=["ffn"]))  # attention fills its heads up to one width
    composed = compose(cut(parent, [[name] for name in LABELS]))
    plain = parent.detach_masks()
    assert composed.num_parameters() <= plain.num_parameters()
    sizes = []
    for name, model in (("composed", composed), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        sizes.append(sum(tensor.nbytes for tensor in stored.values() if tensor.is_floating_point()))
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize(
    ("family", "targets", "tolerance"),
    [("vit", ["ffn"], 0), ("bert", ["ffn"], 0), ("gpt2", ["ffn"], 0), ("llama", ["ffn"], 0), ("vit", None, 0.1)],
)
def test_the_size_of_a_joint_cut_is_that_of_the_joint_cut(family, targets, tolerance):
    """Of attention about that: its heads are filled up to one width."""
    parent = parent_of(family, **({} if targets is None else {"targets": targets}))
    composed = compose(cut(parent))
    joint = parent.extract_module(["dog", "ship", "cat", "frog"])
    found = composed.config.sizes
    assert found["joint_parameters"] == pytest.approx(joint.num_parameters(), rel=tolerance)
    assert found["parameters"] == composed.num_parameters()
    assert found["source_parameters"] == parent.detach_masks().num_parameters()


@pytest.mark.parametrize(("case", "level"), [("most", "WARNING"), ("some", "INFO"), ("own", None)])
def test_a_smaller_joint_cut_is_named(case, level, caplog):
    parent = parent_of("vit", targets=["ffn"])
    for mask in kept_apart(parent).masks.site_masks():
        shared = {"most": slice(40), "some": slice(2), "own": slice(0)}[case]
        mask.relevance[:, shared] = 255
    with caplog.at_level(logging.INFO, "nemo_hf"):
        composed = compose(cut(parent))
    found, said = composed.config.sizes, [r for r in caplog.records if "Joined modules of one source" in r.message]
    assert [record.levelname for record in said] == ([level] if level else [])
    assert (found["joint_parameters"] < found["parameters"]) == (level is not None)
    assert (found["parameters"] > found["source_parameters"]) == (level == "WARNING")
    assert (found["repeated_rows"] > 0) == (case != "own")
    for record in said:
        assert f"has about {found['joint_parameters']}" in record.message
        assert ("more than the" in record.message) == (level == "WARNING")


def test_modules_of_other_sources_share_nothing_large_and_have_no_joint_cut():
    other = make_parent(build("vit", seed=1), generated(relevance_threshold=0.6)).eval()
    randomize_relevance(other)
    modules = [parent_of("vit").extract_module(["dog"]), other.extract_module(["cat"])]
    counts = sum(module.num_parameters() for module in modules)
    composed = compose(modules)
    assert (composed.num_parameters(), composed.config.sizes) == (counts, None)


def test_joining_keeps_what_was_measured_and_training_keeps_tensors_one(tmp_path):
    modules = cut(parent_of("vit"))
    pixels = torch.stack([sample["pixel_values"] for sample in image_samples(20)])
    batch = {"pixel_values": pixels, "labels": torch.arange(20) % 5}
    calibrate_rejection(modules[1], [batch], show_progress=False)
    before = [(each.config.equivalence, each.config.rejection, each.config.is_tuned) for each in modules]
    composed = compose(modules, labels=["cat", "dog", "frog", "ship"])
    for each in modules:
        logits_of(each, pixel_values=batch["pixel_values"])
    assert [(p.config.equivalence, p.config.rejection, p.config.is_tuned) for p in composed.parts] == before
    together, old = names_by_tensor(composed), copy.deepcopy(composed)
    samples = [{**s, "labels": [0, 1, 0, 3, 2][s["labels"]]} for s in image_samples(8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(composed, args, train_dataset=samples)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
    assert names_by_tensor(composed) == together == names_by_tensor(loaded)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, composed.get_parameter(name))
        assert not torch.equal(parameter, old.get_parameter(name)), name
    assert all(part.config.is_tuned and part.config.rejection is None for part in composed.parts)


@pytest.fixture
def saved(tmp_path):
    compose(cut(parent_of("vit"))).save_pretrained(tmp_path)
    return tmp_path


def test_files_in_which_each_module_has_its_own_load_as_before(saved):
    expected = AutoModelForImageClassification.from_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    own = {name: tensors[other].clone() for name, other in config.pop("shared_tensors").items()}
    rewrite_weights(saved / "model.safetensors", tensors | own)
    (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sizes"}))
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    inputs = inputs_of(loaded.parts[0])
    assert torch.equal(logits_of(loaded, **inputs), logits_of(expected, **inputs))
    assert loaded.num_parameters() > expected.num_parameters()
    again = compose(loaded.parts)
    assert again.num_parameters() == expected.num_parameters()


SOME = "part_1.model.vit.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda shared: {**shared, SOME: "part_0.model.vit.layers.0.mlp.fc1.weight"}, "of the same shape"),
        (lambda shared: {**shared, SOME: "part_1.model.vit.layers.1.mlp.fc1.weight"}, "in an earlier module"),
        (lambda shared: {**shared, "part_7.x": next(iter(shared.values()))}, "in an earlier module"),
        (lambda shared: {**shared, next(iter(shared)): next(iter(shared))}, "in an earlier module"),
        (lambda shared: {**shared, next(iter(shared)): "nothing"}, "in an earlier module"),
        (lambda shared: dict(list(shared.items())[1:]), "missing tensors"),
        (lambda shared: [1], "makes no configuration"),
        (lambda shared: {"a": 1}, "makes no configuration"),
    ],
)
def test_damaged_names_of_shared_tensors_are_refused(saved, damage, words):
    config = json.loads((saved / "config.json").read_text())
    config["shared_tensors"] = damage(config["shared_tensors"])
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        NeMoComposedForImageClassification.from_pretrained(saved)
