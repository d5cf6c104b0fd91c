"""Cut layers: no wider than the kept neurons need, with the angles of rotary heads, and only at possible widths."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import fresh
from test_neuron_sites import attention, fused

from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.sites import FeedForwardSite, NeuronSite, Rows, with_pruning_modes
from nemo_hf.pruning.layer_cuts import cut_tensor, site_cut, tensor_cuts
from nemo_hf.pruning.resize import check_widths, resize


def with_mode(site: NeuronSite, pruning_mode: str) -> NeuronSite:
    (chosen,) = with_pruning_modes([site], {site.key: pruning_mode})
    return chosen


def cut_tensors(model, site, keep) -> dict[str, torch.Tensor]:
    state, cuts = model.state_dict(), tensor_cuts(model, [site_cut(site, keep)], {})
    return {name: cut_tensor(state[name].index_select if name in state else None, cut) for name, cut in cuts.items()}


@pytest.mark.parametrize(("pruning_mode", "heads"), [("dense", [0, 2, 3]), ("dense-heads-kept", [0, 1, 2, 3])])
def test_dense_heads_have_the_width_of_the_widest_and_go_without_values(pruning_mode, heads):
    # Head 0: three q.k dimensions, one value; head 1 has no value; head 2: none and two; head 3: four and five.
    keep = {"query_key": torch.tensor([0, 2, 7, 24, 25, 26, 27]), "value": torch.tensor([5, 16, 23, *range(24, 29)])}
    site = with_mode(find_sites(fresh("vit"), ["attention"])[0], pruning_mode)
    assert site_cut(site, keep).widths == {"key_value_heads": len(heads), "head_dim": 5}
    model = fresh("swin")  # a table of positions has a column for each head
    site = with_mode(find_sites(model, ["attention"])[-1], pruning_mode)
    tensors = cut_tensors(model, site, {"query_key": torch.arange(32), "value": torch.tensor([0, 17, 31])})
    (table,) = site.head_tensors
    assert torch.equal(tensors[table], model.get_parameter(table)[:, heads])


def test_dense_rotary_heads_keep_pairs_and_have_an_even_width():
    model = fresh("llama")  # two key/value heads of 8; dimension j is tied to j + 4
    site = find_sites(model, ["attention"])[0]
    for values, heads, width in (([0], 1, 2), ([0, 1, 2], 1, 4), (range(8), 1, 8), ([0, 1, 6, 9], 2, 4)):
        keep = {"query_key": torch.tensor([1]), "value": torch.tensor(values)}
        assert site_cut(site, keep).widths == {"key_value_heads": heads, "head_dim": width}
    tensors = cut_tensors(model, site, {"query_key": torch.tensor([0, 3]), "value": torch.tensor([0, 9])})
    assert tensors[f"{site.name}.nemo_rotary.angle_indices"].tolist() == [0, 3, 4, 7]


def test_a_rotary_layer_reads_its_angles_by_keyword_and_by_position_and_a_copy_its_own():
    model, hidden, full = fresh("llama"), torch.randn(2, 3, 32), tuple(torch.randn(2, 2, 3, 8))
    site = find_sites(model, ["attention"])[0]
    resize(model, site, {"key_value_heads": 2, "head_dim": 4})
    layers = [each.get_submodule(site.name) for each in (model, copy.deepcopy(model))]
    for layer, kept in zip(layers, ([1, 0, 5, 4], [2, 3, 6, 7]), strict=True):
        layer.nemo_rotary.angle_indices.copy_(torch.tensor(kept))
    for layer, kept in zip(layers, ([1, 0, 5, 4], [2, 3, 6, 7]), strict=True):
        (hook,) = layer._forward_pre_hooks.values()
        picked = tuple(each[..., kept] for each in full)
        by_keyword = hook(layer, (hidden,), {"position_embeddings": full, "attention_mask": None})
        torch.testing.assert_close(by_keyword[1]["position_embeddings"], picked, rtol=0, atol=0)
        by_position, _ = hook(layer, (hidden, full, hidden), {})  # that of LlamaAttention.forward
        torch.testing.assert_close(by_position, (hidden, picked, hidden), rtol=0, atol=0)


FEED_FORWARD = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),))
NEVER_EMPTY = replace(FEED_FORWARD, least_width=1)
SHARED = fused(Rows("qkv", 12, 8, 32, 2), shares=2)  # q, k and v of a head lie side by side
WIDTHS = {  # the full ones
    FEED_FORWARD: {"intermediate": 6},
    with_mode(FEED_FORWARD, "scatter"): {"intermediate": 6},
    NEVER_EMPTY: {"intermediate": 6},
    with_mode(NEVER_EMPTY, "scatter"): {"intermediate": 6},
    attention(): {"key_value_heads": 2, "head_dim": 8},
    with_mode(attention(), "scatter"): {"query": 32, "key": 16, "value": 16, "output": 32},
    SHARED: {"query": 16, "key": 8, "value": 8, "output": 16},
}


@pytest.mark.parametrize("site", list(WIDTHS), ids=lambda site: f"{site.kind}-{site.pruning_mode}-{site.least_width}")
def test_widths_are_those_of_the_site_up_to_its_full_ones(site):
    full, least = WIDTHS[site], int(site in (attention(), NEVER_EMPTY))
    for accepted in (full, dict.fromkeys(full, least)):
        check_widths(site, accepted)
    refused = [{}, {"intermediate": 3, "head_dim": 2}, {"width": 1}, None]
    for name, most in full.items():
        refused += [{**full, name: width} for width in (-1, least - 1, most + 1, 10**12, 2.0, "2", True, None)]
    for widths in refused:
        with pytest.raises(ValueError, match=rf"^Got the widths .* for '.*'; expected integers from {least} to {{.*}}"):
            check_widths(site, widths)
