"""Data that a cut has not seen: what validation samples measure and calibrate, and what a module is compared with."""

import copy
import json

import pytest
import torch
from conftest import LABELS, build, fresh, generated, image_samples, logits_of, parent_of, text_samples, tiny, tokenizer
from cutting_helpers import batches_for, batches_of, cut, words
from place_helpers import IDS, plain_model, run
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from training_helpers import batch_of
from transformers import PreTrainedTokenizerFast, pipeline

import nemo_hf
from nemo_hf import NeMoForSequenceClassification, compose, evaluate_module, extract_module, make_parent
from nemo_hf.models.rejection_calibration import calibrate_rejection

CHOSEN = [3, 1]
VALIDATION = text_samples(40, seed=5)


def labelled(samples, size=8):
    return [batch_of(samples[start : start + size]) for start in range(0, len(samples), size)]


def naive_accuracy(model, columns):
    own = [sample for sample in VALIDATION if sample["labels"] in CHOSEN]
    logits = torch.cat([logits_of(model, **batch)[:, columns] for batch in batches_of(own)])
    return (logits.argmax(-1) == torch.tensor([CHOSEN.index(sample["labels"]) for sample in own])).double().mean()


@pytest.mark.parametrize("options", [{}, {"max_loss": 50}, {"vocabulary": "shared", "processing_class": tokenizer()}])
def test_validation_samples_measure_each_module(options, tmp_path):
    model, retention = fresh("bert"), None if "max_loss" in options else [0.6, 0.3]
    found = cut(model, batches_for("bert"), retention, CHOSEN, validation=VALIDATION, **options)
    for module in found if retention else [found]:
        measured = module.config.extraction["validation"]
        assert measured["samples"] == 16
        assert measured["source_accuracy"] == pytest.approx(naive_accuracy(model, CHOSEN))
        assert measured["accuracy"] == pytest.approx(naive_accuracy(module, [0, 1]))
        module.save_pretrained(tmp_path)
        assert NeMoForSequenceClassification.from_pretrained(tmp_path).config.extraction == module.config.extraction


def test_validation_samples_are_not_cut_on():
    model, batches = fresh("bert"), batches_for("bert")
    one, other = (cut(model, batches, validation=given) for given in (None, batches_for("bert", 20, seed=7)))
    assert other.config.extraction["validation"] == {"samples": 20}  # without labels
    assert "validation" not in one.config.extraction
    assert torch.equal(logits_of(one, **batches[0]), logits_of(other, **batches[0]))


def test_a_smaller_vocabulary_is_measured_in_its_own_tokens():
    samples, held_out = words(20), [{"text": "w12 w99 w35", "label": "dog"}, {"text": "w75 w14", "label": "ship"}]
    options = {"processing_class": tokenizer(), "validation": held_out, "reconstruct": False, "rejection": False}
    module = extract_module(
        fresh("bert"), ["dog", "ship"], samples, 1.0, vocabulary="calibration", show_progress=False, **options
    )
    done = module.config.extraction
    seen = {word for sample in samples if sample["label"] in CHOSEN for word in sample["text"].split()}
    texts = [sample["text"] for sample in held_out]
    unseen = [word not in seen for text in texts for word in text.split()]
    assert done["vocabulary"]["unseen_share"] == pytest.approx(sum(unseen) / 5)
    classify = pipeline("text-classification", model=module, tokenizer=nemo_hf_tokenizer(module))
    right = [answer["label"] == sample["label"] for answer, sample in zip(classify(texts), held_out, strict=True)]
    assert done["validation"]["accuracy"] == sum(right) / 2


