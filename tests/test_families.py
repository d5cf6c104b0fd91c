"""the equivalence check and the round trips, on nine families."""

import json

import pytest
import torch
from conftest import LABELS, fresh, randomize_relevance
from safetensors import safe_open
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from nemo_hf import EquivalenceError, NeMoConfig, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.base import base_parameters
from nemo_hf.models.equivalence import check_equivalence
from nemo_hf.models.extraction import make_plan
from nemo_hf.neurons.sites import with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.resize import ClosedLinear

LABELS_CUT = ["ship", "dog"]
IDS_CUT = [3, 1]


def auto_class(model):
    is_image = model.main_input_name == "pixel_values"
    return AutoModelForImageClassification if is_image else AutoModelForSequenceClassification


def trained_parent(plain, **options):
    parent = make_parent(plain, NeMoConfig(relevance_threshold=0.6, **options))
    randomize_relevance(parent)
    return parent.eval()


@torch.no_grad()
def logits(model, inputs, **options):
    return model.eval()(**inputs, **options).logits


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("round_to", [None, 8])
def test_a_module_computes_what_its_parent_does_under_its_mask(plain, hard, round_to):
    parent = trained_parent(plain, hard_masks=hard)
    module = parent.extract_module(LABELS_CUT, round_to=round_to)
    inputs = random_inputs(parent)
    static = make_plan(parent, LABELS_CUT, round_to=round_to).static
    expected = logits(parent, inputs, static_masks=static)[:, IDS_CUT]
    unmasked = logits(parent, inputs, static_masks=parent.masks.open_masks())[:, IDS_CUT]
    assert torch.allclose(logits(module, inputs), expected, atol=1e-5)
    assert (unmasked - expected).abs().max() > 1e-3
    assert module.config.equivalence["status"] == "verified"
    assert base_parameters(module) < base_parameters(parent)


def test_a_module_survives_saving_loading_and_saving(plain, tmp_path):
    parent = trained_parent(plain)
    module = parent.extract_module(LABELS_CUT)
    module.save_pretrained(tmp_path / "one")
    loaded = auto_class(module).from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    inputs = random_inputs(parent)
    assert torch.equal(logits(loaded, inputs), logits(module, inputs))
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    assert loaded.config.id2label == {0: "ship", 1: "dog"}
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as weights:
        counted = sum(
            weights.get_tensor(name).numel()
            for name in weights.keys()  # noqa: SIM118 - a safetensors file is no mapping
            if not name.endswith("_indices")
        )
    assert counted == base_parameters(module)


def test_a_parent_survives_saving_and_a_module_cut_on_load_is_the_same(plain, tmp_path):
    parent = trained_parent(plain)
    module = parent.extract_module(LABELS_CUT)
    parent.save_pretrained(tmp_path / "parent")
    inputs = random_inputs(parent)
    loaded = auto_class(parent).from_pretrained(tmp_path / "parent")
    assert torch.equal(logits(loaded, inputs), logits(parent, inputs))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in parent.state_dict().items())
    cut = auto_class(parent).from_pretrained(tmp_path / "parent", labels=LABELS_CUT, verify=True)
    assert torch.equal(logits(cut, inputs), logits(module, inputs))
    assert cut.state_dict().keys() == module.state_dict().keys()
    assert cut.config.equivalence["status"] == "verified"
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "parent").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_sites_with_no_neurons_left_are_dropped_exactly(plain):
    parent = trained_parent(plain)
    masks = list(parent.masks.site_masks())
    for mask in masks[:1] if len(masks) == 2 else (masks[0], masks[-1]):
        mask.relevance.zero_()
    module = parent.extract_module(LABELS_CUT)
    inputs = random_inputs(parent)
    expected = logits(parent, inputs, static_masks=make_plan(parent, LABELS_CUT).static)[:, IDS_CUT]
    assert torch.allclose(logits(module, inputs), expected, atol=1e-5)


