"""Attention and feed-forward neurons are found in fused layers, shared heads, gates and latent attention."""

import copy

import pytest
import torch
from conftest import TEXT, fresh, randomize, tiny

from nemo_hf import make_parent
from nemo_hf.neurons.patterns import find_heads, find_sites
from nemo_hf.neurons.sites import Rows
from nemo_hf.neurons.trial_inputs import random_inputs

SMALL = {**TEXT, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MODELS = {
    "Bloom": {"vocab_size": 120, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0},
    "Falcon": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "GPTNeoX": SMALL,
    "ModernBert": SMALL,
    "Phi3": {**SMALL, "num_key_value_heads": 2},
    "Qwen3Next": {
        **SMALL,
        **LINEAR,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "DeepseekV3": {**SMALL, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": 4},
}


def model_of(name: str, **options):
    return tiny(f"{name}ForSequenceClassification", **MODELS[name], **options)


def found(name: str, kind: str):
    with torch.device("meta"):
        return find_sites(model_of(name), [kind])[0]


def rows_of(site) -> dict[str, Rows]:
    return {part: rows for rows, part in site.produced()}


def test_q_k_and_v_lie_side_by_side_for_each_head():
    site, layer = found("Bloom", "attention"), "transformer.h.0.self_attention.query_key_value"
    expected = {part: Rows(layer, start, 32, 96, shares=4) for part, start in (("query", 0), ("key", 8), ("value", 16))}
    assert rows_of(site) == expected
    assert (site.heads, site.key_value_heads, site.head_dim) == (4, 4, 8)


def test_queries_that_share_a_key_lie_beside_it():
    site, layer = found("Falcon", "attention"), "transformer.h.0.self_attention.query_key_value"
    # Two shares of two queries, one key and one value of eight dimensions each.
    sizes = {"query": (0, 32), "key": (16, 16), "value": (24, 16)}
    assert rows_of(site) == {part: Rows(layer, start, size, 64, shares=2) for part, (start, size) in sizes.items()}
    assert (site.heads, site.key_value_heads, site.head_dim) == (4, 2, 8)


def test_a_fused_layer_with_shared_keys_has_its_parts_one_after_another():
    site, layer = found("Phi3", "attention"), "model.layers.0.self_attn.qkv_proj"
    sizes = {"query": (0, 32), "key": (32, 16), "value": (48, 16)}
    assert rows_of(site) == {part: Rows(layer, start, size, 64) for part, (start, size) in sizes.items()}
    assert (site.heads, site.key_value_heads, site.head_dim, site.is_rotary) == (4, 2, 8, True)


@pytest.mark.parametrize(
    ("name", "layer"), [("ModernBert", "model.layers.0.mlp.Wi"), ("Phi3", "model.layers.0.mlp.gate_up_proj")]
)
def test_both_projections_of_gated_units_may_be_one_layer(name, layer):
    site = found(name, "ffn")
    assert site.producers == (Rows(layer, 0, 48, 96), Rows(layer, 48, 48, 96))
    assert site.parts == {"intermediate": 48}


def test_a_gate_beside_q_is_not_a_neuron():
    site = found("Qwen3Next", "attention")
    assert rows_of(site)["query"] == Rows("model.layers.0.self_attn.q_proj", 0, 32, 64, shares=4)
    assert rows_of(site)["key"] == Rows("model.layers.0.self_attn.k_proj", 0, 16)
    assert site.is_gated_only  # q and k are normed


def test_the_rotated_share_of_latent_attention_is_not_a_neuron():
    site = found("DeepseekV3", "attention")
    prefix = "model.layers.0.self_attn."
    assert rows_of(site) == {
        "query": Rows(f"{prefix}q_b_proj", 0, 24, 40, shares=4),
        "key": Rows(f"{prefix}kv_b_proj", 0, 24, 56, shares=4),
        "value": Rows(f"{prefix}kv_b_proj", 6, 32, 56, shares=4),
    }
    assert site.value_dim == 8
    assert not site.is_rotary  # the angles turn the other share
    assert site.parts == {"query_key": 24, "value": 32}


@pytest.mark.parametrize(("factor", "is_partial"), [(1.0, False), (0.5, True)])
def test_heads_that_are_rotated_in_part_are_only_gated(factor, is_partial):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    with torch.device("meta"):
        model = model_of("GPTNeoX", rope_parameters=rope)
    site = find_sites(model, ["attention"])[0]
    assert (site.is_rotary, site.is_gated_only) == (not is_partial, is_partial)


@torch.no_grad()
def without(model, parent, static):
    """A copy of a plain model in which the rows and columns of closed neurons are zeros."""
    reference = copy.deepcopy(model)
    for site in parent.sites:
        for rows, part in site.produced():
            # Units and values are closed where they are read: their activation may not be 0 at 0.
            if part in ("query", "key"):
                closed = rows.indices((site.part_mask(part, static[site.key]) == 0).nonzero().squeeze(-1))
                layer = reference.get_submodule(rows.layer)
                layer.weight[closed] = 0.0
                if layer.bias is not None:
                    layer.bias[closed] = 0.0
        closed = (site.read_mask(static[site.key]) == 0).nonzero().squeeze(-1)
        reference.get_submodule(site.output).weight[:, closed] = 0.0
    return reference


@pytest.mark.parametrize("name", list(MODELS))
def test_a_closed_neuron_is_one_that_the_model_doesn_t_have(name):
    model = randomize(model_of(name), 0.2)
    plain = copy.deepcopy(model)
    parent = make_parent(model)
    assert parent.config.equivalence["status"] == "verified"
    assert {site.kind for site in parent.sites} == {"attention", "ffn"}
    inputs, generator = random_inputs(parent), torch.Generator().manual_seed(0)
    static = {site.key: (torch.rand(site.neurons, generator=generator) < 0.5).float() for site in parent.sites}
    reference = without(plain, parent, static)
    with torch.no_grad():
        got = parent(**inputs, static_masks=static).logits
        torch.testing.assert_close(got, reference(**inputs).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(got, parent(**inputs).logits, atol=1e-3)


def test_a_head_of_another_name_is_found_where_only_one_layer_can_be_it(vit):
    vit.out_of_the_ordinary, vit.classifier = vit.classifier, torch.nn.Identity()
    assert find_heads(vit, 5) == ["out_of_the_ordinary"]
    with pytest.raises(ValueError, match=r"^Got model type 'vit' without a linear head of 7 outputs"):
        find_heads(vit, 7)
    vit.another = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"^Got model type 'vit' without a linear head of 5 outputs"):
        find_heads(vit, 5)


def test_the_head_is_not_the_layer_before_it(vit):
    model = fresh("roberta")  # dense, then out_proj
    assert find_heads(model, 5) == ["classifier.out_proj"]
    model.classifier.dense = torch.nn.Linear(32, 5)
    assert find_heads(model, 5) == ["classifier.out_proj"]
    vit.classifier = torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.GELU(), torch.nn.Linear(5, 5))
    assert find_heads(vit, 5) == ["classifier.2"]


def test_options_choose_the_kinds_of_sites(vit):
    for kind in ("attention", "ffn"):
        assert [site.kind for site in find_sites(vit, [kind])] == [kind] * 2


def test_a_model_is_walked_once_instead_of_path_by_path(bert, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "get_submodule", lambda self, path: pytest.fail(f"looked {path} up"))
    assert len(find_sites(bert)) == 4
