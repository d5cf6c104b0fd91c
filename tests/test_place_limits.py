"""Losses of modules that label tokens and pixels, and what is refused for labels of tokens, pixels and boxes."""

import logging

import pytest
import torch
from conftest import LABELS, generated, tiny
from datasets import Dataset
from place_helpers import CHOSEN, MODELS, inputs_of, module_of, parent_of, plain_model, run
from training_helpers import arguments, history
from transformers import OwlViTConfig, OwlViTForObjectDetection, Trainer

from nemo_hf import (
    NeMoConfig,
    NeMoTrainer,
    UnsupportedArchitectureError,
    calibrate_rejection,
    compose,
    compute_relevance,
    evaluate_module,
    make_parent,
)
from nemo_hf.auto_classes import AUTO_CLASSES
from nemo_hf.cli import main
from nemo_hf.evaluation.latency import count_macs
from nemo_hf.hub.model_card import render_model_card
from nemo_hf.hub.publish import CardOptions, card_facts


def labels_of(logits, ignored, seed=0):
    """Ids of the module's labels, a few of them those that count nowhere."""
    shape = (logits.shape[0], logits.shape[1]) if logits.ndim == 3 else (logits.shape[0], 20, 20)
    ids = torch.randint(0, len(CHOSEN), shape, generator=torch.Generator().manual_seed(seed))
    ids[:, -3:] = ignored
    return ids


def test_the_loss_of_tokens_is_that_of_the_module_s_labels():
    module, inputs = module_of("bert"), inputs_of("bert")
    logits = run(module, **inputs).logits
    labels = labels_of(logits, -100)
    chances = logits.log_softmax(-1)[:, :-3].gather(-1, labels[:, :-3, None])
    assert run(module, **inputs, labels=labels).loss.item() == pytest.approx(-chances.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["segformer", "beit"])
def test_the_loss_of_pixels_is_that_of_the_plain_model(name, tmp_path):
    module, inputs = module_of(name), inputs_of(name)
    labels = labels_of(run(module, **inputs).logits, 255)
    labels = labels[:, :16, :16] if name == "beit" else labels
    module.save_plain(tmp_path, inputs=inputs)
    plain = type(module.model).from_pretrained(tmp_path)
    assert run(module, **inputs, labels=labels).loss.item() == pytest.approx(
        run(plain, **inputs, labels=labels).loss.item(), rel=1e-5
    )


def test_a_plain_trainer_tunes_a_module_of_tokens(tmp_path):
    module, inputs = module_of("bert"), inputs_of("bert")
    labels = labels_of(run(module, **inputs).logits, -100)
    data = Dataset.from_dict({**{name: values.tolist() for name, values in inputs.items()}, "labels": labels.tolist()})
    trainer = Trainer(module, arguments(tmp_path, max_steps=4, learning_rate=3e-3), train_dataset=data)
    trainer.train()
    losses = history(trainer)
    assert losses[-1] < losses[0]
    module.save_pretrained(tmp_path)
    assert module.config.is_tuned
    assert trainer.predict(data).predictions.shape == (3, 12, 3)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("bert", torch.full((3, 12), 3), "Got the label 3 for a module of 3 labels; expected ids from 0 to 2.*or -100"),
        ("segformer", torch.full((3, 32, 32), -100), "Got the label -100 for a module.*or 255, which counts nowhere"),
        ("segformer", torch.zeros(3, 32, 32), "Got numbers of type torch.float32"),
        ("detr", [{"class_labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}] * 3, "Train the plain model before"),
    ],
)
def test_labels_of_the_source_are_refused_by_a_module(name, labels, message):
    with pytest.raises(ValueError, match=message):
        module_of(name)(**inputs_of(name), labels=labels)
    one = parent_of(name).extract_module("cat", inputs=inputs_of(name))
    if name != "detr":
        assert run(one, **inputs_of(name)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "segformer", "detr"])
