"""Composed models: joint logits, calibration of modules against each other, files, refusals."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import NAMES, fresh, image_processor, image_samples, randomize_relevance, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nemo_hf import NeMoConfig, compose, make_parent
from nemo_hf.auto_classes import NeMoComposedForImageClassification
from nemo_hf.models.composition import fit_scales
from nemo_hf.neurons.trial_inputs import random_inputs

ALL = list(NAMES["id2label"].values())


def parent_of(plain, seed=0):
    parent = make_parent(plain, NeMoConfig()).eval()
    randomize_relevance(parent, seed)
    return parent


@functools.cache
def built_modules():
    vit, other = parent_of(fresh("vit")), parent_of(fresh("deit"), 1)
    return [vit.extract_module([ALL[3], ALL[0]]), other.extract_module([ALL[1]])]


def image_modules():
    """Modules of two parents of different kinds, the second of a single label."""
    return copy.deepcopy(built_modules())


def given(model, samples=4):
    return {name: value[:1].expand(samples, *value.shape[1:]) + 0 for name, value in random_inputs(model).items()}


def test_joint_logits_are_the_modules_own_in_the_order_asked_for():
    modules = image_modules()
    inputs = random_inputs(modules[0])
    with torch.no_grad():
        first, second = (module(**inputs).logits for module in modules)
        assert torch.equal(compose(modules)(**inputs).logits, torch.cat([first, second], -1))
        mixed = compose(modules, [ALL[1], ALL[0], ALL[3]])
        assert torch.equal(mixed(**inputs).logits, torch.cat([second, first[:, [1, 0]]], -1))
        mixed.config.scales, mixed.config.biases = [2.0, 0.5], [1.0, -1.0]
        torch.testing.assert_close(mixed(**inputs).logits, torch.cat([0.5 * second - 1, 2 * first[:, [1, 0]] + 1], -1))
    assert mixed.config.id2label == {0: ALL[1], 1: ALL[0], 2: ALL[3]}
    assert mixed.num_parameters() == sum(module.num_parameters() for module in modules)


def test_modules_of_one_parent_for_all_labels_answer_about_as_it_does():
    parent = make_parent(fresh("vit"), NeMoConfig()).eval()  # no mask is closed yet: modules keep everything
    modules = [parent.extract_module([ALL[2]]), parent.extract_module([name for name in ALL if name != ALL[2]])]
    inputs = random_inputs(parent)
    with torch.no_grad():
        joint = compose(modules, ALL)(**inputs)
        torch.testing.assert_close(joint.logits, parent(**inputs).logits, atol=1e-5, rtol=1e-5)
        loss = compose(modules, ALL)(**inputs, labels=torch.tensor([1, 2, 0, 3][: len(joint.logits)])).loss
    expected = torch.nn.functional.cross_entropy(joint.logits, torch.tensor([1, 2, 0, 3][: len(joint.logits)]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_fit_is_the_best_by_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 5, generator=generator, dtype=torch.float64) * 2
    sizes, order = [2, 1, 2], [4, 0, 2, 1, 3]
    owner = np.array([0, 0, 1, 2, 2])
    true = (logits * torch.tensor([0.5, 3.0, 1.0])[owner] + torch.tensor([0.0, -1.0, 2.0])[owner])[:, order]
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).flatten()

    spreads = np.array([part.std().item() for part in logits.split(sizes, -1)])
    centers = np.array([part.mean().item() for part in logits.split(sizes, -1)])

    def loss(values):  # by scales and biases of logits in units of their spread
        joint = ((logits.numpy() - centers[owner]) / spreads[owner]) * np.exp(values[:3])[owner] + values[3:][owner]
        joint = joint[:, order] - np.log(np.exp(joint).sum(-1, keepdims=True))
        return -joint[np.arange(300), labels].mean() + 1e-4 * (values**2).sum()

    scales, biases = (np.array(found) for found in fit_scales(logits, labels, sizes, order))
    found = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8})
    assert loss(np.array([*np.log(scales * spreads), *(biases + scales * centers)])) == pytest.approx(found.fun, 1e-7)
    assert scales == pytest.approx(np.exp(found.x[:3]) / spreads, rel=1e-3)
    assert scales[0] < 1 < scales[1]


def test_the_fit_does_not_depend_on_how_a_module_scales_its_logits():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 4, generator=generator).double(), torch.randint(0, 4, (50,), generator=generator)
    scales, biases = fit_scales(logits, labels, [2, 2], [0, 1, 2, 3])
    others = torch.cat([logits[:, :2], 0.05 * logits[:, 2:] + 30], -1)
    got, moved = fit_scales(others, labels, [2, 2], [0, 1, 2, 3])
    assert got == pytest.approx([scales[0], scales[1] / 0.05], rel=1e-4)
    assert moved == pytest.approx([biases[0], biases[1] - 30 * scales[1] / 0.05], rel=1e-4, abs=1e-4)


def test_calibration_undoes_what_another_training_did_to_the_logits():
    plain = fresh("vit")
    pixels = torch.stack([sample["pixel_values"] for sample in image_samples(80)]) * 3
    with torch.no_grad():  # answers go with the sample and not with the label alone
        plain.classifier.weight *= 20
        plain.classifier.bias -= plain(pixels).logits.mean(0)
    parent = make_parent(plain, NeMoConfig()).eval()
    modules = [parent.extract_module([ALL[0], ALL[1]]), parent.extract_module(ALL[2:])]
    with torch.no_grad():
        right = parent(pixels).logits.argmax(-1)
        head = modules[1].model.classifier
        head.weight *= 0.1
        head.bias.mul_(0.1).add_(3.0)
        batch = {"pixel_values": pixels, "labels": right}
        before, after = compose(modules, ALL), compose(modules, ALL, batches=[batch])
        shares = [(joined(pixels).logits.argmax(-1) == right).float().mean() for joined in (before, after)]
    assert len(right.unique()) > 2
    assert shares[0] < 0.8 < 0.9 < shares[1]
    assert after.config.scales[1] > 3 * after.config.scales[0]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_files_hold_it_all(kind, tmp_path):
    if kind == "image":
        modules, processor, auto = image_modules(), image_processor(), AutoModelForImageClassification
    else:
        parent = parent_of(fresh("bert"))
        modules, processor = [parent.extract_module([ALL[0], ALL[2]]), parent.extract_module([ALL[1]])], tokenizer()
        auto = AutoModelForSequenceClassification
    for module in modules:
        module.attach_processor(processor)
    composed = compose(modules, [ALL[1], ALL[0], ALL[3 if kind == "image" else 2]])
    composed.config.scales, composed.config.biases = [1.5, 0.75], [0.25, -2.0]
    composed.save_pretrained(tmp_path / "one")
    loaded, info = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert type(loaded) is type(composed)
    assert not loaded.training
    inputs = random_inputs(modules[0])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, composed(**inputs).logits)
    loaded.save_pretrained(tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in files)
    task = "image-classification" if kind == "image" else "text-classification"
    sample = Image.new("RGB", (16, 16), (200, 30, 30)) if kind == "image" else "w3 w5"
    answers = pipeline(task, model=str(tmp_path / "one"), top_k=3)([sample])[0]
    assert {answer["label"] for answer in answers} == set(composed.config.id2label.values())


def test_modules_of_a_channel_network_join(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    cnn = parent_of(ResNetForImageClassification(ResNetConfig(**sizes, **NAMES)).eval())
    vit = parent_of(fresh("vit"))
    composed = compose([cnn.extract_module([ALL[0]]), cnn.extract_module([ALL[2]])])
    with pytest.raises(ValueError, match="in several modules"):
        compose([cnn.extract_module([ALL[0]]), vit.extract_module([ALL[0]])])
    composed.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32)}
    with torch.no_grad():
        # Loaded weights lie where they lie in the file, and some processors round by their alignment; copies lie alike.
        answers = [copy.deepcopy(model)(**inputs).logits for model in (loaded, composed)]
    assert torch.equal(*answers)


def test_the_trainer_evaluates_it(tmp_path):
    composed = compose(image_modules())
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 3} for index in range(6)]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    metrics = Trainer(composed, args, eval_dataset=samples).evaluate()
    batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in samples[0]}
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(composed(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("ask", "kind", "words"),
    [
        (lambda modules: compose([]), ValueError, "Got 0 modules to join; expected at least two"),
        (lambda modules: compose([modules[0], fresh("vit")]), TypeError, "Got a ViTForImageClassification to join"),
        (lambda modules: compose([parent_of(fresh("vit")), modules[0]]), TypeError, "Got a parent to join"),
        (lambda modules: compose([modules[0], copy.deepcopy(modules[0])]), ValueError, "in several modules"),
        (lambda modules: compose(modules, ["cat"]), ValueError, "expected just these in any order"),
        (lambda modules: compose([modules[0], modules[1].half()]), ValueError, "Got modules of the precisions"),
        (lambda modules: compose(modules, batches=[]), ValueError, "Got no batches to calibrate on"),
        (lambda modules: compose(modules, batches=[given(modules[0])]), ValueError, "expected 'labels' in it"),
        (
            lambda modules: compose(modules, batches=[{**given(modules[0]), "labels": torch.tensor([0, 1, 2, 3])}]),
            ValueError,
            "expected places among the 3 joint labels",
        ),
    ],
    ids=["none", "plain", "parent", "shared label", "labels", "precision", "no data", "no labels", "range"],
)  # fmt: skip
def test_what_can_not_be_joined_is_refused(ask, kind, words):
    with pytest.raises(kind, match=words):
        ask(image_modules())


def test_other_processors_and_tasks_are_refused():
    modules = image_modules()
    modules[0].attach_processor(image_processor())
    assert compose(modules).processor_files == modules[0].processor_files
    modules[1].processor_files = {"preprocessor_config.json": b"{}"}
    with pytest.raises(ValueError, match="different processors"):
        compose(modules)
    text = parent_of(fresh("bert")).extract_module([ALL[2]])
    with pytest.raises(ValueError, match="Got modules of the tasks"):
        compose([modules[0], text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_weights_and_precisions_survive_files(dtype, tmp_path):
    config = BartConfig(
        vocab_size=120, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **NAMES,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    parent = parent_of(BartForSequenceClassification(config))
    modules = [parent.extract_module([ALL[0], ALL[2]]).to(dtype), parent.extract_module([ALL[1]]).to(dtype)]
    composed = compose(modules)
    composed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2], [1, 9, 8, 2]])}
    with torch.no_grad():
        logits = composed(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, logits)
    assert logits.dtype == torch.float32
    assert len(composed.all_tied_weights_keys) == sum(len(module.all_tied_weights_keys) for module in modules) > 0


def test_attention_is_chosen_for_all_modules(tmp_path):
    compose(image_modules()).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert {part.model.config._attn_implementation for part in loaded.parts} == {"eager"}


@pytest.mark.parametrize("labels", [torch.tensor([2], dtype=torch.int32), torch.tensor([0])])
def test_one_sample_is_enough_for_finite_numbers(labels):
    modules = image_modules()
    batch = {**{name: value[:1] for name, value in random_inputs(modules[0]).items()}, "labels": labels}
    composed = compose(modules, batches=[batch])
    assert all(map(math.isfinite, composed.config.scales + composed.config.biases))


def test_logits_that_are_no_numbers_and_labels_that_are_none_are_refused():
    modules = image_modules()
    batch = {**given(modules[0]), "labels": torch.tensor([0.0, 1.0, 2.0, 1.0])}
    with pytest.raises(ValueError, match=r"type torch\.float32 from 0\.0"):
        compose(modules, batches=[batch])
    modules[1].model.deit.layernorm.weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match="no finite numbers"):
        compose(modules, batches=[{**batch, "labels": torch.tensor([0, 1, 2, 1])}])


@pytest.fixture
def saved(tmp_path):
    compose(image_modules()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.update(scales=[1.0]), "each with a scale above 0 and a bias"),
        (lambda c: c.update(biases=[float("inf"), 0.0]), "each with a scale above 0 and a bias"),
        (lambda c: c.update(label_order=[0, 1, 1]), "a place for each label"),
        (lambda c: c.update(label_order=[2, 1, 0]), "expected each label of a module once"),
        (lambda c: c.update(scales=[-1.0, 1.0]), "a scale above 0"),
        (lambda c: c.update(problem_type="multi_label_classification"), "modules of single labels"),
        (lambda c: c.update(modules=1, to_dict=1), "the name of a method"),
        (lambda c: c.update(sub_configs=5), "makes no configuration"),
        (lambda c: c["parts"][0].update(id2label={"0": "a"}), "with 2 labels"),
        (lambda c: c["parts"][0]["base_config"].update(num_labels=100_001), "num_labels"),
        (lambda c: c.update(parts=[]), "of 0 modules"),
        (lambda c: c.update(parts={"a": 1}), "of 0 modules"),
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
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing tensors"):
        AutoModelForImageClassification.from_pretrained(saved)
    save_file({**tensors, name: kept[:, 1:].contiguous()}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="of shape"):
        AutoModelForImageClassification.from_pretrained(saved)
