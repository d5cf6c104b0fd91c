"""Parents and modules as transformers models: pipelines, processors, Auto classes, fine-tuning."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, fresh, generated, image_processor, image_samples, parent_of, randomize_relevance, tokenizer
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nemo_hf import NeMoForImageClassification, NeMoForSequenceClassification, make_parent
from nemo_hf.neurons.trial_inputs import random_inputs


def test_a_pipeline_runs_on_a_saved_image_module_with_nothing_else_given(tmp_path):
    parent = parent_of("vit")
    parent.attach_processor(image_processor())
    parent.extract_module(["frog", "cat"]).save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(tmp_path))(picture)
    assert {answer["label"] for answer in answers} == {"frog", "cat"}
    with torch.no_grad():
        module = AutoModelForImageClassification.from_pretrained(tmp_path)
        logits = module(image_processor()(picture.convert("RGB"), return_tensors="pt")["pixel_values"]).logits[0]
    scores = dict(zip(["frog", "cat"], logits.softmax(-1).tolist(), strict=True))
    assert {a["label"]: pytest.approx(a["score"], abs=1e-5) for a in answers} == scores


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_processor_and_report_are_saved_restored_and_saved_alike(family, tmp_path):
    parent = parent_of(family)
    parent.attach_processor(image_processor() if family == "vit" else tokenizer())
    parent.report = {"metrics": {"eval_accuracy": 0.5}}
    parent.save_pretrained(tmp_path / "one")
    kind = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = kind.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "report.json" in files
    assert set(parent.processor_files) < set(files)
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in files)


class OddTokenizer:
    """Writes files of other names than most."""

    names = ("bpe.codes", "byte_maps.json", "dict.txt", "prophetnet.tokenizer", "spm_char.model")

    def save_pretrained(self, directory):
        Path(directory, "folder").mkdir()
        for name in self.names:
            Path(directory, name).write_bytes(name.encode())


def test_files_of_any_processor_come_back(tmp_path):
    parent = parent_of("vit")
    parent.save_pretrained(tmp_path / "none")
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    assert (config["processor_files"], config["dtype"], config["model_type"]) == (None, "float32", "nemo_hf")
    assert {file.suffix for file in (tmp_path / "none").iterdir()} == {".json", ".safetensors"}
    from_config = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path / "none"))
    assert type(from_config) is NeMoForImageClassification
    parent.attach_processor(OddTokenizer())
    parent.save_pretrained(tmp_path / "parent")
    expected = {name: name.encode() for name in OddTokenizer.names}
    for options in ({}, {"labels": [0, 1]}):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "parent", **options)
        assert loaded.processor_files == expected
        loaded.save_pretrained(tmp_path / "again")
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").processor_files == expected


def test_loading_as_another_dtype_keeps_the_relevance(tmp_path):
    parent = parent_of("vit")
    parent.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    expected = parent.masks.relevance()
    assert all(torch.equal(relevance, expected[key]) for key, relevance in loaded.masks.relevance().items())


def test_eager_attention_can_be_asked_for(tmp_path):
    before = fresh("vit").config._attn_implementation
    parent = parent_of("vit")
    assert parent.model.config._attn_implementation == before is not None
    parent.save_pretrained(tmp_path)
    eager = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = random_inputs(parent)
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True)
        assert torch.allclose(outputs.logits, parent(**inputs).logits, atol=1e-5)
    assert len(outputs.attentions) == 2


def test_outputs_are_those_of_transformers():
    parent = parent_of("vit")
    inputs = random_inputs(parent)
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        output = parent(**inputs, labels=labels)
        as_tuple = parent(**inputs, labels=labels, return_dict=False)
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert list(output) == ["loss", "logits"]
    assert [value.shape for value in as_tuple] == [torch.Size([]), torch.Size([4, 5])]
    assert parent.train()(**inputs).neuron_masks.keys() == {site.key for site in parent.sites}


def test_a_module_fine_tunes_under_a_plain_trainer(tmp_path):
    module = parent_of("vit").extract_module([0, 1, 2])
    data = [sample for sample in image_samples(40) if sample["labels"] < 3]
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    options = {"max_steps": 12, "learning_rate": 3e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), logging_steps=1, **options)
    trainer = Trainer(module, arguments, train_dataset=data, eval_dataset=data)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    assert sum(not torch.equal(before[name], p) for name, p in module.named_parameters()) > len(before) / 2
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned.model.classifier.weight, module.model.classifier.weight)


def test_the_share_of_dead_neurons_is_that_of_neurons_no_group_opens():
    parent = parent_of("vit")
    masks = list(parent.masks.site_masks())
    for mask in masks:
        mask.relevance.fill_(1)
    masks[0].relevance[:, :7] = 0
    masks[1].relevance[0] = 0
    assert parent.masks.dead_share() == pytest.approx(7 / sum(mask.site.neurons for mask in masks))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64])
def test_a_cut_is_verified_before_it_is_converted(tmp_path, dtype):
    parent = parent_of("vit")
    parent.save_pretrained(tmp_path)
    options = {"labels": ["cat", "dog"], "verify": True}
    trusted = NeMoForImageClassification.from_pretrained(tmp_path, labels=["cat", "dog"])
    assert trusted.config.equivalence["source"] == "parent"
    expected = NeMoForImageClassification.from_pretrained(tmp_path, **options)
    assert "source" not in expected.config.equivalence
    module = NeMoForImageClassification.from_pretrained(tmp_path, dtype=dtype, **options)
    assert str(module.dtype).endswith(str(dtype).removeprefix("torch."))
    assert module.config.equivalence["status"] == expected.config.equivalence["status"] == "verified"
    assert all(torch.equal(p, expected.get_parameter(n).to(p.dtype)) for n, p in module.named_parameters())


def test_a_parent_in_half_precision_whose_cut_scales_weights_is_cut_exactly(tmp_path):
    """MPNet computes its softmax scale from the width of a head: cut heads take the ratio into q."""
    torch.manual_seed(0)
    plain = MPNetForSequenceClassification(MPNetConfig(**TEXT))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    parent = make_parent(plain.to(torch.bfloat16), generated()).eval()
    randomize_relevance(parent)
    assert any("rescaled" in site.pruning_mode for site in parent.sites)
    module = parent.extract_module(["cat", "dog"])
    assert (module.dtype, module.config.equivalence["status"]) == (torch.bfloat16, "verified")
    parent.save_pretrained(tmp_path)
    loaded = NeMoForSequenceClassification.from_pretrained(tmp_path, labels=["cat", "dog"], verify=True)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in module.named_parameters())


def test_options_of_a_cut_and_labels_go_together(tmp_path):
    parent_of("vit").save_pretrained(tmp_path)
    for options in ({"threshold": 0.9}, {"round_to": 8}, {"verify": True}):
        with pytest.raises(ValueError, match=r"without labels; expected labels.* Pass labels="):
            NeMoForImageClassification.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="device_map"):
        AutoModelForImageClassification.from_pretrained(tmp_path, labels=[0, 1], device_map="auto")
