"""Composed models: joint logits, calibration of modules against each other, files, refusals."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import NAMES, fresh, generated, image_processor, image_samples, randomize_relevance, rewrite_weights, tiny
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, Trainer, TrainingArguments

from nemo_hf import compose, make_parent
from nemo_hf.auto_classes import NeMoComposedForImageClassification
from nemo_hf.neurons.trial_inputs import random_inputs

ALL = list(NAMES["id2label"].values())
SEVERAL = "multi_label_classification"


def parent_of(plain, seed=0):
    parent = make_parent(plain, generated()).eval()
    randomize_relevance(parent, seed)
    return parent


@functools.cache
def built_modules():
    vit, other = parent_of(fresh("vit")), parent_of(fresh("deit"), 1)
    return [vit.extract_module([ALL[3], ALL[0]]), other.extract_module([ALL[1]])]


@pytest.fixture
def modules():
    """Modules of two parents of different kinds, the second of a single label."""
    return copy.deepcopy(built_modules())


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_joint_logits_are_the_modules_own_in_the_order_asked_for(modules):
    inputs = random_inputs(modules[0])
    first, second = (logits(module, inputs) for module in modules)
    assert torch.equal(logits(compose(modules), inputs), torch.cat([first, second], -1))
    mixed = compose(modules, [ALL[1], ALL[0], ALL[3]])
    assert torch.equal(logits(mixed, inputs), torch.cat([second, first[:, [1, 0]]], -1))
    mixed.config.scales, mixed.config.biases = [2.0, 0.5], [1.0, -1.0]
    torch.testing.assert_close(logits(mixed, inputs), torch.cat([0.5 * second - 1, 2 * first[:, [1, 0]] + 1], -1))
    assert mixed.config.id2label == {0: ALL[1], 1: ALL[0], 2: ALL[3]}
    assert mixed.num_parameters() == sum(module.num_parameters() for module in modules)


def test_modules_of_one_parent_for_all_labels_answer_as_it_does_also_in_the_trainer(tmp_path):
    parent = make_parent(fresh("vit"), generated()).eval()  # no mask is closed yet: modules keep everything
    joint = compose([parent.extract_module([ALL[2]]), parent.extract_module([n for n in ALL if n != ALL[2]])], ALL)
    samples = image_samples(6)
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    expected = logits(parent, batch)
    torch.testing.assert_close(logits(joint, batch), expected, atol=1e-5, rtol=1e-5)
    loss = cross_entropy(expected, torch.tensor([sample["labels"] for sample in samples]))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    assert Trainer(joint, args, eval_dataset=samples).evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_calibration_finds_the_least_cross_entropy(modules):
    """And so undoes what a module's training did to its logits."""
    generator = torch.Generator().manual_seed(0)
    pixels, owner, order = torch.randn(300, 3, 16, 16, generator=generator) * 3, np.array([0, 0, 1]), [2, 1, 0]
    own = [logits(module, {"pixel_values": pixels}).double() for module in modules]
    spreads, centers = (np.array([getattr(part, name)().item() for part in own]) for name in ("std", "mean"))
    units = (torch.cat(own, -1).numpy() - centers[owner]) / spreads[owner]
    true = torch.from_numpy(units * np.array([0.7, 4.0])[owner] + np.array([0.0, 2.0])[owner])[:, order]
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).flatten()

    def loss(values):  # by scales and biases of logits in units of their spread
        joint = (units * np.exp(values[:2])[owner] + values[2:][owner])[:, order]
        joint = joint - np.log(np.exp(joint).sum(-1, keepdims=True))
        return -joint[np.arange(300), labels].mean() + 1e-4 * (values**2).sum()

    batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(100), slice(100, None))]
    config = compose(modules, [ALL[1], ALL[0], ALL[3]], batches).config
    scales, biases = np.array(config.scales), np.array(config.biases)
    found = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    assert loss(np.array([*np.log(scales * spreads), *(biases + scales * centers)])) == pytest.approx(found.fun, 1e-6)
    assert scales * spreads == pytest.approx(np.exp(found.x[:2]), rel=1e-3)
    assert scales[0] * spreads[0] < 1 < scales[1] * spreads[1]


