"""Refining a module: the source's answers among the module's labels, learned on calibration samples."""

import copy
import random
import tempfile
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import fresh, generated, image_samples, logits_of, parent_of, randomize, text_samples, tiny
from torch.nn import functional as F
from training_helpers import arguments, assert_same_state, batch_of, check_message, state
from transformers import Trainer

from nemo_hf import make_parent
from nemo_hf.models.calibration import read_calibration
from nemo_hf.models.refine import ENERGY_WEIGHT, distillation_loss, refine_module

SAMPLES = {"vit": image_samples, "bert": text_samples, "gpt2": text_samples}
QUIET = {"show_progress": False}


def pieces(family, labels=(1, 3, 0), count=30, with_labels=True):
    """A plain model, a module of a parent with these weights and some noise, and calibration samples."""
    samples = SAMPLES[family](count)
    if not with_labels:
        samples = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    source, module = fresh(family), parent_of(family).extract_module(list(labels))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return source, module, read_calibration(source, samples, batch_size=8)


def loss_of(source, module, calibration):
    """Divergence of the module's answers from the source's, and the cross-entropy of labels, as a naive loop."""
    found = []
    with torch.no_grad():
        for inputs, labels in calibration:
            wanted, logits = source(**inputs).logits[:, module.config.label_ids], module(**inputs).logits
            for row in range(len(logits)):
                shares = wanted[row].softmax(-1)
                loss = (shares * (shares.log() - logits[row].log_softmax(-1))).sum()
                if labels is not None:
                    if labels[row] not in module.config.label_ids:
                        continue
                    loss -= logits[row].log_softmax(-1)[module.config.label_ids.index(labels[row])]
                found.append(loss)
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("family", SAMPLES)
@pytest.mark.parametrize(("with_labels", "share"), [(False, 0.7), (True, 0.96)])  # labels contradict random answers
def test_a_module_comes_nearer_to_its_source_which_stays_as_it_is(family, with_labels, share):
    source, module, calibration = pieces(family, with_labels=with_labels)
    before, first = state(source), loss_of(source, module, calibration)
    source.train()
    refine_module(source, module, calibration, 6, 2e-3, batch_size=8, **QUIET)
    assert source.training
    source.eval()
    assert loss_of(source, module, calibration) < share * first
    assert_same_state(state(source), before, rtol=0, atol=0)
    assert all(parameter.grad is None for model in (source, module) for parameter in model.parameters())
    assert not any(layer.training for layer in module.modules())
    assert (module.config.is_tuned, module.config.equivalence) == (True, None)