def test_whole_heads_are_dropped(plain):
    parent = trained_parent(plain)
    attention = [mask for mask in parent.masks.site_masks() if mask.site.kind == "attention"]
    for mask in attention:
        mask.relevance[:, mask.site.parts["query_key"] :][:, : mask.site.head_dim] = 0  # values of the first head
    module = parent.extract_module(LABELS_CUT)
    inputs = random_inputs(parent)
    expected = logits(parent, inputs, static_masks=make_plan(parent, LABELS_CUT).static)[:, IDS_CUT]
    assert torch.allclose(logits(module, inputs), expected, atol=1e-5)
    dense = [entry["widths"] for entry in module.config.sites if "key_value_heads" in entry["widths"]]
    heads = [mask.site.key_value_heads for mask in attention]
    assert all(widths["key_value_heads"] < count for widths, count in zip(dense, heads, strict=False))


def test_every_family_here_is_dense(plain):
    parent = make_parent(plain)
    assert {(site.kind, site.pruning_mode) for site in parent.sites} == {("attention", "dense"), ("ffn", "dense")}
    assert parent.config.equivalence["status"] == "verified"


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama"])
@pytest.mark.parametrize("pruning_mode", ["scatter", "scatter-gated", "dense-heads-kept", "dense-heads-kept-gated"])
def test_other_back_ends_compute_the_same(family, pruning_mode, tmp_path):
    parent = attach_masks(fresh(family))
    randomize_relevance(parent)
    inputs = random_inputs(parent)
    static = make_plan(parent, LABELS_CUT).static
    expected = logits(parent, inputs, static_masks=static)[:, IDS_CUT]
    assert (logits(parent, inputs)[:, IDS_CUT] - expected).abs().max() > 1e-3
    chosen = {s.key: pruning_mode for s in parent.sites if pruning_mode in {b.name for b in s.pruning_modes}}
    parent.set_sites(with_pruning_modes(parent.sites, chosen))
    assert {site.pruning_mode for site in parent.sites if site.kind == "attention"} == {pruning_mode}
    module = parent.extract_module(LABELS_CUT)
    assert torch.allclose(logits(module, inputs), expected, atol=1e-5)
    module.save_pretrained(tmp_path)
    assert torch.equal(logits(auto_class(module).from_pretrained(tmp_path), inputs), logits(module, inputs))


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama"])
@pytest.mark.parametrize("pruning_mode", ["scatter-gated", "dense-heads-kept-gated"])
def test_soft_masks_that_close_where_neurons_are_produced_are_cut_exactly(family, pruning_mode):
    parent = attach_masks(fresh(family), NeMoConfig(hard_masks=False))
    randomize_relevance(parent)
    attention = [site.key for site in parent.sites if site.kind == "attention"]
    units = [site.key for site in parent.sites if site.kind == "ffn"]
    before = logits(parent, random_inputs(parent), static_masks=make_plan(parent, LABELS_CUT).static)
    parent.set_sites(
        with_pruning_modes(parent.sites, dict.fromkeys(attention, pruning_mode) | dict.fromkeys(units, "scatter-gated"))
    )
    after = logits(parent, random_inputs(parent), static_masks=make_plan(parent, LABELS_CUT).static)
    assert not torch.allclose(before, after, atol=1e-3)  # a soft value now counts where it is made and where it is read
    assert parent.extract_module(LABELS_CUT).config.equivalence["status"] == "verified"