def test_one_sample_is_enough_for_finite_numbers(modules):
    batch = {name: value[:1] for name, value in random_inputs(modules[0]).items()}
    config = compose(modules, batches=[{**batch, "labels": torch.tensor([2], dtype=torch.int32)}]).config
    assert all(map(math.isfinite, config.scales + config.biases))


def bart_modules():
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    sizes |= {"vocab_size": 120, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    parent = parent_of(tiny("BartForSequenceClassification", **sizes, max_position_embeddings=64, pad_token_id=0))
    return [parent.extract_module([ALL[3], ALL[0]]), parent.extract_module([ALL[1]])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("built", "auto"),
    [(built_modules, AutoModelForImageClassification), (bart_modules, AutoModelForSequenceClassification)],
)
def test_files_hold_it_all(built, auto, dtype, tmp_path):
    """Also weights that are tied within a module (BART), and a precision."""
    modules = [copy.deepcopy(module).to(dtype) for module in built()]
    for module in modules:
        module.attach_processor(image_processor())
    composed = compose(modules, [ALL[1], ALL[0], ALL[3]])
    composed.config.scales, composed.config.biases = [1.5, 0.75], [0.25, -2.0]
    composed.save_pretrained(tmp_path / "one")
    loaded, info = auto.from_pretrained(tmp_path / "one", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert (type(loaded), loaded.training) == (type(composed), False)
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2], [1, 9, 8, 2]])}
    if built is built_modules:
        inputs = {"pixel_values": torch.ones(2, 3, 16, 16, dtype=dtype)}
    assert torch.equal(logits(loaded, inputs), logits(composed, inputs))
    assert logits(loaded, inputs).dtype == torch.float32
    tied = [*(composed.config.shared_tensors or ()), *(key for part in modules for key in part.all_tied_weights_keys)]
    assert len(composed.all_tied_weights_keys) == len(tied)
    loaded.save_pretrained(tmp_path / "two")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_modules_of_more_than_ten_labels_come_back(tmp_path):
    names = {index: f"label {index}" for index in range(14)}
    plain = fresh("vit")
    plain.classifier = torch.nn.Linear(32, 14)
    plain.config.id2label, plain.config.label2id = names, {name: index for index, name in names.items()}
    parent = parent_of(plain)
    composed = compose([parent.extract_module(list(range(1, 14))), parent.extract_module([0])])
    composed.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    inputs = random_inputs(parent)
    assert torch.equal(logits(loaded, inputs), logits(composed, inputs))
    assert [list(part.config.names) for part in loaded.parts] == [list(range(13)), [0]]
    assert [loaded.config.id2label[index] for index in range(14)] == [names[label] for label in (*range(1, 14), 0)]


@pytest.mark.parametrize("option", [{"labels": [0]}, {"round_to": 8}])
def test_nothing_is_cut_from_joined_modules(modules, tmp_path, option):
    compose(modules).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for modules that were joined; expected a parent"):
        AutoModelForImageClassification.from_pretrained(tmp_path, **option)


def test_attention_is_chosen_for_all_modules(modules, tmp_path):
    compose(modules).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert {part.model.config._attn_implementation for part in loaded.parts} == {"eager"}


def on(labels):
    """Calibrates on four samples with labels."""

    def join(modules):
        inputs = {n: value[:1].expand(4, *value.shape[1:]) + 0 for n, value in random_inputs(modules[0]).items()}
        return compose(modules, batches=[{**inputs, **({} if labels is None else {"labels": torch.tensor(labels)})}])

    return join


def with_change(change, labels=None):
    """Joins modules after a change to the second."""

    def join(modules):
        change(modules[1])
        return compose(modules) if labels is None else on(labels)(modules)

    return join