def test_batch_norms_keep_their_statistics():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    source = make_parent(randomize(tiny("ResNetForImageClassification", **sizes)), generated()).eval()
    module = source.extract_module([0, 1])
    before = state(module)
    refine_module(source, module, read_calibration(source, image_samples(30)), 2, 1e-2, **QUIET)
    after, norms = state(module), ("running_mean", "running_var", "num_batches_tracked")
    assert any(name.endswith("running_mean") for name in after)
    for name, tensor in after.items():
        if name.endswith(norms):
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_the_same_seed_gives_the_same_module_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refined = []
    for seed in (0, 0, 1):
        source, module, calibration = pieces("bert", count=10)
        torch.manual_seed(len(refined))
        random.seed(5)
        expected = torch.rand(3), random.Random(5).random()
        torch.manual_seed(len(refined))
        refine_module(source, module, calibration, 1, seed=seed, **QUIET)
        assert torch.equal(torch.rand(3), expected[0])
        assert random.random() == expected[1]
        refined.append(state(module))
    assert_same_state(refined[0], refined[1], rtol=0, atol=0)
    assert any(not torch.equal(refined[0][name], tensor) for name, tensor in refined[2].items())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_is_what_a_plain_trainer_with_this_loss_does(tmp_path):
    source, module, _ = pieces("vit")
    samples = [s for s in image_samples(30) if s["labels"] in module.config.label_ids]
    with torch.no_grad():
        answers = source(batch_of(samples)["pixel_values"]).logits[:, module.config.label_ids]
    places = {label: place for place, label in enumerate(module.config.label_ids)}
    data = [
        {"pixel_values": s["pixel_values"], "labels": places[s["labels"]], "answers": own}
        for s, own in zip(samples, answers, strict=True)
    ]

    class Distilled(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            answers = inputs.pop("answers")
            wanted = answers.softmax(-1)
            logits = model(inputs["pixel_values"]).logits
            energies = F.smooth_l1_loss(logits.logsumexp(-1), answers.logsumexp(-1))
            divergence = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean()
            return divergence + ENERGY_WEIGHT * energies + F.cross_entropy(logits, inputs["labels"])

    expected, options = copy.deepcopy(module), {"num_train_epochs": 2, "max_steps": -1, "lr_scheduler_type": "cosine"}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "optim": "adamw_torch"}
    Distilled(expected, arguments(tmp_path, seed=3, remove_unused_columns=False, **options), train_dataset=data).train()
    only_own = read_calibration(source, samples, batch_size=8)
    refine_module(source, module, only_own, 2, 1e-3, batch_size=4, seed=3, **QUIET)
    pixels = batch_of(samples)["pixel_values"]
    torch.testing.assert_close(logits_of(module, pixel_values=pixels), logits_of(expected.eval(), pixel_values=pixels))


def test_a_text_counts_the_same_however_much_it_is_padded():
    source, module, calibration = pieces("bert", count=10)
    widened = [({name: F.pad(value, (0, 5)) for name, value in inputs.items()}, own) for inputs, own in calibration]
    other, (inputs, _) = copy.deepcopy(module), next(iter(calibration))
    refine_module(source, module, calibration, 1, **QUIET)
    refine_module(source, other, widened, 1, **QUIET)
    torch.testing.assert_close(logits_of(module, **inputs), logits_of(other, **inputs))


def test_a_model_without_padding_token_trains_on_one_text_at_a_time():
    source, module, _ = pieces("gpt2")
    source.config.pad_token_id = module.config.base_config.pad_token_id = None
    calibration = read_calibration(source, text_samples(6))
    first = loss_of(source, module, calibration)
    refine_module(source, module, calibration, 3, batch_size=3, **QUIET)
    assert loss_of(source, module, calibration) < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_in_half_precision_trains_in_float32_and_keeps_its_own(dtype):
    source, module, calibration = pieces("bert", count=8)
    exact = copy.deepcopy(module)
    module.to(dtype)
    exact.to(dtype).float()
    refine_module(source.to(dtype), module, calibration, 1, **QUIET)
    refine_module(source, exact, calibration, 1, **QUIET)
    assert module.dtype == dtype
    assert_same_state(state(module), state(exact.to(dtype)), rtol=0, atol=0)


def test_several_labels_a_sample_and_modules_of_one_label_learn_too():
    source, calibration = fresh("bert"), None
    source.config.problem_type = "multi_label_classification"
    samples = [{**s, "labels": F.one_hot(torch.tensor(s["labels"]), 5).float()} for s in text_samples(20)]
    calibration = read_calibration(source, samples)
    module = make_parent(copy.deepcopy(source), generated()).eval().extract_module([1, 3])
    randomize(module)
    inputs, _ = next(iter(calibration))

    def distance(labels):
        with torch.no_grad():
            difference = module(**inputs).logits.sigmoid() - source(**inputs).logits[:, labels].sigmoid()
        return difference.abs().mean().item()

    first = distance([1, 3])
    refine_module(source, module, [(x, None) for x, _ in calibration], 10, 3e-3, batch_size=5, **QUIET)
    assert distance([1, 3]) < 0.7 * first
    refine_module(source, module, calibration, 1, **QUIET)  # with labels
    source, module, _ = pieces("vit", [2])
    single = read_calibration(source, [{"pixel_values": s["pixel_values"]} for s in image_samples(20)])
    inputs, _ = next(iter(single))
    first = F.mse_loss(module(**inputs).logits, source(**inputs).logits[:, [2]]).item()
    refine_module(source, module, single, 10, 1e-3, batch_size=5, **QUIET)
    assert F.mse_loss(module(**inputs).logits, source(**inputs).logits[:, [2]]).item() < 0.7 * first