def test_a_dense_rotary_module_reads_the_angles_of_its_frequencies_alone():
    parent = trained_parent(fresh("llama"))
    plan = make_plan(parent, LABELS_CUT)
    module = parent.extract_module(LABELS_CUT)
    for site, entry in zip(parent.sites, module.config.sites, strict=True):
        if site.kind != "attention":
            continue
        frequencies = plan.keep[site.key]["query_key"].tolist()
        half = entry["widths"]["head_dim"] // 2
        angles = module.model.get_submodule(site.name).nemo_rotary.angle_indices.tolist()
        assert angles[: len(frequencies)] == frequencies
        assert angles[half : half + len(frequencies)] == [frequency + 4 for frequency in frequencies]
        assert len(angles) == 2 * half
        assert module.model.get_submodule(site.query.layer).out_features == 4 * 2 * half


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dense_rotary_module_can_be_cast_and_keeps_its_indices(dtype):
    module = trained_parent(fresh("llama")).extract_module(LABELS_CUT)
    angles = [value for name, value in module.state_dict().items() if name.endswith("angle_indices")]
    assert len(angles) == 2
    exact, inputs = logits(module, random_inputs(module)), random_inputs(module)
    module.to(dtype)
    assert all(value.dtype == torch.int64 for name, value in module.state_dict().items() if "indices" in name)
    close = {"atol": 1e-5, "rtol": 0} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(logits(module, inputs).float(), exact, **close)


def test_a_module_shares_no_memory_with_its_parent(plain):
    parent = trained_parent(plain)
    module = parent.extract_module(LABELS_CUT)
    ours = {tensor.data_ptr() for tensor in parent.state_dict().values() if tensor.numel()}
    assert not ours & {tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel()}


@pytest.mark.parametrize("labels", [["cat"], ["frog", "cat", "dog"], [4, 0], list(range(5))])
def test_the_head_has_the_labels_in_the_order_asked_for(vit, labels):
    parent = trained_parent(vit)
    module = parent.extract_module(labels)
    names = [label if isinstance(label, str) else LABELS[label] for label in labels]
    assert list(module.config.id2label.values()) == names
    assert module.config.label2id == {name: index for index, name in enumerate(names)}
    rows = parent.model.classifier.weight[[LABELS.index(name) for name in names]]
    assert torch.equal(module.model.classifier.weight, rows)


def test_half_precision_parents_are_cut_too(bert, tmp_path):
    parent = trained_parent(bert.to(torch.bfloat16))
    module = parent.extract_module(LABELS_CUT)
    assert module.dtype == torch.bfloat16
    assert module.config.equivalence["status"] == "verified"
    module.save_pretrained(tmp_path)
    assert auto_class(module).from_pretrained(tmp_path).dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_masks_stay_in_float32_when_a_parent_is_loaded_in_half_precision(bert, tmp_path):
    parent = trained_parent(bert.to(torch.bfloat16))
    parent.save_pretrained(tmp_path / "one")
    loaded = auto_class(parent).from_pretrained(tmp_path / "one")
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.masks.parameters()} == {torch.float32}
    assert all(mask.relevance.dtype == torch.uint8 for mask in loaded.masks.site_masks())
    loaded.save_pretrained(tmp_path / "two")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


def test_soft_masks_in_half_precision_are_refused(bert):
    with pytest.raises(ValueError, match="expected float32"):
        make_parent(bert.to(torch.bfloat16), NeMoConfig(hard_masks=False))


