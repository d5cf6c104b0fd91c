"""Modules load without nemo_hf by the code beside them, and with it as if there were none."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE, LABELS, fresh, image_processor, randomize_relevance, tokenizer
from hub_server import hub as hub
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

import nemo_hf.standalone
from nemo_hf import NeMoConfig, UnsupportedArchitectureError, make_parent
from nemo_hf.files import CODE_NAME
from nemo_hf.inputs import random_inputs
from nemo_hf.neurons import with_back_ends
from nemo_hf.standalone import StandaloneCodeError, find_changes, render_code, write_code
from nemo_hf.tasks import attach_masks

REJECTION = {"weight": 0.7, "bias": -0.4, "threshold": 0.5, "accepted": 0.9, "rejected": 0.6}
EVIL = '"""\n"); import os; os._exit(3) #\\ {{ 7 * 7 }}'
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nemo_hf":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
"""


def wav2vec2():
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **convolutions, **positions, **names))


def drawn(make, seed=0):
    torch.manual_seed(seed)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.3)
    return model.eval()


def cut(plain, back_end=None, labels=("ship", "dog"), drop_head=False):
    """A module of a plain model, with random relevance."""
    parent = attach_masks(plain, NeMoConfig(relevance_threshold=0.6)).eval()
    randomize_relevance(parent)
    if drop_head:
        for mask in parent.masks.site_masks():
            if mask.site.kind == "attention":
                mask.relevance[:, mask.site.parts["query_key"] :][:, : mask.site.head_dim] = 0
    if back_end is not None:
        chosen = {site.key: back_end for site in parent.sites if back_end in {b.name for b in site.back_ends}}
        parent.set_sites(with_back_ends(parent.sites, chosen))
    return parent.extract_module(list(labels))


def calibrated(module):
    module.config.rejection = dict(REJECTION)
    return module


def several(module):
    module.config.problem_type = "multi_label_classification"
    return calibrated(module)


def half(module):
    return module.to(torch.bfloat16)


CASES = {
    "vit": ("image", lambda: calibrated(cut(fresh("vit"))), {"steps": 2, "sample": 1}),
    "swin": ("image", lambda: cut(fresh("swin"), drop_head=True), {}),
    "bert": ("text", lambda: several(cut(fresh("bert"))), {"sample": "w3 w5"}),
    "albert": ("text", lambda: cut(fresh("albert")), {}),
    "llama": ("text", lambda: cut(fresh("llama")), {}),
    "llama-scatter": ("text", lambda: calibrated(cut(fresh("llama"), "scatter")), {"sample": "w3 w5", "steps": 1}),
    "gpt2": ("text", lambda: cut(fresh("gpt2")), {}),
    "gpt2-scatter-half": ("text", lambda: half(cut(fresh("gpt2"), "scatter-gated")), {}),
    "wav2vec2": ("audio", lambda: cut(drawn(wav2vec2)), {}),
}
AUTO_CLASSES = {
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
    "audio": AutoModelForAudioClassification,
}


def run_without_nemo_hf(folder, *arguments):
    """Runs Python where nemo_hf can't be imported; its own files go to `folder`."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER)
    environment = {"PYTHONPATH": str(site), "HF_MODULES_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Saves each case and loads all in a process in which nemo_hf can't be imported."""
    folder = tmp_path_factory.mktemp("modules")
    modules = {}
    for name, (kind, make, options) in CASES.items():
        module = modules[name] = make().eval()
        sample, inputs = options.get("sample"), random_inputs(module)
        (folder / name).mkdir()
        if kind == "image":
            module.attach_processor(image_processor())
            noise = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / "picture.png")
        elif kind == "text":
            module.attach_processor(tokenizer())
        if module.dtype != torch.float32:
            inputs = {k: v.to(module.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        has_several = module.config.has_several_labels
        labels = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]]) if has_several else torch.tensor([0, 1, 1, 0])
        given = {"kind": kind, "inputs": inputs, "labels": labels, "sample": sample, "steps": options.get("steps", 0)}
        torch.save(given, folder / name / "inputs.pt")
        module.save_pretrained(folder / name / "module", with_code=True)
    run_without_nemo_hf(folder, str(Path(__file__).with_name("without_nemo_hf.py")), str(folder))
    return {
        name: (module, folder / name, torch.load(folder / name / "outputs.pt", weights_only=False))
        for name, module in modules.items()
    }


