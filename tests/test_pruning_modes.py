"""From a plain model to a parent by trial cuts: what is left out or refused, and which pruning mode is taken."""

import copy
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SIZES, TEXT, fresh, generated, hooks_of, logits_of, randomize, randomize_relevance, tiny
from transformers import AutoModelForAudioClassification

import nemo_hf.models.extraction
from nemo_hf import UnsupportedArchitectureError, make_parent
from nemo_hf.auto_classes import NeMoForImageClassification
from nemo_hf.models.pruning_modes import random_keep
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.trial_inputs import random_inputs


def wavlm():
    sizes = {**SIZES, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "classifier_proj_size": 16}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return randomize(tiny("WavLMForSequenceClassification", **sizes, **positions))


def xlnet():
    sizes = {"vocab_size": 120, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
    return randomize(tiny("XLNetForSequenceClassification", **sizes))


def noisy():
    model = fresh("vit")
    model.vit.layernorm.register_forward_hook(lambda layer, inputs, output: output + torch.randn_like(output))
    return model


def vit_without_logits():
    model = fresh("vit")
    model.forward = model.vit.forward
    return model


def test_a_site_whose_layers_are_never_called_is_left_out_of_masks_and_files_with_a_warning(caplog, tmp_path):
    # WavLM hands the weights of its attention to a function and never calls the layers.
    model = wavlm()
    keys = [site.key for site in find_sites(model)]
    with caplog.at_level(logging.WARNING, "nemo_hf"):
        parent = make_parent(model, generated())
    assert "Got a model in which only ffn neurons were found; the rest stays whole." in caplog.messages
    assert len(keys) == 4
    assert list(parent.masks.relevance()) == [key for key in keys if key.endswith(":ffn")]
    assert parent.config.equivalence["status"] == "verified"
    randomize_relevance(parent)
    parent.save_pretrained(tmp_path)
    auto, inputs = AutoModelForAudioClassification, random_inputs(parent)
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.sites == parent.sites
    assert torch.equal(logits_of(loaded, **inputs), logits_of(parent, **inputs))
    cut = auto.from_pretrained(tmp_path, labels=[0, 1], verify=True)
    assert torch.equal(logits_of(cut, **inputs), logits_of(parent.extract_module([0, 1]), **inputs))


REFUSED = {
    xlnet: "^Got model type 'xlnet', whose ffn neurons in 'transformer.layer.0.ff' can't be cut: "
    r"the mask of one sample reaches the logits of another\. ",
    noisy: "^Got ViTForImageClassification, whose logits differ from call to call in eval mode; expected",
    vit_without_logits: r"\['last_hidden_state'.*\] has no logits; expected logits",
    wavlm: "^Got model type 'wavlm', which reads the weights of 'wavlm.encoder.layers.0.attention' .* without",
}


@pytest.mark.parametrize("build", list(REFUSED))
def test_a_model_that_can_t_be_cut_is_refused_and_left_as_it_was(build):
    model = build()
    inputs = random_inputs(model)
    model(**inputs)  # may attach hooks of transformers' own
    before = hooks_of(model)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSED[build]):
        make_parent(model, generated(targets=["attention" if build is wavlm else "ffn"]))
    assert hooks_of(model) == before


def test_a_model_that_does_not_run_on_the_inputs_is_refused(vit):
    message = r"^Got ViTForImageClassification, which does not run on .* \(2, 3, 20, 20\) \(.*\); expected .*make_p"
    with pytest.raises(ValueError, match=message) as refused:
        make_parent(vit.train(), generated(), inputs={"pixel_values": torch.zeros(2, 3, 20, 20)})
    assert not isinstance(refused.value, UnsupportedArchitectureError)  # other inputs may do
    assert hooks_of(vit) == 0
    assert vit.training


def spoiled(monkeypatch, is_spoiled, spoil) -> list[tuple[str, str]]:
    """Lets cuts of some sites go wrong where they cut anything; returns the sites and pruning modes that were tried."""
    tried, right = [], nemo_hf.models.extraction.site_cut

    def wrong(site, keep, static=None):
        cut = right(site, keep, static)
        if {name: len(kept) for name, kept in keep.items()} == site.parts:
            return cut
        tried.append((site.key, site.pruning_mode))
        return spoil(site, cut) if is_spoiled(site) else cut

    monkeypatch.setattr(nemo_hf.models.extraction, "site_cut", wrong)
    return tried


