"""Architectures of unknown layer names: sites that a user describes or that are proposed, and their classes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    LABELS,
    NAMES,
    example_script,
    fresh,
    generated,
    hooks_of,
    image_samples,
    randomize,
    randomize_relevance,
    tiny,
)
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    TrainingArguments,
)

from nemo_hf import NeMoConfig, NeMoTrainer, make_parent, propose_sites
from nemo_hf.cli import main
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.neurons.user_sites import build_user_sites

LAYER = "vit.layers.*"
PROJECTIONS = {part: f"{LAYER}.attention.{part[0]}_proj" for part in ("query", "key", "value", "output")}
VIT_SITES = [
    {"kind": "attention", **PROJECTIONS, "heads": 4},
    {"kind": "ffn", "producers": [f"{LAYER}.mlp.fc1"], "output": f"{LAYER}.mlp.fc2"},
]
ATTENTION, UNITS = VIT_SITES
ROWS_SITES = [
    {"kind": "attention", "query": "body.*.asks", "key": "body.*.offers", "value": "body.*.says",
     "output": "body.*.merge", "heads": 4},
    {"kind": "ffn", "producers": ["body.*.open", "body.*.carry"], "output": "body.*.back"},
]  # fmt: skip

custom = example_script("", "custom_model")  # registers its classes


def rows_model():
    """A model whose layers have names that no table lists."""
    return randomize(custom.RowsForImageClassification(custom.RowsConfig(blocks=2, image_size=16, **NAMES)), 0.3)


def test_described_sites_shape_the_masks(vit):
    parent = make_parent(vit, generated(sites=VIT_SITES))
    assert make_parent(fresh("vit"), generated(sites=VIT_SITES, targets=["attention"])).kinds == {"attention"}
    with pytest.raises(ValueError, match="no site of these targets"):
        make_parent(fresh("vit"), generated(sites=[UNITS], targets=["attention"]))
    known = {site.output: site for site in find_sites(vit)}
    assert {site.output: site.parts for site in parent.sites} == {path: site.parts for path, site in known.items()}
    stars = {"kind": "ffn", "producers": ["*.layers.*.mlp.fc1"], "output": "*.layers.*.mlp.fc2"}  # filled in order
    assert build_user_sites(vit, stars) == build_user_sites(vit, UNITS)
    with pytest.raises(ValueError, match="Got sites="):
        parent.set_nemo_config(generated())


def test_sites_are_proposed_for_layers_of_any_name_and_the_model_stays_as_it_is():
    model, state = rows_model().train(), torch.get_rng_state()
    assert propose_sites(model) == ROWS_SITES
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model) == 0
    assert all(map(torch.equal, model.parameters(), rows_model().parameters()))


def test_a_layer_under_two_names_is_proposed_once(bert):
    proposed = propose_sites(bert)
    bert.other_name = bert.bert.encoder
    assert propose_sites(bert) == proposed


@pytest.mark.parametrize("family", ["gpt2", "llama", "swin", "bloom"])
def test_proposals_agree_with_what_is_known_by_name(family):
    bloom = {"vocab_size": 120, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0}
    model = randomize(tiny("BloomForSequenceClassification", **bloom)) if family == "bloom" else fresh(family)
    proposed = [site for described in propose_sites(model) for site in build_user_sites(model, described)]
    known = {site.output: site for site in find_sites(model)}
    assert {site.output for site in proposed} == set(known)
    for site in proposed:
        assert {rows for rows, _ in site.produced()} == {rows for rows, _ in known[site.output].produced()}
        assert getattr(site, "heads", 0) == getattr(known[site.output], "heads", 0)


def test_an_unknown_architecture_trains_and_its_modules_are_exact(tmp_path):
    config = generated(sites=ROWS_SITES, relevance_threshold=0.6)
    args = TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True)
    samples = [{**sample, "pixel_values": sample["pixel_values"][:1]} for sample in image_samples(10)]
    trainer = NeMoTrainer(rows_model(), args, train_dataset=samples, nemo_config=config)
    parent = trainer.parent
    assert {site.kind: site.pruning_mode for site in parent.sites} == {"attention": "dense-heads-kept", "ffn": "dense"}
    trainer.train()
    randomize_relevance(parent.eval())
    module = parent.extract_module(["ship", "cat"])
    assert module.config.equivalence["status"] == "verified"
    trainer.save_model(str(tmp_path / "parent"))
    module.save_pretrained(tmp_path / "module")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
    cut = AutoModelForImageClassification.from_pretrained(tmp_path / "parent", labels=["ship", "cat"], verify=True)
    with torch.no_grad():
        got, *others = (model(**random_inputs(parent)).logits for model in (module, loaded, cut))
    assert all(torch.equal(other, got) for other in others)
    assert json.loads((tmp_path / "parent" / "config.json").read_text())["nemo_config"]["sites"] == ROWS_SITES


def test_a_model_of_remote_code_works_in_the_process_that_trusts_it(tmp_path):
    source = Path(custom.__file__).read_text()
    start, end = source.index("class RowsConfig"), source.index("AutoConfig.register")
    code = "import torch\nfrom torch import Tensor, nn\nfrom transformers import PreTrainedConfig, PreTrainedModel\n"
    code += "from transformers.modeling_outputs import ImageClassifierOutput\n" + source[start:end]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "rows.py").write_text(code)
    auto_map = {"AutoConfig": "rows.RowsConfig", "AutoModelForImageClassification": "rows.RowsForImageClassification"}
    config = {"model_type": "row_classifier_remote", "auto_map": auto_map, "id2label": dict(enumerate(LABELS))}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    model = AutoModelForImageClassification.from_config(loaded, trust_remote_code=True)
    randomize(model, 0.3)
    parent = make_parent(model, generated(sites=propose_sites(model), relevance_threshold=0.6))
    randomize_relevance(parent)
    module = parent.extract_module(["cat", "car"])
    assert module.config.equivalence["status"] == "verified"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"kind": "pooling", "output": "a"}, "expected a mapping with 'kind'"),
        ({"kind": "conv", "producers": ["a"], "readers": []}, "expected a list of layers"),
        ({"kind": "ffn", "output": "a"}, "expected the keys"),
        ({"kind": "ffn", "producers": "a", "output": "b"}, "expected a list of layers"),
        ({"kind": "ffn", "producers": ["a"], "output": 3}, "expected paths of layers"),
        ({"kind": "attention", "fused": "a", "output": "c", "heads": 0}, "expected a positive integer"),
        ({"kind": "attention", "fused": "a", "output": "c", "layout": "mixed"}, "expected one of"),
        ({"kind": "attention", "fused": "a", "output": "c", "colour": "red"}, "expected the keys"),
        ({"kind": "ffn", "producers": ["a"], "output": "*" * 9 + ".@"}, "one whole part of a path"),
        ({"kind": "ffn", "producers": ["a.*_b"], "output": "a.*.b"}, "one whole part of a path"),
    ],
)
def test_a_description_that_can_t_be_one_is_refused(site, message):
    with pytest.raises(ValueError, match=message):
        generated(sites=[site])
    for no_list in ([], site, 3):
        with pytest.raises(TypeError, match="expected a list of descriptions"):
            generated(sites=no_list)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([{**UNITS, "output": "vit.layers.*.mlp.fc3"}], r"'vit.layers.\*\.mlp.fc3'.*which no layer has"),
        ([{**UNITS, "producers": ["vit.layers.*.mlp"]}], "a ViTMLP; expected a linear layer"),
        ([{**UNITS, "producers": [f"{LAYER}.attention.q_proj"]}], "expected outputs that are the inputs of 'output'"),
        ([{**UNITS, "pooled": "vit.layers.*.nothing"}], "which the model does not have; expected a layer"),
        ([{**UNITS, "output": "vit.layers.*"}], "expected a linear layer"),
        *(([{**UNITS, "output": path}], "which no layer has") for path in ("*." * 50_000 + "fc2", "*.*.*.*.nothing")),
        ([{**ATTENTION, "heads": 5}], "or give 'heads'"),
        ([UNITS, UNITS], "twice; expected each site once"),
    ],
    ids=range(9),
)
def test_descriptions_that_don_t_fit_the_model_are_refused(vit, sites, message):
    with pytest.raises(ValueError, match=message):
        make_parent(vit, generated(sites=sites))


def test_inspect_proposes_options_that_work(vit, tmp_path, capsys):
    vit.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--propose"]) == 0
    printed = capsys.readouterr().out
    options = json.loads(printed[: printed.index("\n}") + 2])
    assert options == {"sites": VIT_SITES}
    generated(**options).to_json_file(tmp_path / "options.json")
    assert NeMoConfig.from_json_file(tmp_path / "options.json") == generated(sites=VIT_SITES)
    assert "equivalence check: verified" in printed