@torch.no_grad()
def expected_of(module, folder):
    given = torch.load(folder / "inputs.pt", weights_only=True)
    return module(**given["inputs"], labels=given["labels"])


@pytest.mark.parametrize("case", CASES)
def test_without_nemo_hf_a_module_computes_the_same(elsewhere, case):
    module, folder, got = elsewhere[case]
    expected = expected_of(module, folder)
    assert torch.equal(got["logits"], expected.logits)
    assert torch.equal(got["loss"], expected.loss)
    assert (got["rejection_scores"] is None) == (module.config.rejection is None)
    if module.config.rejection:
        assert torch.equal(got["rejection_scores"], expected.rejection_scores)
    assert got["state"] == list(module.state_dict())
    assert got["names"] == ["ship", "dog"]
    assert got["class"].startswith("NeMoModuleFor")
    torch.testing.assert_close(got["eager"], got["logits"], atol=0.1 if "half" in case else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_without_trust_the_code_is_not_run(elsewhere, case):
    assert "trust_remote_code=True" in elsewhere[case][2]["refused"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_without_nemo_hf_loads_there_and_here(elsewhere, case):
    module, folder, got = elsewhere[case]
    assert torch.equal(got["again"], got["logits"])
    assert (folder / "again" / CODE_NAME).read_bytes() == (folder / "module" / CODE_NAME).read_bytes()
    loaded = AUTO_CLASSES[CASES[case][0]].from_pretrained(folder / "again")
    assert type(loaded) is type(module)
    assert torch.equal(expected_of(loaded, folder).logits, got["logits"])
    assert loaded.config.sites == module.config.sites


@pytest.mark.parametrize("case", [case for case, (*_, options) in CASES.items() if "sample" in options])
def test_pipelines_answer_alike(elsewhere, case):
    _, folder, got = elsewhere[case]
    kind = CASES[case][0]
    sample = "w3 w5" if kind == "text" else str(folder / "picture.png")
    task = {"text": "text-classification", "image": "image-classification"}[kind]
    (answers,) = pipeline(task, model=str(folder / "module"), top_k=None)([sample])
    assert [a["label"] for a in answers] == [a["label"] for a in got["pipeline"]]
    assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in got["pipeline"]], abs=1e-6)
    assert {answer["label"] for answer in answers} == {"ship", "dog"}


@pytest.mark.parametrize("case", [case for case, (*_, options) in CASES.items() if "steps" in options])
def test_a_module_is_fine_tuned_without_nemo_hf(elsewhere, case):
    module, folder, got = elsewhere[case]
    trained = got["trained"]
    assert trained["loss"] == pytest.approx(expected_of(module, folder).loss.item(), abs=1e-5)
    assert trained["shapes"][0] == (4, 2)
    assert trained["rejection"] is None
    still = {name for name in trained["unmoved"] if not name.endswith("indices")}
    assert still == ({"model.model.embed_tokens.weight"} & still if "llama" in case else set())
    assert {CODE_NAME, "config.json", "model.safetensors"} <= set(trained["files"])
    assert set(trained["config"]) == {"AutoConfig", f"AutoModelFor{type(module).__name__.removeprefix('NeMoFor')}"}
    loaded = AUTO_CLASSES[CASES[case][0]].from_pretrained(folder / "trained")
    assert type(loaded) is type(module)
    assert loaded.config.rejection is None


@pytest.mark.parametrize(("case", "trust"), [*((case, None) for case in CASES), ("vit", False), ("vit", True)])
def test_with_nemo_hf_the_directory_loads_as_before(elsewhere, case, trust, monkeypatch):
    module, folder, got = elsewhere[case]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for trust"))
    options = {} if trust is None else {"trust_remote_code": trust}
    loaded = AUTO_CLASSES[CASES[case][0]].from_pretrained(folder / "module", **options)
    assert type(loaded) is type(module)
    assert type(AutoConfig.from_pretrained(folder / "module", **options)) is type(module.config)
    assert torch.equal(expected_of(loaded, folder).logits, got["logits"])
    assert not hasattr(loaded.config, "auto_map")


