"""Cut layers compute what the full ones do under a mask, and are no wider than the kept neurons need."""


import pytest
import torch
from conftest import fresh
from torch import nn

from nemo_hf.models.attach import attach_masks
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, NeuronSite, Rows, with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs
from nemo_hf.pruning.layer_cuts import site_cut
from nemo_hf.pruning.resize import resize
from nemo_hf.pruning.tensor_slices import cut_tensor, tensor_cuts


def with_mode(site: NeuronSite, pruning_mode: str) -> NeuronSite:
    (chosen,) = with_pruning_modes([site], {site.key: pruning_mode})
    return chosen


def first_site(model, kind: str, pruning_mode: str = "dense") -> NeuronSite:
    return with_mode(find_sites(model, [kind])[0], pruning_mode)


def kept_by(site, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = mask.split(list(site.parts.values()))
    return {name: part.nonzero().flatten() for name, part in zip(site.parts, parts, strict=True)}


def cut_tensors(model, site, keep, static=None) -> dict[str, torch.Tensor]:
    state, cuts = model.state_dict(), tensor_cuts(model, [site_cut(site, keep, static)], {})
    return {name: cut_tensor(state[name].index_select if name in state else None, cut) for name, cut in cuts.items()}


def cut_in_place(model, site, keep, static=None) -> None:
    state = {**model.state_dict(), **cut_tensors(model, site, keep, static)}
    resize(model, site, site_cut(site, keep).widths)
    model.load_state_dict(state, strict=True)


def random_mask(site, share: float = 0.5) -> torch.Tensor:
    return (torch.rand(site.neurons, generator=torch.Generator().manual_seed(0)) < share).float()


def soft_mask(site) -> torch.Tensor:
    return torch.rand(site.neurons, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.mark.parametrize("pruning_mode", ["dense", "dense-heads-kept", "scatter", "scatter-gated"])
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama", "swin"])
def test_a_cut_model_computes_what_the_parent_does_under_the_mask(family, pruning_mode):
    parent = attach_masks(fresh(family))
    modes = {s.key: pruning_mode for s in parent.sites if pruning_mode in [mode.name for mode in s.pruning_modes]}
    parent.set_sites(with_pruning_modes(parent.sites, modes))
    inputs = random_inputs(parent)
    for share, is_soft in ((0.5, False), (0.5, True), (0.0, False), (1.0, False)):
        model, static = fresh(family), {}
        for site in parent.sites:
            mask = random_mask(site, share)
            if isinstance(site, AttentionSite) and share < 1:
                mask[-site.value_dim :] = 0.0  # the last head has no values
            soft = soft_mask(site) if is_soft else None
            static[site.key] = mask if soft is None else mask * soft
            cut_in_place(model, site, kept_by(site, mask), soft)
        with torch.no_grad():
            expected, full = parent(**inputs, static_masks=static).logits, parent(**inputs).logits
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.allclose(expected, full, atol=1e-3) == (share == 1)


@pytest.mark.parametrize(("pruning_mode", "heads"), [("dense", [0, 2, 3]), ("dense-heads-kept", [0, 1, 2, 3])])
def test_dense_heads_have_the_width_of_the_widest_and_go_without_values(pruning_mode, heads):
    # Head 0: three q.k dimensions, one value; head 1 has no value; head 2: none and two; head 3: four and five.
    keep = {"query_key": torch.tensor([0, 2, 7, 24, 25, 26, 27]), "value": torch.tensor([5, 16, 23, *range(24, 29)])}
    site = first_site(fresh("vit"), "attention", pruning_mode)
    assert site_cut(site, keep).widths == {"key_value_heads": len(heads), "head_dim": 5}
    model = fresh("swin")  # a table of positions has a column for each head
    site = with_mode(find_sites(model, ["attention"])[-1], pruning_mode)
    tensors = cut_tensors(model, site, {"query_key": torch.arange(32), "value": torch.tensor([0, 17, 31])})
    (table,) = site.head_tensors
    assert torch.equal(tensors[table], model.get_parameter(table)[:, heads])


def test_dense_rotary_heads_keep_pairs_and_have_an_even_width():
    model = fresh("llama")  # two key/value heads of 8; dimension j is tied to j + 4
    site = first_site(model, "attention")
    for values, heads, width in (([0], 1, 2), ([0, 1, 2], 1, 4), (range(8), 1, 8), ([0, 1, 6, 9], 2, 4)):
        keep = {"query_key": torch.tensor([1]), "value": torch.tensor(values)}
        assert site_cut(site, keep).widths == {"key_value_heads": heads, "head_dim": width}
    tensors = cut_tensors(model, site, {"query_key": torch.tensor([0, 3]), "value": torch.tensor([0, 9])})
    assert tensors[f"{site.name}.nemo_rotary.angle_indices"].tolist() == [0, 3, 4, 7]


# Layers that hold several parts, or outputs that are no neurons


class Layers(nn.Module):
    """Linear layers of a block by name, of given widths; `o` reads the neurons."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, width in widths.items():
            setattr(self, name, nn.Linear(width, 5) if name == "o" else nn.Linear(5, width))


def attention(query: Rows, key: Rows, value: Rows, heads: int, key_value_heads: int, head_dim: int) -> AttentionSite:
    sizes = {"heads": heads, "key_value_heads": key_value_heads, "head_dim": head_dim}
    return AttentionSite("", query.layer, 5, "o", query=query, key_rows=key, value=value, **sizes)


def side_by_side(q, k, v):  # two key/value heads; in the share of each lie q of its three heads, k, and v
    return {"qkv": torch.cat([q.view(2, 12), k.view(2, 4), v.view(2, 4)], 1).flatten()}


def gate_beside_q(q, k, v):  # the gate of each head's output lies beside its q, and is no neuron
    return {"q": torch.cat([q.view(4, 4), torch.ones(4, 4)], 1).flatten(), "k": k, "v": v}


def latent(q, k, v):  # k and v of each head lie side by side; behind its q is a share that is rotated
    shares = [k.view(4, 3), v.view(4, 2)]
    return {"q": torch.cat([q.view(4, 3), torch.ones(4, 2)], 1).flatten(), "kv": torch.cat(shares, 1).flatten()}


SHARES = [Rows("qkv", start, size, 40, shares=2) for start, size in ((0, 24), (12, 8), (16, 8))]
LATENT = [Rows("q", 0, 12, 20, 4), Rows("kv", 0, 12, 20, 4), Rows("kv", 3, 8, 20, 4)]
GATED = [Rows("q", 0, 16, 32, shares=4), Rows("k", 0, 8), Rows("v", 0, 8)]
SITES = {
    side_by_side: attention(*SHARES, heads=6, key_value_heads=2, head_dim=4),
    gate_beside_q: attention(*GATED, heads=4, key_value_heads=2, head_dim=4),
    latent: attention(*LATENT, heads=4, key_value_heads=4, head_dim=3),
}


@pytest.mark.parametrize("layout", list(SITES), ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("pruning_mode", ["scatter", "scatter-gated"])
@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_of_a_shared_layer_only_the_rows_of_closed_neurons_go(layout, pruning_mode, share):
    assert SITES[layout].pruning_mode == "scatter"
    site = with_mode(SITES[layout], pruning_mode)
    soft, mask, sharing = soft_mask(site), random_mask(site, share), site.heads // site.key_value_heads

    def for_query_heads(values):
        return values.view(site.key_value_heads, -1).repeat_interleave(sharing, 0).flatten()

    def parts(values):
        qk, v = values.split(list(site.parts.values()))
        return for_query_heads(qk), qk, v

    (open_q, open_k, open_v), (q, k, v) = parts(mask), parts(mask * soft)
    kept = layout(open_q, open_k, open_v)
    factors = layout(q, k, v) if pruning_mode == "scatter-gated" else layout(q, open_k, open_v)
    read, hidden, values = for_query_heads(v), torch.randn(3, 5), torch.randn(3, site.heads * site.value_dim)
    model = Layers(**{name: len(rows) for name, rows in kept.items()}, o=len(read))
    expected = {name: model.get_submodule(name)(hidden) * factor for name, factor in factors.items()}
    expected_output = model.o(values * read)
    cut_in_place(model, site, kept_by(site, mask), soft)
    for name, outputs in expected.items():
        torch.testing.assert_close(model.get_submodule(name)(hidden), outputs)
        assert len(model.get_submodule(name).weight) == kept[name].sum()
    torch.testing.assert_close(model.o(values), expected_output)
    assert model.o.weight.shape[1] == (read > 0).sum()


@pytest.mark.parametrize("pruning_mode", ["dense", "scatter", "scatter-gated"])
@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_both_projections_of_a_gated_unit_in_one_layer_are_cut_alike(pruning_mode, share):
    producers = (Rows("qkv", 0, 6, 12), Rows("qkv", 6, 6, 12))
    site = FeedForwardSite("", "qkv", 5, "o", producers=producers, pruning_mode=pruning_mode)
    model, hidden, mask, soft = Layers(qkv=12, o=6), torch.randn(3, 5), random_mask(site, share), soft_mask(site)

    def outputs(at_producers=1.0, at_reader=1.0):
        gate, up = (part * at_producers for part in model.qkv(hidden).chunk(2, -1))
        return model.o(gate.sigmoid() * up * at_reader)

    expected = outputs(soft if pruning_mode == "scatter-gated" else 1.0, mask * soft)
    cut_in_place(model, site, kept_by(site, mask), soft)
    assert len(model.qkv.weight) == 2 * mask.sum()
    torch.testing.assert_close(outputs(), expected)