def off_by_a_little(site, cut):
    """The same layers with an output projection that is not the parent's."""
    layer = cut.layers[site.output]
    factor = torch.full((64,), 1.01)
    return replace(cut, layers={**cut.layers, site.output: replace(layer, input_scale=factor)})


def failing(monkeypatch, is_spoiled, error) -> list[tuple[str, str]]:
    """Lets modules with cuts of some sites raise an error when they run; returns what was tried, as `spoiled` does."""
    right = NeMoForImageClassification.forward

    def forward(self, *args, **kwargs):
        for site in self.sites if self.masks is None else ():
            if (
                is_spoiled(site)
                and self.model.get_submodule(site.output).weight.shape[1] < (32, 48)[site.kind == "ffn"]
            ):
                raise error
        return right(self, *args, **kwargs)

    monkeypatch.setattr(NeMoForImageClassification, "forward", forward)
    return spoiled(monkeypatch, is_spoiled, lambda site, cut: cut)


WRONG = {  # ways in which cuts go wrong, and what is then said
    "other logits": (partial(spoiled, spoil=off_by_a_little), "expected at most"),
    **{
        type(error).__name__: (partial(failing, error=error), f"{type(error).__name__}: no such cut")
        for error in (IndexError("no such cut"), RuntimeError("no such cut\nand more of it"), ValueError("no such cut"))
    },
}


@pytest.mark.parametrize("spoil", [spoil for spoil, _ in WRONG.values()], ids=list(WRONG))
def test_the_first_pruning_mode_that_is_exact_is_taken(vit, monkeypatch, spoil):
    def is_spoiled(site):
        return site.kind == "attention" and "heads-kept" not in site.pruning_mode

    tried = spoil(monkeypatch, is_spoiled)
    parent = make_parent(vit, generated())
    assert {site.kind: site.pruning_mode for site in parent.sites} == {"attention": "dense-heads-kept", "ffn": "dense"}
    assert [entry["pruning_mode"] for entry in parent.config.sites] == [site.pruning_mode for site in parent.sites]
    assert parent.config.equivalence["status"] == "verified"
    attention = list(dict.fromkeys(name for key, name in tried if key.endswith("attention")))
    assert attention == ["dense", "dense-rescaled", "dense-heads-kept"]  # and no other is tried


def assert_unchanged(model, plain):
    assert hooks_of(model) == 0
    inputs = random_inputs(model)
    assert torch.equal(logits_of(model, **inputs), logits_of(plain, **inputs))


@pytest.mark.parametrize(("way", "kind"), [("other logits", "attention"), ("RuntimeError", "ffn")])
def test_a_site_that_no_pruning_mode_cuts_exactly_is_refused(vit, monkeypatch, way, kind):
    plain = copy.deepcopy(vit)
    spoil, reason = WRONG[way]
    tried = spoil(monkeypatch, lambda site: site.kind == kind)
    other = "ffn" if kind == "attention" else "attention"
    with pytest.raises(
        UnsupportedArchitectureError,
        match=rf"^Got model type 'vit', whose {kind} neurons in 'vit.layers.0.*' can't be cut: no pruning mode cuts "
        rf"them exactly \(.*{reason}.*\)\. Leave them whole with NeMoConfig\(targets=\['{other}'\]\)\.$",
    ):
        make_parent(vit, generated())
    site = next(site for site in find_sites(plain) if site.kind == kind)
    assert {name for key, name in tried if key == site.key} == {mode.name for mode in site.pruning_modes}
    assert_unchanged(vit, plain)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        KeyboardInterrupt(),
        KeyError("of a bug"),
        OSError("of a disk"),
    ],
    ids=repr,
)
def test_an_error_that_is_not_about_a_cut_is_raised_as_it_is(vit, monkeypatch, error):
    plain = copy.deepcopy(vit)
    failing(monkeypatch, lambda site: True, error)
    with pytest.raises(type(error)) as raised:
        make_parent(vit, generated())
    assert raised.value is error
    monkeypatch.undo()
    assert_unchanged(vit, plain)


