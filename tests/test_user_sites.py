"""Architectures of unknown layer names: sites that a user describes or that are proposed, and their classes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import LABELS, NAMES, fresh, hooks_of, image_samples, randomize, randomize_relevance
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.modeling_outputs import ImageClassifierOutput

from nemo_hf import NeMoConfig, NeMoTrainer, make_parent, propose_sites
from nemo_hf.cli.main import main
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.neurons.user_sites import build_user_sites

LAYER = "vit.layers.*"
PROJECTIONS = {part: f"{LAYER}.attention.{part[0]}_proj" for part in ("query", "key", "value", "output")}
VIT_SITES = [
    {"kind": "attention", **PROJECTIONS, "heads": 4},
    {"kind": "ffn", "producers": [f"{LAYER}.mlp.fc1"], "output": f"{LAYER}.mlp.fc2"},
]
FUSED = {"fused": "blocks.*.all_three", "layout": "by key/value head", "output": "blocks.*.join", "heads": 3}
STRANGE_SITES = [
    {"kind": "attention", **FUSED},
    {"kind": "ffn", "producers": ["blocks.*.rise"], "output": "blocks.*.fall"},
]


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"
    width: int = 24
    image_size: int = 16
    num_channels: int = 3


class StrangeBlock(nn.Module):
    """Fused attention of three heads, the shares of each head side by side, and units behind a sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.all_three, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x):
        q, k, v = self.all_three(self.norm(x)).unflatten(-1, (3, 3, -1)).permute(3, 0, 2, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
        x = x + self.join(mixed.transpose(1, 2).flatten(2))
        return x + self.fall(torch.sigmoid(self.rise(self.other_norm(x))))


class StrangeNet(PreTrainedModel):
    """Named without a task; only its registration says what it is for."""

    config_class = StrangeConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.cut_up = nn.Linear(48, config.width)
        self.blocks = nn.ModuleList(StrangeBlock(config.width) for _ in range(2))
        self.verdict = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, return_dict=True):
        x = self.cut_up(pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return ImageClassifierOutput(logits=self.verdict(x.mean(1)))


@pytest.fixture(scope="module", autouse=True)
def registered():
    AutoConfig.register("strange", StrangeConfig, exist_ok=True)
    AutoModelForImageClassification.register(StrangeConfig, StrangeNet, exist_ok=True)


def strange() -> StrangeNet:
    return randomize(StrangeNet(StrangeConfig(**NAMES)), 0.3)


def test_described_sites_shape_the_masks(vit):
    parent = make_parent(vit, NeMoConfig(sites=VIT_SITES))
    known = {site.output: site for site in find_sites(vit)}
    assert {site.output: site.parts for site in parent.sites} == {path: site.parts for path, site in known.items()}
    with pytest.raises(ValueError, match="Got sites="):
        parent.set_nemo_config(NeMoConfig())


def test_sites_are_proposed_for_layers_of_any_name_and_the_model_stays_as_it_is():
    model, state = strange().train(), torch.get_rng_state()
    assert propose_sites(model) == STRANGE_SITES
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model) == 0
    assert all(map(torch.equal, model.parameters(), strange().parameters()))


def test_a_layer_under_two_names_is_proposed_once(bert):
    proposed = propose_sites(bert)
    bert.other_name = bert.bert.encoder
    assert propose_sites(bert) == proposed


@pytest.mark.parametrize("family", ["gpt2", "llama", "swin"])
def test_proposals_agree_with_what_is_known_by_name(family):
    model = fresh(family)
    proposed = [site for described in propose_sites(model) for site in build_user_sites(model, described)]
    known = {site.output: site for site in find_sites(model)}
    assert {site.output for site in proposed} == set(known)
    for site in proposed:
        assert {rows for rows, _ in site.produced()} == {rows for rows, _ in known[site.output].produced()}
        assert getattr(site, "heads", 0) == getattr(known[site.output], "heads", 0)


def test_an_unknown_architecture_trains_and_its_modules_are_exact(tmp_path):
    config = NeMoConfig(sites=STRANGE_SITES, relevance_threshold=0.6)
    args = TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True)
    trainer = NeMoTrainer(strange(), args, train_dataset=image_samples(10), nemo_config=config)
    parent = trainer.parent
    assert {site.kind: site.pruning_mode for site in parent.sites} == {"attention": "scatter", "ffn": "dense"}
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
    assert json.loads((tmp_path / "parent" / "config.json").read_text())["nemo_config"]["sites"] == STRANGE_SITES


