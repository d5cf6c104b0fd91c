"""Attention and feed-forward neurons are found in fused layers, shared heads, gates and latent attention."""

import copy

import pytest
import torch
from conftest import TEXT, fresh, generated, random_static, randomize, randomize_relevance, tiny, without

from nemo_hf import make_parent
from nemo_hf.models.extraction import make_plan
from nemo_hf.neurons.patterns import find_heads, find_sites
from nemo_hf.neurons.sites import Rows
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.plan import static_masks

SMALL = {**TEXT, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 24, "layer_types": ["full_attention"]}
MODELS = {
    "Bloom": {"vocab_size": 120, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0},
    "Falcon": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "GPTNeoX": SMALL,
    "ModernBert": SMALL,
    "Phi3": {**SMALL, "num_key_value_heads": 2},
    "Qwen3Next": {**SMALL, **LINEAR, **EXPERTS, "num_key_value_heads": 2, "head_dim": 8},
    "DeepseekV3": {**SMALL, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": 4},
}


def model_of(name: str, **options):
    return tiny(f"{name}ForSequenceClassification", **MODELS[name], **options)


def found(name: str, kind: str, **options):
    with torch.device("meta"):
        return find_sites(model_of(name, **options), [kind])[0]


ATTENTION = "model.layers.0.self_attn."
FUSED = "transformer.h.0.self_attention.query_key_value"
ROWS = {
    # q, k and v side by side for each head
    "Bloom": (Rows(FUSED, 0, 32, 96, 4), Rows(FUSED, 8, 32, 96, 4), Rows(FUSED, 16, 32, 96, 4)),
    # two shares of two queries, one key and one value of eight dimensions each
    "Falcon": (Rows(FUSED, 0, 32, 64, 2), Rows(FUSED, 16, 16, 64, 2), Rows(FUSED, 24, 16, 64, 2)),
    # one after another
    "Phi3": tuple(Rows(f"{ATTENTION}qkv_proj", start, size, 64) for start, size in ((0, 32), (32, 16), (48, 16))),
    # a gate beside q
    "Qwen3Next": (
        Rows(f"{ATTENTION}q_proj", 0, 32, 64, shares=4),
        *(Rows(f"{ATTENTION}{part}_proj", 0, 16) for part in "kv"),
    ),
    # The rotated share of latent attention is no neuron.
    "DeepseekV3": (
        Rows(f"{ATTENTION}q_b_proj", 0, 24, 40, shares=4),
        Rows(f"{ATTENTION}kv_b_proj", 0, 24, 56, shares=4),
        Rows(f"{ATTENTION}kv_b_proj", 6, 32, 56, shares=4),
    ),
}
MODES = {"ModernBert": "dense", "Phi3": "dense-heads-kept", "GPTNeoX": "scatter-gated", "Qwen3Next": "scatter-gated"}
HEADS = {"Bloom": (4, 4, 8), "Falcon": (4, 2, 8), "Phi3": (4, 2, 8), "Qwen3Next": (4, 2, 8), "DeepseekV3": (4, 4, 6)}


@pytest.mark.parametrize("name", list(ROWS))
def test_q_k_and_v_are_found_where_they_lie(name):
    site = found(name, "attention")
    assert tuple(rows for rows, _ in site.produced()) == ROWS[name]
    assert (site.heads, site.key_value_heads, site.head_dim) == HEADS[name]
    if name in ("Phi3", "DeepseekV3"):  # of the latter the angles turn the other share
        assert site.is_rotary == (name == "Phi3")
    assert site.is_gated_only == (name == "Qwen3Next")  # whose q and k are normed


@pytest.mark.parametrize("name", list(MODELS))
def test_a_closed_neuron_is_one_that_the_model_doesn_t_have_and_modules_are_exact(name):
    model = randomize(model_of(name), 0.2)
    plain = copy.deepcopy(model)
    parent = make_parent(model, generated())
    assert parent.config.equivalence["status"] == "verified"
    modes = {site.kind: site.pruning_mode for site in parent.sites}
    assert modes == {"attention": MODES.get(name, "scatter"), "ffn": "dense"}
    inputs, static = random_inputs(parent), random_static(parent)
    with torch.no_grad():
        got = parent(**inputs, static_masks=static).logits
        torch.testing.assert_close(got, without(plain, parent, static)(**inputs).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(got, parent(**inputs).logits, atol=1e-3)
    for hard in (True, False):
        parent = make_parent(parent.detach_masks(), generated(hard_masks=hard, relevance_threshold=0.6))
        randomize_relevance(parent)
        module = parent.extract_module([3, 1])
        assert module.config.equivalence["status"] == "verified"
        for site, keep in zip(parent.sites, make_plan(parent, [3, 1]).keep.values(), strict=True):
            if site.cut_by.is_scattered:  # of a shared layer only the rows of closed neurons go
                outputs = {rows.layer: rows.layer_outputs for rows, _ in site.produced()}
                static = static_masks([site], {site.key: keep})[site.key]
                for rows, part in site.produced():
                    outputs[rows.layer] -= int((site.part_mask(part, static) == 0).sum())
                assert {path: len(module.model.get_submodule(path).weight) for path in outputs} == outputs


def test_the_head_is_found_by_its_outputs(vit):
    roberta = fresh("roberta")  # dense, then out_proj
    roberta.classifier.dense = torch.nn.Linear(32, 5)
    assert find_heads(roberta, 5) == {"classifier.out_proj": 0}
    vit.other_name, vit.classifier = vit.classifier, torch.nn.Identity()
    assert find_heads(vit, 5) == {"other_name": 0}
    vit.another = torch.nn.Linear(3, 5)
    for outputs in (5, 7):
        with pytest.raises(ValueError, match=rf"^Got model type 'vit' without a linear head of {outputs} outputs"):
            find_heads(vit, outputs)


def test_a_model_is_walked_once_instead_of_path_by_path(bert, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "get_submodule", lambda self, path: pytest.fail(f"looked {path} up"))
    assert len(find_sites(bert)) == 4