def test_saving_without_code_removes_what_was_there(elsewhere, tmp_path):
    module, *_ = elsewhere["vit"]
    module.save_pretrained(tmp_path / "one", with_code=True)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    module.save_pretrained(tmp_path / "three")
    for name in ("one", "two"):
        assert not (tmp_path / name / CODE_NAME).exists()
        assert (tmp_path / name / "config.json").read_bytes() == (tmp_path / "three" / "config.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_the_file_imports_torch_and_transformers_only_and_is_short(elsewhere, case):
    text = (elsewhere[case][1] / "module" / CODE_NAME).read_text()
    tree = ast.parse(text)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    assert not {"exec", "eval", "compile", "__import__", "open"} & {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    constants = sum(
        node.end_lineno - node.lineno for node in tree.body if isinstance(node, ast.AnnAssign)
    )  # they grow with the number of layers
    assert len(text.splitlines()) - constants < 200
    assert max(len(line) for line in text.splitlines() if not line.startswith('    "')) <= 120


def test_a_file_has_only_the_layers_that_the_module_needs(elsewhere):
    texts = {name: (folder / "module" / CODE_NAME).read_text() for name, (_, folder, _) in elsewhere.items()}
    assert [name for name, text in texts.items() if "ScatterLinear" in text] == ["llama-scatter", "gpt2-scatter-half"]
    assert [name for name, text in texts.items() if "RotaryAngles" in text] == ["llama"]


def test_label_names_can_not_inject_code(tmp_path):
    plain = fresh("vit")
    plain.config.id2label = {index: f"{EVIL}{index}" for index in range(5)}
    plain.config.label2id = {name: index for index, name in plain.config.id2label.items()}
    module = cut(plain, labels=(3, 1))
    module.config.law = {**module.config.law, "status": EVIL}
    module.save_pretrained(tmp_path / EVIL.replace("/", ""), with_code=True)
    code = (tmp_path / EVIL.replace("/", "") / CODE_NAME).read_text()
    assert code == render_code(cut(fresh("vit"), labels=("ship", "dog")))
    config = json.loads((tmp_path / EVIL.replace("/", "") / "config.json").read_text())
    assert config["id2label"] == {"0": f"{EVIL}3", "1": f"{EVIL}1"}


@pytest.mark.parametrize(
    "path", ['a"]: 1}; import os #', "a b", "a..b", ".a", "a.", "a\n", "", "a.1b", "ä", "a\\", "a.b()", "{{ a }}"]
)
def test_paths_that_are_not_dotted_identifiers_are_refused(path):
    with pytest.raises(UnsupportedArchitectureError, match="identifiers"):
        nemo_hf.standalone._literal({path: {"weight": (1, 2)}})
    with pytest.raises(UnsupportedArchitectureError, match="identifier"):
        nemo_hf.standalone._literal({"layer": {path or "1": 1}})


@pytest.mark.parametrize("value", ["1", float("inf"), float("nan"), (1, "2"), [1], torch.ones(1), 1j])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(UnsupportedArchitectureError, match="finite numbers"):
        nemo_hf.standalone._literal({"layer": {"width": value}})


def test_literals_read_back_as_what_they_were():
    entries = {"a.0.b_c": {"weight": (3, 0), "scale": 0.1, "flag": True, "none": None, "n": -2}, "d": {"bias": (4,)}}
    assert ast.literal_eval(nemo_hf.standalone._literal(entries)) == entries


def test_equal_models_have_no_changes_and_numbers_and_shapes_are_found():
    plain, other = fresh("vit"), fresh("vit")
    assert find_changes(plain, other) == ({}, {}, {})
    layer = other.vit.layers[0].attention
    layer.head_dim = 5
    layer.q_proj.weight = nn.Parameter(torch.zeros(20, 32))
    expected = {
        "vit.layers.0.attention": {"head_dim": 5},
        "vit.layers.0.attention.q_proj": {"weight": (20, 32)},
    }
    assert find_changes(plain, other)[0] == expected
    layer.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedArchitectureError, match=r"attention\.extra"):
        find_changes(plain, other)


def test_parents_are_refused(tmp_path):
    parent = make_parent(fresh("vit"))
    with pytest.raises(ValueError, match=r"Got a parent; expected a module.*extract_module"):
        parent.save_pretrained(tmp_path / "parent", with_code=True)
    assert list(tmp_path.iterdir()) == []


def test_modules_of_classes_of_ones_own_are_refused(registered, tmp_path):
    class OwnConfig(ViTConfig):
        model_type = "own_vit"

    class OwnForImageClassification(ViTForImageClassification):
        config_class = OwnConfig

    registered(OwnConfig, AutoModelForImageClassification, OwnForImageClassification)
    module = cut(OwnForImageClassification(OwnConfig(**IMAGE)))
    with pytest.raises(UnsupportedArchitectureError, match="expected a class of transformers"):
        module.save_pretrained(tmp_path / "own", with_code=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_when_the_code_computes_something_else(tmp_path, monkeypatch):
    module = cut(fresh("vit"))
    module.save_pretrained(tmp_path / "module")
    before = {file.name: file.read_bytes() for file in (tmp_path / "module").iterdir()}
    found = find_changes

    def wrong(plain, resized):
        changes, *others = found(plain, resized)
        changes["vit.layers.0.attention"] = {"scaling": 0.123}
        return changes, *others

    monkeypatch.setattr(nemo_hf.standalone, "find_changes", wrong)
    names = set(sys.modules)
    with pytest.raises(StandaloneCodeError, match="Got logits that differ"):
        write_code(module, tmp_path / "module")
    assert set(sys.modules) == names
    with pytest.raises(StandaloneCodeError, match="Got logits that differ"):
        module.save_pretrained(tmp_path / "new", with_code=True)
    with pytest.raises(StandaloneCodeError, match="Got logits that differ"):
        module.save_pretrained(tmp_path / "module", with_code=True)
    assert [file.name for file in tmp_path.iterdir()] == ["module"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "module").iterdir()} == before


def test_code_that_does_not_load_the_weights_is_refused(tmp_path, monkeypatch):
    module = cut(fresh("vit"))
    module.save_pretrained(tmp_path)
    monkeypatch.setattr(nemo_hf.standalone, "find_changes", lambda plain, resized: ({}, {}, {}))
    with pytest.raises(StandaloneCodeError, match="Got an error when"):
        write_code(module, tmp_path)
    assert not (tmp_path / CODE_NAME).exists()


def test_a_directory_of_other_weights_is_refused(tmp_path):
    module = cut(fresh("vit"))
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        write_code(module, tmp_path)
    module.save_pretrained(tmp_path)
    with torch.no_grad():
        module.model.classifier.bias += 1
    with pytest.raises(StandaloneCodeError, match=r"model\.classifier\.bias"):
        write_code(module, tmp_path)
    assert not (tmp_path / CODE_NAME).exists()


def test_the_code_can_be_added_to_a_saved_module(tmp_path):
    module = cut(fresh("bert"))
    module.save_pretrained(tmp_path / "one")
    assert write_code(module, tmp_path / "one") == tmp_path / "one" / CODE_NAME
    module.save_pretrained(tmp_path / "two", with_code=True)
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_inputs_given_by_hand_are_what_is_compared(tmp_path, monkeypatch):
    module = cut(fresh("vit"))
    module.save_pretrained(tmp_path)
    monkeypatch.setattr(nemo_hf.standalone, "random_inputs", lambda model: pytest.fail("drew inputs"))
    write_code(module, tmp_path, inputs={"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])})


def test_a_push_with_code_brings_it_and_one_without_removes_it(hub):
    module = cut(fresh("vit"))
    module.push_to_hub("me/m", with_code=True)
    pushed = hub.files("me/m")
    assert pushed[CODE_NAME].decode() == render_code(module)
    assert set(json.loads(pushed["config.json"])["auto_map"]) == {"AutoConfig", "AutoModelForImageClassification"}
    loaded = AutoModelForImageClassification.from_pretrained("me/m")
    assert type(loaded) is type(module)
    loaded.push_to_hub("me/m")
    assert CODE_NAME not in hub.files("me/m")
    assert "auto_map" not in json.loads(hub.files("me/m")["config.json"])


@pytest.mark.slow
def test_a_repository_loads_without_nemo_hf(hub, tmp_path):
    module = cut(fresh("vit")).eval()
    module.push_to_hub("me/m", with_code=True)
    inputs = random_inputs(module)
    torch.save(inputs["pixel_values"], tmp_path / "inputs.pt")
    code = """
import sys, torch
from transformers import AutoModelForImageClassification as Auto
model = Auto.from_pretrained("me/m", trust_remote_code=True)
torch.save(model(torch.load(sys.argv[1] + "/inputs.pt")).logits.detach(), sys.argv[1] + "/logits.pt")
model.save_pretrained(sys.argv[1] + "/again")
"""
    run_without_nemo_hf(tmp_path, "-c", code, str(tmp_path))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), module(**inputs).logits)
    assert (tmp_path / "again" / CODE_NAME).read_text() == render_code(module)
    maps = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert all(value.startswith("modeling_nemo_module.") for value in maps.values())