def test_masks_of_whole_samples_are_refused(name, tmp_path):
    model = plain_model(name)
    data = [{"labels": torch.zeros(4, dtype=torch.long), "input_ids": torch.ones(4, dtype=torch.long)}] * 2
    for attach in (
        lambda: make_parent(model, generated()),
        lambda: make_parent(model, generated(objective="moda")),
        lambda: NeMoTrainer(model, arguments(tmp_path), train_dataset=data),
    ):
        with pytest.raises(ValueError, match=rf"Got a {MODELS[name][0]} to train with masks.*with transformers"):
            attach()
    assert make_parent(model, NeMoConfig(masks="static"), inputs=inputs_of(name)).is_parent  # as the message says


@pytest.mark.parametrize("name", ["bert", "detr"])
def test_parents_of_static_masks_are_not_trained(name, tmp_path):
    with pytest.raises(ValueError, match=r"Got masks='static', of which none is trained.*transformers\.Trainer"):
        NeMoTrainer(parent_of(name), arguments(tmp_path), train_dataset=[{"labels": 0}] * 2)


@pytest.mark.parametrize("name", ["bert", "segformer", "yolos"])
def test_answers_at_many_places_are_not_counted_as_one(name):
    parent, module, inputs = parent_of(name), module_of(name), inputs_of(name)
    batches = [{**inputs, "labels": torch.zeros(3, dtype=torch.long)}]
    for count in (
        lambda: evaluate_module(parent, CHOSEN, batches, show_progress=False),
        lambda: calibrate_rejection(module, batches, show_progress=False),
        lambda: compute_relevance(parent, batches, show_progress=False),
        lambda: compose([module, module]),
    ):
        with pytest.raises(ValueError, match=rf"Got a model for {module.task}, where one answer a sample is counted"):
            count()
    assert 0 < count_macs(module) < count_macs(parent)


def parent_of_names():
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    model = tiny("BertForTokenClassification", **MODELS["bert"][1])
    model.config.id2label = dict(enumerate(labels))
    return make_parent(model, NeMoConfig(masks="static"))


def test_a_module_that_can_not_say_no_is_warned_of(caplog):
    parent = parent_of_names()
    with caplog.at_level(logging.WARNING):
        parent.extract_module(["B-PER", "I-PER"])
        assert "gives each token one of its labels. Add it: labels=['O', 'B-PER', 'I-PER']." in caplog.text
        caplog.clear()
        parent.extract_module(["O", "B-PER", "I-PER"])
        parent_of("yolos").extract_module(CHOSEN)  # detectors always say "no object", or give low scores
        assert "one of its labels" not in caplog.text
        parent_of("segformer").extract_module(["cat", "dog"])
        assert "gives each pixel one of its labels. Look at the scores" in caplog.text


def test_a_head_that_is_no_layer_over_labels_is_refused():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = OwlViTConfig(
        text_config={**text, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**text, "image_size": 16, "patch_size": 8},
        id2label=dict(enumerate(LABELS)),
    )
    with pytest.raises(UnsupportedArchitectureError, match="without a linear head of 5 outputs"):
        make_parent(OwlViTForObjectDetection(config), NeMoConfig(masks="static"))
    stages = {"two_stage": True, "with_box_refine": True}
    with pytest.raises(UnsupportedArchitectureError, match="two_stage=True, whose heads over all labels also choose"):
        make_parent(plain_model("deformable-detr", **stages), NeMoConfig(masks="static"))


@pytest.mark.parametrize("name", ["bert", "yolos"])
def test_inspect_takes_the_class_that_was_saved(name, capsys, tmp_path):
    plain_model(name).save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert f"{MODELS[name][0]}:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "segformer", "yolos"])
def test_the_card_names_the_task_and_the_auto_class(name):
    parent, module = parent_of(name), module_of(name)
    cards = [render_model_card(card_facts(model, "me/it", CardOptions(), None)) for model in (parent, module)]
    assert all(f"pipeline_tag: {module.task}" in card for card in cards)
    assert all(f"pipeline('{module.task}', model='me/it')" in card for card in cards)
    assert f"{AUTO_CLASSES[module.task].__name__}.from_pretrained('me/it', labels=labels)" in cards[0]
