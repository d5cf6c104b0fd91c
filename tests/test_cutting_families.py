"""Modules compute what their parents do under their masks, before and after a round trip through files."""

import pytest
import torch
from conftest import TEXT, fresh, generated, hooks_of, logits_of, parent_of, randomize, randomize_relevance, tiny
from safetensors import safe_open
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from nemo_hf import EquivalenceError, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.models.base import base_parameters
from nemo_hf.models.equivalence import check_equivalence
from nemo_hf.models.extraction import make_plan
from nemo_hf.neurons.sites import with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.resize import ClosedLinear

LABELS_CUT = ["ship", "dog"]
IDS_CUT = [3, 1]


def logits(model, **options):
    return logits_of(model.eval(), **random_inputs(model), **options)


def auto_class(model):
    is_image = model.main_input_name == "pixel_values"
    return AutoModelForImageClassification if is_image else AutoModelForSequenceClassification


def logits_under_mask(parent, **options) -> torch.Tensor:
    """The parent's logits of the labels that are cut, under the module's static mask."""
    return logits(parent, static_masks=make_plan(parent, LABELS_CUT, **options).static)[:, IDS_CUT]


def assert_same_files(one, other) -> None:
    for file in one.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("hard", "round_to"), [(True, None), (True, 8), (False, None)])
def test_a_module_computes_what_its_parent_does_under_its_mask(family, hard, round_to):
    parent = parent_of(family, hard_masks=hard)
    assert {(site.kind, site.pruning_mode) for site in parent.sites} == {("attention", "dense"), ("ffn", "dense")}
    assert parent.config.equivalence["status"] == "verified"
    module = parent.extract_module(LABELS_CUT, round_to=round_to)
    expected = logits_under_mask(parent, round_to=round_to)
    unmasked = logits(parent, static_masks=parent.masks.open_masks())[:, IDS_CUT]
    assert torch.allclose(logits(module), expected, atol=1e-5)
    assert (unmasked - expected).abs().max() > 1e-3
    assert module.config.equivalence["status"] == "verified"
    assert base_parameters(module) < base_parameters(parent)
    ours = {tensor.data_ptr() for tensor in parent.state_dict().values() if tensor.numel()}
    assert not ours & {tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel()}


def test_parents_and_modules_survive_files_and_a_cut_on_load_is_the_same(family, tmp_path):
    parent = parent_of(family)
    module = parent.extract_module(LABELS_CUT)
    module.save_pretrained(tmp_path / "module")
    loaded = auto_class(module).from_pretrained(tmp_path / "module")
    loaded.save_pretrained(tmp_path / "module again")
    assert torch.equal(logits(loaded), logits(module))
    assert_same_files(tmp_path / "module", tmp_path / "module again")
    assert loaded.config.id2label == {0: "ship", 1: "dog"}
    with safe_open(tmp_path / "module" / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if not name.endswith("_indices")]  # noqa: SIM118 - no mapping
        assert sum(weights.get_tensor(name).numel() for name in names) == base_parameters(module)

    parent.save_pretrained(tmp_path / "parent")
    loaded = auto_class(parent).from_pretrained(tmp_path / "parent")
    assert torch.equal(logits(loaded), logits(parent))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in parent.state_dict().items())
    cut = auto_class(parent).from_pretrained(tmp_path / "parent", labels=LABELS_CUT, verify=True)
    assert torch.equal(logits(cut), logits(module))
    assert cut.state_dict().keys() == module.state_dict().keys()
    assert cut.config.equivalence["status"] == "verified"
    loaded.save_pretrained(tmp_path / "parent again")
    assert_same_files(tmp_path / "parent", tmp_path / "parent again")


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.sweep), "gpt2", "llama"])
@pytest.mark.parametrize("pruning_mode", ["scatter", "scatter-gated", "dense-heads-kept", "dense-heads-kept-gated"])
def test_other_pruning_modes_compute_the_same(family, pruning_mode, hard, tmp_path):
    parent = attach_masks(fresh(family), generated(hard_masks=hard))
    randomize_relevance(parent)
    last = {mask.site.kind: mask for mask in parent.masks.site_masks()}
    attention, units = last["attention"], last["ffn"]
    attention.relevance[:, -attention.site.value_dim :] = 0  # the last head has no values
    units.relevance.zero_()
    expected = logits_under_mask(parent)
    chosen = {s.key: pruning_mode for s in parent.sites if pruning_mode in {b.name for b in s.pruning_modes}}
    sites, hooks = parent.sites, hooks_of(parent)
    parent.set_sites(with_pruning_modes(sites, chosen))
    assert (hooks_of(parent) > hooks) == ("gated" in pruning_mode)  # all that is produced is masked too
    assert {site.pruning_mode for site in parent.sites if site.kind == "attention"} == {pruning_mode}
    if not hard and "gated" in pruning_mode:  # a soft value counts where it is made and where it is read
        assert not torch.allclose(expected, logits_under_mask(parent), atol=1e-3)
        expected = logits_under_mask(parent)
    module = parent.extract_module(LABELS_CUT)
    torch.testing.assert_close(logits(module), expected, atol=1e-5, rtol=1e-5)
    module.save_pretrained(tmp_path)
    assert torch.equal(logits(auto_class(module).from_pretrained(tmp_path)), logits(module))
    parent.set_sites(sites)
    assert hooks_of(parent) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parents_are_cut_unless_masks_are_soft(bert, dtype):
    parent = make_parent(bert.to(dtype), generated(relevance_threshold=0.6)).eval()
    randomize_relevance(parent)
    assert {p.dtype for p in parent.masks.parameters()} == {torch.float32}
    module = parent.extract_module(LABELS_CUT)
    assert (module.dtype, module.config.equivalence["status"]) == (dtype, "verified")
    with pytest.raises(ValueError, match="expected float32"):  # soft masks would be rounded
        make_parent(parent.detach_masks(), generated(hard_masks=False))


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "swin"])
def test_activation_checkpointing_changes_no_cut_and_stays_on(family):
    modules = []
    for is_on in (False, True):
        model = fresh(family)
        if is_on:
            model.activation_checkpointing_enable()
        parent = make_parent(model, generated(relevance_threshold=0.6)).eval()
        randomize_relevance(parent)
        modules.append(parent.extract_module(LABELS_CUT))
        assert parent.detach_masks().is_activation_checkpointing is is_on
        assert not modules[-1].is_activation_checkpointing
    for name, tensor in modules[0].state_dict().items():
        assert torch.equal(modules[1].state_dict()[name], tensor), name