def test_a_model_of_remote_code_works_in_the_process_that_trusts_it(tmp_path):
    source = (Path(__file__).parents[1] / "examples" / "custom_model.py").read_text()
    start, end = source.index("class RowsConfig"), source.index("AutoConfig.register")
    code = "import torch\nfrom torch import Tensor, nn\nfrom transformers import PreTrainedConfig, PreTrainedModel\n"
    code += "from transformers.modeling_outputs import ImageClassifierOutput\n\n\n" + source[start:end]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "rows.py").write_text(code)
    auto_map = {"AutoConfig": "rows.RowsConfig", "AutoModelForImageClassification": "rows.RowsForImageClassification"}
    config = {"model_type": "row_classifier_remote", "auto_map": auto_map, "id2label": dict(enumerate(LABELS))}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    model = AutoModelForImageClassification.from_config(loaded, trust_remote_code=True)
    randomize(model, 0.3)
    parent = make_parent(model, NeMoConfig(sites=propose_sites(model), relevance_threshold=0.6))
    randomize_relevance(parent)
    module = parent.extract_module(["cat", "car"])
    assert module.config.equivalence["status"] == "verified"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"kind": "pooling", "output": "a"}, "expected a mapping with 'kind'"),
        ("vit.layers.0", "expected a mapping with 'kind'"),
        ({"kind": "conv", "producers": ["a"], "readers": []}, "expected a list of layers"),
        ({"kind": "conv", "producers": ["a"], "readers": ["b"], "passing": [1]}, "expected paths of layers"),
        ({"kind": "ffn", "output": "a"}, "expected the keys"),
        ({"kind": "ffn", "producers": "a", "output": "b"}, "expected a list of layers"),
        ({"kind": "ffn", "producers": ["a"], "output": 3}, "expected paths of layers"),
        ({"kind": "attention", "query": "a", "key": "b", "output": "c"}, "expected the keys"),
        ({"kind": "attention", "fused": "a", "output": "c", "heads": 0}, "expected a positive integer"),
        ({"kind": "attention", "fused": "a", "output": "c", "layout": "mixed"}, "expected one of"),
        ({"kind": "attention", "fused": "a", "output": "c", "colour": "red"}, "expected the keys"),
        ({"kind": "ffn", "producers": ["a"], "output": "*" * 9 + ".@"}, "one whole part of a path"),
        ({"kind": "ffn", "producers": ["a.*_b"], "output": "a.*.b"}, "one whole part of a path"),
    ],
)
def test_a_description_that_can_t_be_one_is_refused(site, message):
    with pytest.raises(ValueError, match=message):
        NeMoConfig(sites=[site])
    for no_list in ([], site, 3):
        with pytest.raises(TypeError, match="expected a list of descriptions"):
            NeMoConfig(sites=no_list)


ATTENTION, UNITS = VIT_SITES


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([{**UNITS, "output": "vit.layers.*.mlp.fc3"}], r"'vit.layers.\*\.mlp.fc3'.*which no layer has"),
        ([{**UNITS, "producers": ["vit.layers.*.mlp.fc3"]}], "'vit.layers.0.mlp.fc3'.*which the model does not have"),
        ([{**UNITS, "producers": ["vit.layers.*.mlp"]}], "a ViTMLP; expected a linear layer"),
        (
            [{**UNITS, "producers": ["vit.layers.*.attention.q_proj"]}],
            "expected outputs that are the inputs of 'output'",
        ),
        ([{**UNITS, "pooled": "vit.layers.*.nothing"}], "which the model does not have; expected a layer"),
        ([{**UNITS, "output": "vit.layers.*"}], "expected a linear layer"),
        *(([{**UNITS, "output": path}], "which no layer has") for path in ("*." * 50_000 + "fc2", "*.*.*.*.nothing")),
        ([{**ATTENTION, "heads": 5}], "or give 'heads'"),
        ([UNITS, UNITS], "twice; expected each site once"),
    ],
    ids=range(10),
)
def test_descriptions_that_don_t_fit_the_model_are_refused(vit, sites, message):
    with pytest.raises(ValueError, match=message):
        make_parent(vit, NeMoConfig(sites=sites))


def test_sites_of_other_targets_are_left_out(vit):
    assert make_parent(vit, NeMoConfig(sites=VIT_SITES, targets=["attention"])).kinds == {"attention"}
    with pytest.raises(ValueError, match="no site of these targets"):
        make_parent(fresh("vit"), NeMoConfig(sites=[UNITS], targets=["attention"]))


def test_stars_are_filled_in_order(vit):
    description = {"kind": "ffn", "producers": ["*.layers.*.mlp.fc1"], "output": "*.layers.*.mlp.fc2"}
    assert build_user_sites(vit, description) == build_user_sites(vit, UNITS)


def test_inspect_proposes_options_that_work(vit, tmp_path, capsys):
    vit.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--propose"]) == 0
    printed = capsys.readouterr().out
    options = json.loads(printed[: printed.index("\n}") + 2])
    assert options == {"sites": VIT_SITES}
    NeMoConfig(**options).to_json_file(tmp_path / "options.json")
    assert NeMoConfig.from_json_file(tmp_path / "options.json") == NeMoConfig(sites=VIT_SITES)
    assert "equivalence check: verified" in printed
