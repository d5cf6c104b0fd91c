"""Bases of attention heads: the model stays what it is, and the first dimensions are the best ones."""

import copy

import pytest
import torch
from conftest import fresh, logits_of, parent_of, randomize, tiny
from cutting_helpers import batches_for, cut, seen_by

from nemo_hf import extract_module
from nemo_hf.neurons.sites import AttentionSite
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.head_bases import change_query_key, change_value, query_key_basis, value_basis
from nemo_hf.pruning.layer_edits import layer_weight
from nemo_hf.pruning.statistics import measure_sites

QWEN = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip


def in_bases(model, sites, batches, parts=("value", "query_key")):
    """A copy whose heads have new bases."""
    changed, statistics = copy.deepcopy(model), measure_sites(model, sites, batches)
    for site in sites:
        if isinstance(site, AttentionSite) and "value" in parts:
            weight = layer_weight(changed.get_submodule(site.output))
            change_value(changed, site, *value_basis(site, statistics[site.key], weight)[:2])
        if isinstance(site, AttentionSite) and "query_key" in parts and not site.is_rotary:
            change_query_key(changed, site, *query_key_basis(site, statistics[site.key])[:2])
    return changed


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "swin", "albert"])
def test_a_model_in_other_bases_is_the_same_model(family):
    model, batches = fresh(family), batches_for(family)
    changed = in_bases(model, parent_of(family).sites, batches)
    moved = [name for name, p in changed.named_parameters() if not torch.equal(p, model.get_parameter(name))]
    assert moved
    assert all((".q" in name or ".k_" in name or "query" in name) is False for name in moved) or family != "llama"
    for batch in batches_for(family, seed=1):
        expected = logits_of(model, **batch)
        spread = expected.abs().max().item()
        torch.testing.assert_close(logits_of(changed, **batch), expected, rtol=0, atol=1e-5 * max(1.0, spread))


def by_head(rows, heads):
    return rows.double().unflatten(-1, (heads, -1)).movedim(1, 0)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_first_dimensions_are_the_best_approximation_of_their_rank(family, rank):
    model, batches = fresh(family), batches_for(family, 8)
    sites = [site for site in parent_of(family).sites if isinstance(site, AttentionSite)]
    changed = in_bases(model, sites, batches)
    before, after = seen_by(model, batches)[1], seen_by(changed, batches)[1]
    read = seen_by(model, batches)[0], seen_by(changed, batches)[0]
    for site in sites:
        query, key = (by_head(before[rows.layer], site.heads) for rows in (site.query, site.key_rows))
        new_query, new_key = (
            by_head(after[rows.layer], site.heads)[..., :rank] for rows in (site.query, site.key_rows)
        )
        # Of all pairs of a query and a key; the softmax ignores what all keys share.
        scores = query @ (key - key.mean(1, keepdim=True)).mT
        approximation = new_query @ (new_key - new_key.mean(1, keepdim=True)).mT
        assert_best(scores, approximation, rank)
        context, new_context = (by_head(found[site.output], site.heads) for found in read)
        weight, new_weight = (
            layer_weight(each.get_submodule(site.output)).mT.unflatten(0, (site.heads, -1)) for each in (model, changed)
        )
        assert_best(context @ weight, new_context[..., :rank] @ new_weight[:, :rank], rank)


def assert_best(whole, approximation, rank):
    """The error is that of a truncated singular value decomposition, for each head."""
    missing = torch.linalg.svdvals(whole)[:, rank:].square().sum(-1)
    found = (whole - approximation).square().sum((1, 2))
    total = whole.square().sum((1, 2))
    torch.testing.assert_close(found / total, missing / total, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "swin", "albert"])
def test_dropping_nothing_changes_nothing(family):
    model = fresh(family)
    module = cut(model, batches_for(family), 1.0, labels=(4, 0, 2), reconstruct=False)
    assert module.config.retained_neurons == module.config.extraction["weights"] == 1
    for batch in batches_for(family, seed=1):
        expected = logits_of(model, **batch)[:, [4, 0, 2]]
        torch.testing.assert_close(logits_of(module, **batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_looks_at_single_dimensions_keeps_its_own(attention):
    """Norms of q and k by head, as in Qwen3, are between the projections and their product."""
    model = randomize(tiny("Qwen3ForSequenceClassification", **QWEN))
    model.set_attn_implementation(attention)
    inputs = random_inputs(model, 64)
    batches = [{name: value[start : start + 16] for name, value in inputs.items()} for start in (0, 16, 32, 48)]
    module = extract_module(model, [0, 3], batches, 1.0, reconstruct=False, show_progress=False)
    own = module.model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        assert torch.equal(getattr(own, name).weight, getattr(model.model.layers[0].self_attn, name).weight)
    torch.testing.assert_close(logits_of(module, **batches[0]), logits_of(model, **batches[0])[:, [0, 3]])