@pytest.mark.parametrize(
    ("ask", "kind", "words"),
    [
        (lambda m: compose([]), ValueError, "Got 0 modules to join; expected at least two"),
        (lambda m: compose([m[0], fresh("vit")]), TypeError, "Got a ViTForImageClassification to join"),
        (lambda m: compose([parent_of(fresh("vit")), m[0]]), TypeError, "Got a parent to join"),
        (lambda m: compose([m[0], copy.deepcopy(m[0])]), ValueError, "in several modules"),
        (lambda m: compose(m, ["cat"]), ValueError, "expected just these in any order"),
        (lambda m: compose([m[0], bart_modules()[1]]), ValueError, "Got modules of the tasks"),
        (with_change(lambda m: m.half()), ValueError, "Got modules of the precisions"),
        (with_change(lambda m: setattr(m.config, "problem_type", SEVERAL)), ValueError, "a multi-label module"),
        (lambda m: compose(m, batches=[]), ValueError, "Got no samples to calibrate on"),
        (on(None), ValueError, "expected 'labels' in it"),
        (on([0, 1, 2, 3]), ValueError, "expected places among the 3 joint labels"),
        (on([0.0, 1.0, 2.0, 1.0]), ValueError, r"type torch\.float32; expected integer ids"),
        (with_change(lambda m: m.model.deit.layernorm.weight.data.fill_(math.inf), [0, 1, 2, 1]), ValueError, "finite"),
    ],
)
def test_what_can_not_be_joined_is_refused(modules, ask, kind, words):
    with pytest.raises(kind, match=words):
        ask(modules)


def test_other_processors_are_refused(modules):
    modules[0].attach_processor(image_processor())
    assert compose(modules).processor_files == modules[0].processor_files
    modules[1].processor_files = {"preprocessor_config.json": b"{}"}
    with pytest.raises(ValueError, match="different processors"):
        compose(modules)


@pytest.fixture
def saved(modules, tmp_path):
    compose(modules).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.update(scales=[1.0]), "each with a scale above 0 and a bias"),
        (lambda c: c.update(scales=[-1.0, 1.0]), "each with a scale above 0 and a bias"),
        (lambda c: c.update(biases=[float("inf"), 0.0]), "each with a scale above 0 and a bias"),
        (lambda c: c.update(label_order=[0, 1, 1]), "a place for each label"),
        (lambda c: c.update(label_order=[2, 1, 0]), "expected each label of a module once"),
        (lambda c: c.update(problem_type=SEVERAL), "modules of single labels"),
        (lambda c: c.update(id2label={"0": "a", "1": "b", "x": "c"}), "a place for each label"),
        (lambda c: c.update(id2label=3), "a place for each label"),
        (lambda c: c.update(modules=1, to_dict=1), "the name of a method"),
        (lambda c: c.update(sub_configs=5), "makes no configuration"),
        (lambda c: c["parts"][0].update(id2label={"0": "a"}), "with 2 labels"),
        (lambda c: c["parts"][0]["base_config"].update(num_labels=100_001), "num_labels"),
        (lambda c: c.update(parts=[]), "of 0 modules"),
        (lambda c: c.update(model_type="vit"), "expected modules that were joined"),
        (lambda c: c["parts"][0].update(role="parent"), "config.json"),
        (lambda c: c["parts"][0].update(base_class="OsEnviron"), "Got the model class 'OsEnviron'"),
    ],
)
def test_damaged_configurations_are_refused(saved, damage, words):
    config = json.loads((saved / "config.json").read_text())
    damage(config)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        NeMoComposedForImageClassification.from_pretrained(saved)


def test_missing_and_misshapen_tensors_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if name.startswith("part_1.") and name.endswith("classifier.weight"))
    kept = tensors.pop(name)
    for changed, words in ((tensors, "1 missing tensors"), ({**tensors, name: kept[:, 1:].contiguous()}, "of shape")):
        rewrite_weights(saved / "model.safetensors", changed)
        with pytest.raises(ValueError, match=words):
            AutoModelForImageClassification.from_pretrained(saved)