def test_an_error_while_a_cut_is_made_is_raised_as_it_is(vit, monkeypatch):
    def broken(site, cut):
        raise RuntimeError("of a bug")

    spoiled(monkeypatch, lambda site: True, broken)
    with pytest.raises(RuntimeError, match="of a bug"):
        make_parent(vit, generated())
    assert hooks_of(vit) == 0


def test_layers_of_one_class_share_a_pruning_mode(vit, monkeypatch):
    # The second layer alone goes wrong: both take the pruning mode that is right for both.
    def is_spoiled(site):
        return site.key == "vit.layers.1.attention:attention" and not site.cut_by.is_scattered

    spoiled(monkeypatch, is_spoiled, off_by_a_little)
    parent = make_parent(vit, generated())
    assert [site.pruning_mode for site in parent.sites if site.kind == "attention"] == ["scatter", "scatter"]


def test_samples_of_ones_own_or_a_single_one_are_tried_without_their_labels(vit):
    seen = []
    vit.register_forward_pre_hook(lambda layer, inputs, kwargs: seen.append(kwargs), with_kwargs=True)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    parent = make_parent(vit, generated(), inputs={"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])})
    assert parent.config.equivalence["samples"] == 3
    orders = [torch.stack([(call["pixel_values"] == image).flatten(1).all(1) for image in pixels]) for call in seen]
    assert all(bool((order.sum(0) == 1).all()) for order in orders)  # these samples and no others
    assert max(order.shape[1] for order in orders) == 3
    assert all(call.get("labels") is None for call in seen)
    model = fresh("gpt2")
    model.config.pad_token_id = None  # then it takes one text at a time
    assert make_parent(model, generated()).config.equivalence["samples"] == 1


def test_a_model_keeps_its_mode_its_weights_and_statistics_and_gets_rid_of_hooks():
    sizes = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2], "layer_type": "basic"}
    model = randomize(tiny("ResNetForImageClassification", **sizes)).train()
    before = copy.deepcopy(model.state_dict())
    parent = make_parent(model, generated())
    assert parent.training
    assert model.training
    assert parent.model is model
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    parent.detach_masks()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_about_half_of_the_chosen_neurons_are_kept_no_values_of_the_first_head_and_all_others(family):
    whole, *sites = all_sites = find_sites(fresh(family))
    keep = random_keep(all_sites, {site.key for site in sites})
    assert {name: len(kept) for name, kept in keep[whole.key].items()} == whole.parts
    for site in sites:
        for name, size in site.parts.items():
            assert 0.1 * size < len(set(keep[site.key][name].tolist())) < 0.8 * size
        if site.kind == "attention":
            assert keep[site.key]["value"].min() >= site.value_dim
            # Frequencies belong to all heads; other q.k dimensions go with their head.
            assert (keep[site.key]["query_key"].min() >= site.query_key_dims) == (family == "vit")


def test_fresh_weights_do_not_hide_what_reads_all_units():
    """A new response norm multiplies by 0; trained, it mixes all units."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    parent = make_parent(tiny("ConvNextV2ForImageClassification", **sizes), generated())
    assert {site.pruning_mode for site in parent.sites} == {"scatter-gated"}


def test_soft_masks_that_shared_positions_would_take_twice_are_refused():
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    model = tiny("DebertaV2ForSequenceClassification", **TEXT, **positions, share_att_key=True)
    with pytest.raises(UnsupportedArchitectureError, match="deberta-v2"):
        make_parent(model, generated(hard_masks=False))
    make_parent(model, generated(hard_masks=True))


def test_a_warning_says_that_described_sites_are_exact_only_with_gates(vit, caplog):
    layer = "vit.layers.*.attention"
    odd = {"kind": "ffn", "producers": [f"{layer}.q_proj"], "output": f"{layer}.o_proj"}
    make_parent(vit, generated(sites=[odd]))
    assert "look for a layer in the wrong place" in caplog.text