def test_the_loss_is_that_of_a_naive_loop_over_samples_tokens_and_pixels():
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float32)

    def naive(pairs):
        divergences, distances, tasks = [], [], []
        for own, wanted, label, is_own in pairs:
            chances = wanted.softmax(-1)
            divergences += [(chances * (chances.log() - own.log_softmax(-1))).sum()] if is_own else []
            distance = (own.logsumexp(-1) - wanted.logsumexp(-1)).abs()
            distances.append(distance - 0.5 if distance > 1 else distance.square() / 2)
            tasks += [-own.log_softmax(-1)[label]] if label >= 0 else []
        terms = [torch.stack(terms).mean() if terms else 0 for terms in (divergences, distances, tasks)]
        return terms[0] + ENERGY_WEIGHT * terms[1] + terms[2]

    labels = torch.tensor([[0, -100, 2], [1, 2, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    (logits, answers), own = draw(2, 2, 3, 4), torch.tensor([True, False])
    tokens = [(i, j) for i in range(2) for j in range(3) if mask[i, j]]
    pairs = [(logits[i, j], answers[i, j], labels[i, j], own[i]) for i, j in tokens]
    torch.testing.assert_close(distillation_loss(logits, answers, own, labels, False, mask), naive(pairs))
    logits, answers, labels = logits[:, 0], answers[:, 0], labels[:, 1]
    pairs = list(zip(logits, answers, labels, own, strict=True))
    torch.testing.assert_close(distillation_loss(logits, answers, own, labels, False, mask), naive(pairs))
    images, wanted = draw(2, 2, 4, 3, 3)
    pixels = [(images[i, :, j, k], wanted[i, :, j, k], -1, True) for i in range(2) for j in range(3) for k in range(3)]
    torch.testing.assert_close(distillation_loss(images, wanted, own | True, None, False), naive(pixels))


def test_another_trainer_of_the_process_goes_on(tmp_path, vit):
    trainer = Trainer(vit, arguments(tmp_path, bf16=True), train_dataset=image_samples(20))
    source, module, calibration = pieces("bert")
    before = dict(AcceleratorState._shared_state)
    refine_module(source, module, calibration, 1, **QUIET)
    assert dict(AcceleratorState._shared_state) == before
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"calibration": []}, "no calibration samples"),
        ({"module": parent_of("bert")}, "Got a parent"),
    ],
)
def test_bad_arguments_are_refused(change, error):
    source, module, calibration = pieces("bert", count=4)
    given = {"module": module, "calibration": calibration, "epochs": 1, **change}
    with pytest.raises(ValueError, match=error) as raised:
        refine_module(source, **given, **QUIET)
    check_message(raised)


def test_no_epochs_change_nothing():
    source, module, calibration = pieces("bert", count=4)
    before = state(module)
    refine_module(source, module, calibration, 0, **QUIET)
    assert_same_state(state(module), before, rtol=0, atol=0)
    assert module.config.equivalence is not None


def test_gradient_checkpointing_of_the_source_stays_on():
    source, module, calibration = pieces("bert", count=4)
    other = copy.deepcopy(module)
    refine_module(source, module, calibration, 1, **QUIET)
    source.activation_checkpointing_enable()
    refine_module(source, other, calibration, 1, **QUIET)
    assert source.is_activation_checkpointing
    assert_same_state(state(module), state(other), rtol=0, atol=0)