def pair_tokenizer():
    own = tokenizer().backend_tokenizer
    own.post_processor = TemplateProcessing(
        single="w98 $A w99", pair="w98 $A w99 $B:1 w99:1", special_tokens=[("w98", 100), ("w99", 101)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "w98", "sep_token": "w99"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=inputs, **names)


def test_pairs_of_texts_stay_pairs_in_a_smaller_vocabulary():
    model, own = fresh("bert"), pair_tokenizer()
    words_of = torch.randint(2, 60, (120, 5), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [(f"w{a} none w{b}", f"w{c} w{d} w{e}") for a, b, c, d, e in words_of]
    samples = [dict(own(*pair)) for pair in parts]
    logits = torch.cat([logits_of(model, **{k: torch.tensor([v]) for k, v in each.items()}) for each in samples])
    chosen = logits.sum(0).topk(2).indices.tolist()
    labels = [chosen[place] for place in logits[:, chosen].argmax(-1)]
    data = [{**each, "labels": label} for each, label in zip(samples, labels, strict=True)]
    module = extract_module(
        model, chosen, data, 1.0, processing_class=own, validation=data, vocabulary="calibration", show_progress=False
    )
    assert module.config.extraction["validation"] == {"samples": 120, "accuracy": 1, "source_accuracy": 1}


def test_labels_of_tokens_measure_no_module_that_has_other_tokens():
    source, samples = plain_model("bert").eval(), batches_of(text_samples(40))
    labelled = [{**batch, "labels": torch.tensor(IDS)[run(source, **batch).logits[..., IDS].argmax(-1)]}
                for batch in samples]  # fmt: skip
    for vocabulary, expected in (("shared", {"accuracy": 1, "source_accuracy": 1}), ("calibration", {})):
        module = extract_module(
            source, IDS, samples, 1.0, processing_class=tokenizer(), validation=labelled, vocabulary=vocabulary,
            show_progress=False,
        )  # fmt: skip
        assert module.config.extraction["validation"] == {"samples": 40, **expected}


def nemo_hf_tokenizer(module):
    return nemo_hf.models.processors.own_processor(module, "text")


@pytest.mark.parametrize(
    "wrong",
    [{"vocabulary": {"unseen_share": "much"}}, {"vocabulary": {"tokens": [3]}}, {"vocabulary": 3},
     {"validation": {"accuracy": None}}, {"validation": {"accuracy\n# BUY": 1}}, {"validation": [0.5]}],
)  # fmt: skip
def test_other_reports_of_a_cut_are_refused(wrong, tmp_path):
    cut(fresh("bert"), batches_for("bert"), validation=VALIDATION).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["extraction"] |= wrong
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="extraction"):
        NeMoForSequenceClassification.from_pretrained(tmp_path)


def test_rejection_is_calibrated_on_validation_samples():
    model = fresh("bert")
    calibration, validation = ([s for s in text_samples(60, seed) if s["labels"] != 4] for seed in (0, 5))  # half own
    options = {"labels": CHOSEN, "calibration": labelled(calibration), "retention": 0.4, "show_progress": False}
    before, module = (extract_module(model, **options, validation=given) for given in (None, labelled(validation)))
    again = copy.deepcopy(module)
    calibrate_rejection(again, labelled(validation), show_progress=False)
    assert module.config.rejection == pytest.approx(again.config.rejection, rel=1e-4)
    assert module.config.rejection["accepted"] < before.config.rejection["accepted"] == 1  # known samples: more caution
    own = [sample for sample in validation if sample["labels"] in CHOSEN]
    alone = extract_module(model, **options, validation=labelled(own))
    others = [sample for sample in calibration if sample["labels"] not in CHOSEN]
    calibrate_rejection(again, labelled([*own, *others]), show_progress=False)
    assert alone.config.rejection == pytest.approx(again.config.rejection, rel=1e-4)
    unlabelled = extract_module(model, **options, validation=batches_of(own))
    assert unlabelled.config.rejection == pytest.approx(before.config.rejection, rel=1e-4)


def test_a_retention_that_no_cut_reaches_is_said(caplog):
    module = cut(fresh("llama"), batches_for("llama"), 0.005)
    kept = module.config.extraction["weights"]
    assert f"keeps {kept:.3g} of the weights in place of 0.005" in caplog.text
    caplog.clear()
    cut(fresh("llama"), batches_for("llama"), 1.01 * kept)
    assert "in place of" not in caplog.text


def test_the_second_argument_is_the_same_everywhere():
    parent, batches = parent_of("bert"), batches_for("bert")
    expected = extract_module(parent, CHOSEN, batches, 0.5, show_progress=False)
    module = parent.extract_module(CHOSEN, batches, 0.5, show_progress=False)
    assert torch.equal(logits_of(module, **batches[0]), logits_of(expected, **batches[0]))
    with pytest.raises(TypeError, match="Got a float as calibration"):
        parent.extract_module(CHOSEN, 0.5)


@pytest.mark.parametrize("kind", ["plain", "parent"])
def test_modules_cut_on_samples_are_evaluated(kind):
    source, samples = fresh("vit"), image_samples(40, seed=3)
    groups = {"pets": ["cat", "dog"], "rest": LABELS[2:]}
    cut_from = source if kind == "plain" else make_parent(fresh("vit"), generated(), label_groups=groups)
    named = {"label_groups": groups} if kind == "plain" else {}
    module = extract_module(cut_from, "pets", image_samples(), 0.4, show_progress=False, **named)
    report = evaluate_module(cut_from, "pets", DataLoader(samples, batch_size=15), module, show_progress=False)
    assert module.report == report.to_dict()
    own = [sample for sample in samples if sample["labels"] in (0, 1)]
    pixels, labels = torch.stack([s["pixel_values"] for s in own]), torch.tensor([s["labels"] for s in own])
    for model, accuracy in ((module, report.accuracy), (source, report.parent_restricted_accuracy)):
        right = logits_of(model, pixel_values=pixels)[:, :2].argmax(-1) == labels
        assert accuracy == pytest.approx(right.double().mean().item())
    assert report.controls["random"] is report.controls["other"] is None
    assert 0 <= report.controls["empty"] <= 1
    assert report.parent_parameters == source.num_parameters() > report.parameters
    assert report.neuron_retention_rate == module.config.extraction["neurons"]
    assert not hasattr(source, "masks")
    strangers = [(fresh("deit"), "module of this parent"), (source, "Got a ViT.* without module")]
    for other, message in strangers:
        with pytest.raises(ValueError, match=message):
            evaluate_module(other, LABELS[:2], [], None if other is source else module, show_progress=False)


@pytest.mark.parametrize("seed", [0, 1])
def test_only_modules_of_several_sources_need_calibration(seed, caplog):
    modules = [cut(build("vit", each), batches_for("vit"), labels=own) for each, own in ((0, [0, 1]), (seed, [2, 3]))]
    compose(modules)
    assert ("to calibrate them" in caplog.text) == (seed == 1)


SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": 1}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "eos_token_id": 2,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1}  # fmt: skip
LONGEST = {  # class: tokens, and how many of padding one may add
    "BertForSequenceClassification": (24, 0),
    "RobertaForSequenceClassification": (22, 9),
    "DebertaV2ForSequenceClassification": (24, 0),
    "LlamaForSequenceClassification": (99, 0),
}


def inputs_of(tokens, padding=0):
    ids = torch.full((2, tokens + padding), 5)
    ids[:, tokens:] = 1
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


@pytest.mark.parametrize("class_name", LONGEST)
def test_inputs_over_the_positions_are_refused_and_others_run(class_name):
    longest, padding = LONGEST[class_name]
    more = {"num_key_value_heads": 2} if class_name.startswith("Llama") else {}
    plain = tiny(class_name, **SIZES, **more)
    model = make_parent(plain, generated())
    module = model.extract_module([0, 1])
    for each in (model, module):
        assert logits_of(each, **inputs_of(longest, padding)).isfinite().all()
        if longest > 24:
            continue
        with pytest.raises(ValueError, match=rf"Got an input of {longest + 1} tokens; expected at most {longest}"):
            each(**inputs_of(longest + 1))
    if longest <= 24:
        with pytest.raises(ValueError, match=f"truncation=True, max_length={longest}"):
            extract_module(tiny(class_name, **SIZES), [0], [inputs_of(longest + 1)], 0.5, show_progress=False)


def test_embeddings_and_positions_may_be_given():
    module = parent_of("bert").extract_module([0, 1])
    embedded = module.get_input_embeddings()(torch.full((2, 41), 5))
    with pytest.raises(ValueError, match="Got an input of 41 tokens; expected at most 40"):
        module(inputs_embeds=embedded)
    assert torch.equal(logits_of(module, inputs_embeds=embedded[:, :40]), logits_of(module, **inputs_of(40)))


def test_the_advice_for_long_texts_works(tmp_path):
    module = extract_module(
        fresh("bert"), ["dog", "ship"], words(), 0.5, processing_class=tokenizer(), max_positions=20,
        show_progress=False,
    )  # fmt: skip
    module.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    with pytest.raises(ValueError, match=r"Got an input of 30 tokens; expected at most 20.*truncation=True"):
        classify("w12 " * 30)
    assert classify("w12 " * 30, truncation=True, max_length=20) == classify("w12 " * 20)


def test_a_compiled_graph_has_no_check_of_lengths():
    module = parent_of("bert").extract_module([0, 1])
    exported = torch.export.export(module, (), inputs_of(12), strict=False).module()
    torch.testing.assert_close(exported(**inputs_of(12)).logits, logits_of(module, **inputs_of(12)))