def test_a_scale_that_forward_recomputes_is_found_out_and_made_up_for():
    """Where the softmax scale follows the head width, dense cuts are silently wrong unless q takes it up (MPNet)."""
    from transformers import MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    model = MPNetForSequenceClassification(
        MPNetConfig(
            vocab_size=120,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    parent = make_parent(model)
    attention = [site for site in parent.sites if site.kind == "attention"]
    assert all(site.cut_by.rescales for site in attention)
    randomize_relevance(parent)
    module = parent.extract_module([0, 2])
    assert module.config.equivalence["status"] == "verified"
    widths = {entry["key"]: entry["widths"] for entry in module.config.sites}[attention[0].key]
    assert widths["head_dim"] < attention[0].head_dim
    parent.set_sites(
        with_pruning_modes(parent.sites, {attention[0].key: attention[0].pruning_mode.replace("-rescaled", "")})
    )
    with pytest.raises(EquivalenceError, match="expected at most"):
        parent.extract_module([0, 2])


def test_a_broken_cut_is_refused(vit):
    parent = trained_parent(vit)
    module = parent.extract_module(LABELS_CUT)
    with torch.no_grad():
        module.model.classifier.bias += 1e-3
    with pytest.raises(RuntimeError, match="expected at most"):
        check_equivalence(parent, module, make_plan(parent, LABELS_CUT).static)


def test_a_law_without_effect_is_unverified(vit):
    parent = make_parent(vit)
    for mask in parent.masks.site_masks():
        mask.relevance.fill_(255)
    assert parent.extract_module(LABELS_CUT).config.equivalence["status"] == "unverified"


def test_only_the_needed_slices_are_read(vit, tmp_path, monkeypatch):
    parent = trained_parent(vit)
    parent.save_pretrained(tmp_path)
    whole = parent.extract_module(LABELS_CUT)
    read = []
    from nemo_hf.models import files

    original = files.WeightFiles.read

    def counting(self, name, cut=None):
        tensor = original(self, name, cut)
        read.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(files.WeightFiles, "read", counting)
    AutoModelForImageClassification.from_pretrained(tmp_path, labels=LABELS_CUT)
    relevance = sum(mask.relevance.numel() for mask in parent.masks.site_masks())
    module_bytes = sum(tensor.numel() * tensor.element_size() for tensor in whole.state_dict().values())
    assert sum(read) == module_bytes + relevance


def test_sharded_parents_are_cut_on_load(bert, tmp_path):
    parent = trained_parent(bert)
    parent.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    cut = AutoModelForSequenceClassification.from_pretrained(tmp_path, labels=LABELS_CUT)
    inputs = random_inputs(parent)
    assert torch.equal(logits(cut, inputs), logits(parent.extract_module(LABELS_CUT), inputs))
    parent.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


def test_groups_stand_for_their_labels():
    groups = {"pets": ["cat", "dog"], "vehicles": ["ship", "car"], "frog": ["frog"]}
    parent = trained_parent(fresh("vit"), label_groups=groups)
    assert list(parent.extract_module("vehicles").config.id2label.values()) == ["ship", "car"]
    module = parent.extract_module(["frog", "dog"])
    assert list(module.config.id2label.values()) == ["frog", "dog"]
    assert module.config.groups == {"pets": [0, 1], "frog": [4]}
    pets = make_plan(parent, ["cat"]).static
    assert all(torch.equal(mask, pets[key]) for key, mask in make_plan(parent, ["dog"]).static.items())


# Attention of which nothing is left


def with_empty_attention(plain):
    """A parent whose first attention is of no use to any label."""
    parent = make_parent(plain)
    randomize_relevance(parent)
    first = next(mask for mask in parent.masks.site_masks() if mask.site.kind == "attention")
    first.relevance.zero_()
    return parent, first.site


def closed_layers(module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, ClosedLinear)]


@torch.no_grad()
def test_attention_without_neurons_computes_nothing_and_keeps_the_law(plain, tmp_path):
    parent, site = with_empty_attention(plain)
    inputs = random_inputs(parent)
    module = parent.extract_module(LABELS[:2])
    expected = parent(**inputs, static_masks=make_plan(parent, LABELS[:2]).static).logits[:, :2]
    torch.testing.assert_close(module(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    is_plain = type(plain.get_submodule(site.output)) is torch.nn.Linear and not site.cut_by.is_scattered
    assert (f"model.{site.output}" in closed_layers(module)) == is_plain
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert closed_layers(loaded) == closed_layers(module)
    assert torch.equal(loaded(**inputs).logits, module(**inputs).logits)


def test_a_tuned_module_computes_what_it_may_have_learned(vit, tmp_path):
    parent, _ = with_empty_attention(vit)
    module = parent.extract_module(LABELS[:2])
    inputs = random_inputs(parent)
    module.train()
    module(**inputs, labels=torch.arange(len(next(iter(inputs.values())))) % 2).loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval().save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert closed_layers(module)
    assert not closed_layers(loaded)
    torch.testing.assert_close(loaded(**inputs).logits, module(**inputs).logits)