def test_a_softmax_scale_that_follows_the_head_width_is_made_up_for():
    """MPNet computes it in forward: dense cuts are silently wrong unless q is scaled."""
    parent = make_parent(
        randomize(tiny("MPNetForSequenceClassification", **{**TEXT, "num_hidden_layers": 1}), 0.3), generated()
    )
    site = next(site for site in parent.sites if site.kind == "attention")
    assert site.cut_by.rescales
    randomize_relevance(parent)
    module = parent.extract_module([0, 2], threshold=0.7)
    assert module.config.equivalence["status"] == "verified"
    assert {entry["key"]: entry["widths"] for entry in module.config.sites}[site.key]["head_dim"] < site.head_dim
    parent.set_sites(with_pruning_modes(parent.sites, {site.key: site.pruning_mode.replace("-rescaled", "")}))
    with pytest.raises(EquivalenceError, match="expected at most"):
        parent.extract_module([0, 2], threshold=0.7)


def test_a_broken_cut_is_refused_and_one_without_effect_is_unverified():
    parent = parent_of("vit")
    module = parent.extract_module(LABELS_CUT)
    with torch.no_grad():
        module.model.classifier.bias += 1e-3
    with pytest.raises(EquivalenceError, match="expected at most"):
        check_equivalence(parent, module, make_plan(parent, LABELS_CUT).static)
    for mask in parent.masks.site_masks():
        mask.relevance.fill_(255)
    assert parent.extract_module(LABELS_CUT).config.equivalence["status"] == "unverified"


def test_groups_stand_for_their_labels():
    groups = {"pets": ["cat", "dog"], "vehicles": ["ship", "car"], "frog": ["frog"]}
    parent = parent_of("vit", label_groups=groups)
    assert list(parent.extract_module("vehicles").config.id2label.values()) == ["ship", "car"]
    module = parent.extract_module(["frog", "dog"])
    assert list(module.config.id2label.values()) == ["frog", "dog"]
    assert module.config.groups == {"pets": [0, 1], "frog": [4]}
    pets = make_plan(parent, ["cat"]).static
    assert all(torch.equal(mask, pets[key]) for key, mask in make_plan(parent, ["dog"]).static.items())


def parent_with_empty_attention(family: str):
    """The first attention is of no use to any label."""
    parent = parent_of(family)
    next(mask for mask in parent.masks.site_masks() if mask.site.kind == "attention").relevance.zero_()
    return parent


def closed_layers(module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, ClosedLinear)]


def test_attention_without_neurons_computes_nothing_and_the_cut_is_exact(family, tmp_path):
    parent = parent_with_empty_attention(family)
    output = next(site.output for site in parent.sites if site.kind == "attention")
    module = parent.extract_module(LABELS_CUT)
    torch.testing.assert_close(logits(module), logits_under_mask(parent), atol=1e-5, rtol=1e-5)
    is_plain = type(parent.model.get_submodule(output)) is torch.nn.Linear
    assert (f"model.{output}" in closed_layers(module)) == is_plain
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert closed_layers(loaded) == closed_layers(module)
    assert torch.equal(logits(loaded), logits(module))
    # Without units too.
    list(parent.masks.site_masks())[-1].relevance.zero_()
    module = parent.extract_module(LABELS_CUT)
    torch.testing.assert_close(logits(module), logits_under_mask(parent), atol=1e-5, rtol=1e-5)


def test_a_tuned_module_computes_what_it_may_have_learned(tmp_path):
    parent = parent_with_empty_attention("vit")
    module = parent.extract_module(LABELS_CUT)
    inputs = random_inputs(parent)
    module.train()
    module(**inputs, labels=torch.arange(4) % 2).loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.01 * parameter.grad
    module.eval().save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert closed_layers(module)
    assert not closed_layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(module))
