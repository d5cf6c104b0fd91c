"""Cut layers hold the rows and columns of what is kept, and nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import fresh
from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, NeuronSite, Rows, with_pruning_modes
from nemo_hf.pruning.layer_cuts import PAD, RotaryAngles, ScatterLinear, check_widths, resize, resize_head, site_cut
from nemo_hf.pruning.tensor_slices import cut_tensor, tensor_cuts

KEPT = torch.tensor([0, 3, 4, 17, 47])


def first_site(model, kind: str) -> NeuronSite:
    return find_sites(model, [kind])[0]


def cut_tensors(model, site, keep, static=None) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    cuts = tensor_cuts(model, [site_cut(site, keep, static)], {})
    return {name: cut_tensor(state[name].index_select if name in state else None, cut) for name, cut in cuts.items()}


def weight_and_bias(model, path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight as (outputs, inputs), and bias, of either kind of linear layer."""
    layer = model.get_submodule(path)
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight, layer.bias.detach()


def random_keep(site, seed=0, share=0.6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(size, generator=generator) < share).nonzero().squeeze(-1) for name, size in site.parts.items()
    }


def naive_heads(kept: torch.Tensor, heads: list[int], old_width: int, width: int) -> list[int]:
    """Old row of each new row, head by head, -1 for a row of zeros."""
    rows = []
    for head in heads:
        own = [row for row in kept.tolist() if row // old_width == head]
        rows.extend(own + [-1] * (width - len(own)))
    return rows


def naive_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return torch.stack([torch.zeros_like(tensor[0]) if row < 0 else tensor[row] for row in rows])


def assert_rows(model, site, cut, query_rows, value_rows) -> None:
    """The cut projections hold just these rows, and the output the columns of the values."""
    for rows, part in ((query_rows, site.query), (query_rows, site.key_rows), (value_rows, site.value)):
        weight, bias = weight_and_bias(model, part.layer)
        assert torch.equal(cut[f"{part.layer}.weight"], naive_rows(weight, rows))
        assert torch.equal(cut[f"{part.layer}.bias"], naive_rows(bias, rows))
    output, _ = weight_and_bias(model, site.output)
    assert torch.equal(cut[f"{site.output}.weight"], naive_rows(output.T, value_rows).T)


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_feed_forward_layers_keep_the_kept_units(family):
    model = fresh(family)
    site = first_site(model, "ffn")
    up, bias = weight_and_bias(model, site.producers[0].layer)
    down, _ = weight_and_bias(model, site.output)
    cut = cut_tensors(model, site, {"intermediate": KEPT})
    transposed = family == "gpt2"
    expected_up = torch.stack([up[unit] for unit in KEPT.tolist()])
    expected_down = torch.stack([down[:, unit] for unit in KEPT.tolist()], 1)
    assert torch.equal(cut[f"{site.producers[0].layer}.weight"], expected_up.T if transposed else expected_up)
    assert torch.equal(cut[f"{site.producers[0].layer}.bias"], bias[KEPT])
    assert torch.equal(cut[f"{site.output}.weight"], expected_down.T if transposed else expected_down)
    assert f"{site.output}.bias" not in cut


def test_gate_and_up_projections_are_cut_alike():
    model = fresh("llama")
    site = first_site(model, "ffn")
    cut = cut_tensors(model, site, {"intermediate": KEPT})
    layers = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(cut[f"model.layers.0.mlp.{name}.weight"], getattr(layers, name).weight[KEPT])
    assert torch.equal(cut["model.layers.0.mlp.down_proj.weight"], layers.down_proj.weight[:, KEPT])
    assert len(cut) == 3


def test_dense_heads_are_padded_with_zeros_to_one_width():
    model = fresh("vit")
    site = first_site(model, "attention")
    # Head 0: three q.k dimensions, one value; head 1 has no value and goes; head 2: none and two; head 3: all.
    keep = {
        "query_key": torch.tensor([0, 2, 7, 24, 25, 26, 27]),
        "value": torch.tensor([5, 16, 23, *range(24, 29)]),
    }
    width, heads = 5, [0, 2, 3]
    assert site_cut(site, keep).widths == {"key_value_heads": 3, "head_dim": width}
    cut = cut_tensors(model, site, keep)
    query_rows = naive_heads(keep["query_key"], heads, 8, width)
    value_rows = naive_heads(keep["value"], heads, 8, width)
    assert_rows(model, site, cut, query_rows, value_rows)


def test_a_fused_projection_keeps_its_three_shares_apart():
    model = fresh("gpt2")
    site = first_site(model, "attention")
    keep = random_keep(site, share=0.4)
    widths = site_cut(site, keep).widths
    heads = sorted({value // 8 for value in keep["value"].tolist()})
    assert widths["key_value_heads"] == len(heads)
    query_rows = naive_heads(keep["query_key"], heads, 8, widths["head_dim"])
    value_rows = naive_heads(keep["value"], heads, 8, widths["head_dim"])
    rows = [
        row if row < 0 else row + share * 32
        for share, part in enumerate((query_rows, query_rows, value_rows))
        for row in part
    ]
    weight, bias = weight_and_bias(model, site.query.layer)
    cut = cut_tensors(model, site, keep)
    assert torch.equal(cut[f"{site.query.layer}.weight"], naive_rows(weight, rows).T)
    assert torch.equal(cut[f"{site.query.layer}.bias"], naive_rows(bias, rows))


def with_back_end(site: NeuronSite, pruning_mode: str) -> NeuronSite:
    (chosen,) = with_pruning_modes([site], {site.key: pruning_mode})
    return chosen


def test_scattered_rotary_heads_keep_pairs_and_shared_heads():
    model = fresh("llama")  # 4 query heads of 8 share 2 key/value heads; dimension j is tied to j + 4
    site = with_back_end(first_site(model, "attention"), "scatter")
    keep = {"query_key": torch.tensor([0, 3]), "value": torch.tensor([0, 9])}
    cut = cut_tensors(model, site, keep)
    key = [0, 3, 4, 7, 8, 11, 12, 15]
    query = [head * 8 + row for head in range(4) for row in (0, 3, 4, 7)]
    output = [0, 8, 17, 25]
    attention = model.model.layers[0].self_attn
    for layer, rows in ((site.query.layer, query), (site.key_rows.layer, key), (site.value.layer, [0, 9])):
        assert cut[f"{layer}.output_indices"].tolist() == rows
        assert torch.equal(cut[f"{layer}.weight"], model.get_submodule(layer).weight[rows])
    assert cut[f"{site.output}.input_indices"].tolist() == output
    assert torch.equal(cut[f"{site.output}.weight"], attention.o_proj.weight[:, output])


@pytest.mark.parametrize("frequencies", [[0, 3], [2], [], [0, 1, 2, 3]])
def test_dense_rotary_heads_keep_pairs_in_two_halves(frequencies):
    model = fresh("llama")
    site = first_site(model, "attention")
    keep = {"query_key": torch.tensor(frequencies, dtype=torch.long), "value": torch.tensor([0, 1, 6, 9])}
    half = max(2, len(frequencies))  # three values are the most of a head, and a frequency is two dimensions
    cut = site_cut(site, keep)
    assert cut.widths == {"key_value_heads": 2, "head_dim": 2 * half}
    padded = frequencies + [-1] * (half - len(frequencies))
    within = padded + [row if row < 0 else row + 4 for row in padded]
    query = [row if row < 0 else row + 8 * head for head in range(4) for row in within]
    key = [row if row < 0 else row + 8 * head for head in range(2) for row in within]
    value = naive_heads(keep["value"], [0, 1], 8, 2 * half)
    shared = [value[: 2 * half], value[2 * half :]]  # two query heads read each
    output = [row if row < 0 else row % 8 + 8 * head for head in range(4) for row in shared[head // 2]]
    tensors = cut_tensors(model, site, keep)
    for layer, rows in ((site.query.layer, query), (site.key_rows.layer, key), (site.value.layer, value)):
        assert torch.equal(tensors[f"{layer}.weight"], naive_rows(model.get_submodule(layer).weight, rows))
    weight = model.get_submodule(site.output).weight
    assert torch.equal(tensors[f"{site.output}.weight"], naive_rows(weight.T, output).T)
    angles = tensors[f"{site.name}.nemo_rotary.angle_indices"]
    assert angles.tolist() == [max(row, 0) for row in within]


def test_a_dense_rotary_head_has_an_even_width():
    site = first_site(fresh("llama"), "attention")
    for values, width in (([0], 2), ([0, 1, 2], 4), (list(range(8)), 8)):
        keep = {"query_key": torch.tensor([1]), "value": torch.tensor(values)}
        assert site_cut(site, keep).widths == {"key_value_heads": 1, "head_dim": width}


class Rotated(nn.Module):
    """Attention layers get the angles of their positions, in any place of the call."""

    def forward(self, hidden, attention_mask=None, position_embeddings=None, scale=1):
        return hidden, attention_mask, position_embeddings, scale


def test_a_rotary_layer_reads_some_angles_by_keyword_and_by_position():
    layer, angles = Rotated(), RotaryAngles(4, 8)
    angles.angle_indices.copy_(torch.tensor([1, 0, 5, 4]))
    layer.register_forward_pre_hook(angles.narrow, with_kwargs=True)
    hidden, attention_mask = torch.randn(2, 3, 32), torch.ones(2, 3)
    cosines, sines = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    given = (cosines, sines)
    calls = [
        layer(hidden, attention_mask, given, 7),
        layer(hidden, attention_mask, position_embeddings=given, scale=7),
        layer(scale=7, position_embeddings=given, attention_mask=attention_mask, hidden=hidden),
    ]
    for got_hidden, got_mask, picked, scale in calls:
        assert got_hidden is hidden
        assert got_mask is attention_mask
        assert scale == 7
        assert len(picked) == 2
        for full, narrow in zip(given, picked, strict=True):
            assert torch.equal(narrow, torch.stack([full[..., column] for column in (1, 0, 5, 4)], -1))


def test_the_hook_of_a_copied_rotary_layer_is_its_own():
    model = fresh("llama")
    site = first_site(model, "attention")
    resize(model, site, {"key_value_heads": 2, "head_dim": 4})
    copied = copy.deepcopy(model)
    for each, indices in ((model, [0, 1, 4, 5]), (copied, [2, 3, 6, 7])):
        each.get_submodule(site.name).nemo_rotary.angle_indices.copy_(torch.tensor(indices))
    full = (torch.arange(8.0), torch.arange(8.0))
    for each, indices in ((model, [0, 1, 4, 5]), (copied, [2, 3, 6, 7])):
        attention = each.get_submodule(site.name)
        (hook,) = attention._forward_pre_hooks.values()
        _, kwargs = hook(attention, (), {"position_embeddings": full})
        assert kwargs["position_embeddings"][0].tolist() == indices


def test_a_table_with_a_column_a_head_loses_the_dropped_heads():
    model = fresh("swin")
    site = find_sites(model, ["attention"])[-1]
    assert site.heads == 4
    keep = {"query_key": torch.arange(32), "value": torch.tensor([0, 17, 31])}
    cut = cut_tensors(model, site, keep)
    (table,) = site.head_tensors
    assert torch.equal(cut[table], model.get_parameter(table)[:, [0, 2, 3]])


def test_soft_values_go_into_the_queries_and_into_what_reads():
    model = fresh("vit")
    ffn, attention = first_site(model, "ffn"), first_site(model, "attention")
    soft = torch.rand(48, generator=torch.Generator().manual_seed(0))
    exact, scaled = (cut_tensors(model, ffn, {"intermediate": KEPT}, static) for static in (None, soft))
    producer = ffn.producers[0].layer
    assert torch.equal(scaled[f"{producer}.weight"], exact[f"{producer}.weight"])
    torch.testing.assert_close(scaled[f"{ffn.output}.weight"], exact[f"{ffn.output}.weight"] * soft[KEPT])

    soft = torch.rand(64, generator=torch.Generator().manual_seed(0))
    keep = {"query_key": torch.arange(32), "value": torch.arange(32)}
    exact, scaled = (cut_tensors(model, attention, keep, static) for static in (None, soft))
    query, key, value = (f"{rows.layer}.weight" for rows in (attention.query, attention.key_rows, attention.value))
    torch.testing.assert_close(scaled[query], exact[query] * soft[:32, None])
    torch.testing.assert_close(scaled[query[:-6] + "bias"], exact[query[:-6] + "bias"] * soft[:32])
    assert torch.equal(scaled[key], exact[key])
    assert torch.equal(scaled[value], exact[value])
    torch.testing.assert_close(scaled[f"{attention.output}.weight"], exact[f"{attention.output}.weight"] * soft[32:])


def test_soft_values_leave_the_keys_and_values_of_a_fused_projection():
    model = fresh("gpt2")
    site = first_site(model, "attention")
    soft = torch.rand(64, generator=torch.Generator().manual_seed(0))
    keep = {"query_key": torch.arange(32), "value": torch.arange(32)}
    exact, scaled = (cut_tensors(model, site, keep, static) for static in (None, soft))
    factor = torch.cat([soft[:32], torch.ones(64)])
    for name in (f"{site.query.layer}.weight", f"{site.query.layer}.bias"):
        torch.testing.assert_close(scaled[name], exact[name] * factor)


@pytest.mark.parametrize("pruning_mode", ["dense-rescaled", "dense-heads-kept-rescaled"])
@pytest.mark.parametrize("family", ["vit", "gpt2", "llama"])
def test_queries_take_up_the_softmax_scale_that_a_layer_computes_anew(family, pruning_mode):
    model = fresh(family)
    site = first_site(model, "attention")
    keep = {"query_key": torch.tensor([0, 1, 3]), "value": torch.tensor([0, 1, 9])}
    if family == "llama":
        keep["query_key"] = torch.tensor([0, 3])
    width = site_cut(site, keep).widths["head_dim"]
    assert width < site.head_dim
    plain, rescaled = (with_back_end(site, name) for name in (pruning_mode.replace("-rescaled", ""), pruning_mode))
    expected, got = (cut_tensors(model, each, keep) for each in (plain, rescaled))
    assert site_cut(plain, keep).widths == site_cut(rescaled, keep).widths
    assert list(expected) == list(got)
    heads = site_cut(rescaled, keep).widths["key_value_heads"] * (site.heads // site.key_value_heads)
    for name, tensor in expected.items():
        if name.startswith(f"{site.query.layer}."):
            factor = torch.ones(tensor.shape[-1] if family == "gpt2" else len(tensor))
            factor[: heads * width] = (width / site.head_dim) ** 0.5
            shape = (-1, 1) if tensor.ndim > 1 and family != "gpt2" else (-1,)
            torch.testing.assert_close(got[name], tensor * factor.view(shape))
        else:
            assert torch.equal(got[name], tensor)


def test_heads_that_are_kept_have_zeros_in_place_of_what_is_cut():
    model = fresh("vit")
    site = with_back_end(first_site(model, "attention"), "dense-heads-kept")
    keep = {"query_key": torch.tensor([0, 2, 7, 24, 25]), "value": torch.tensor([5, 16, 23, 24])}  # head 1 has nothing
    assert site_cut(site, keep).widths == {"key_value_heads": 4, "head_dim": 3}
    cut = cut_tensors(model, site, keep)
    query_rows = naive_heads(keep["query_key"], [0, 1, 2, 3], 8, 3)
    value_rows = naive_heads(keep["value"], [0, 1, 2, 3], 8, 3)
    assert value_rows[3:6] == [-1, -1, -1]
    assert_rows(model, site, cut, query_rows, value_rows)


def test_heads_that_are_kept_keep_their_columns_of_a_table():
    model = fresh("swin")
    site = with_back_end(find_sites(model, ["attention"])[-1], "dense-heads-kept")
    cut = cut_tensors(model, site, {"query_key": torch.arange(32), "value": torch.tensor([0])})
    (table,) = site.head_tensors
    assert torch.equal(cut[table], model.get_parameter(table))


class FusedAttention(nn.Module):
    """Layers of an attention block by name: fused q, k and v, or q with a gate beside it."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, width in widths.items():
            setattr(self, name, nn.Linear(width, 5) if name == "o" else nn.Linear(5, width))


def kept_outputs(site: AttentionSite, static: dict[str, torch.Tensor], layer: str, share: dict[str, int]) -> list[int]:
    """Outputs of a layer that stay, gone through one by one: `share` names the widths in each head's share."""
    kept, output, numbers = [], 0, dict.fromkeys(share, 0)
    total = {rows.layer: rows.layer_outputs for rows, _ in site.produced()}[layer]
    while output < total:
        for part, width in share.items():
            for _ in range(width):
                if part not in static or static[part][numbers[part]]:
                    kept.append(output)
                numbers[part] += 1
                output += 1
    return kept


def open_by_loops(site: AttentionSite, keep) -> dict[str, list[bool]]:
    """Whether each row of q, k and v is kept, where no head is rotated."""
    query_key = [index in keep["query_key"].tolist() for index in range(site.parts["query_key"])]
    value = [index in keep["value"].tolist() for index in range(site.parts["value"])]
    return {"query": shared_by_queries(site, query_key, site.head_dim), "key": query_key, "value": value}


def shared_by_queries(site: AttentionSite, values: list, width: int) -> list:
    """Gives each query head what its key/value head has."""
    sharing = site.heads // site.key_value_heads
    return [values[head // sharing * width + dim] for head in range(site.heads) for dim in range(width)]


SIDE_BY_SIDE = AttentionSite(  # two key/value heads; in the share of each lie q of its three heads, k, and v
    "",
    "qkv",
    5,
    "o",
    query=Rows("qkv", 0, 24, 40, shares=2),
    key_rows=Rows("qkv", 12, 8, 40, shares=2),
    value=Rows("qkv", 16, 8, 40, shares=2),
    heads=6,
    key_value_heads=2,
    head_dim=4,
)
GATED_QUERY = AttentionSite(  # the gate of each head's output lies beside its q, and is no neuron
    "",
    "q",
    5,
    "o",
    query=Rows("q", 0, 16, 32, shares=4),
    key_rows=Rows("k", 0, 8),
    value=Rows("v", 0, 8),
    heads=4,
    key_value_heads=2,
    head_dim=4,
)
LATENT = AttentionSite(  # k and v of each head lie side by side; behind its q is a share that is rotated
    "",
    "q",
    5,
    "o",
    query=Rows("q", 0, 12, 20, shares=4),
    key_rows=Rows("kv", 0, 12, 20, shares=4),
    value=Rows("kv", 3, 8, 20, shares=4),
    heads=4,
    key_value_heads=4,
    head_dim=3,
)
FUSED = {
    "side by side": (SIDE_BY_SIDE, {"qkv": 40, "o": 24}, {"qkv": {"query": 12, "key": 4, "value": 4}}),
    "gate beside q": (
        GATED_QUERY,
        {"q": 32, "k": 8, "v": 8, "o": 16},
        {"q": {"query": 4, "gate": 4}, "k": {"key": 4}, "v": {"value": 4}},
    ),
    "latent": (
        LATENT,
        {"q": 20, "kv": 20, "o": 8},
        {"q": {"query": 3, "rotated": 2}, "kv": {"key": 3, "value": 2}},
    ),
}


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_rows_of_a_shared_layer_that_are_no_neurons_stay(name, share):
    site, widths, layouts = FUSED[name]
    assert site.pruning_mode == "scatter"
    model, keep = FusedAttention(**widths), random_keep(site, share=share)
    state, static = dict(model.state_dict()), open_by_loops(site, keep)
    cut = cut_tensors(model, site, keep)
    for layer, layout in layouts.items():
        rows = kept_outputs(site, static, layer, layout)
        assert cut[f"{layer}.output_indices"].tolist() == rows
        assert torch.equal(cut[f"{layer}.weight"], state[f"{layer}.weight"][rows])
        assert torch.equal(cut[f"{layer}.bias"], state[f"{layer}.bias"][rows])
    is_read = shared_by_queries(site, static["value"], site.value_dim)
    read = [column for column, is_open in enumerate(is_read) if is_open]
    assert cut[f"{site.output}.input_indices"].tolist() == read
    assert torch.equal(cut["o.weight"], state["o.weight"][:, read])
    resize(model, site, site_cut(site, keep).widths)
    model.load_state_dict({**state, **cut}, strict=True)
    hidden = torch.randn(3, 5)
    for layer, layout in layouts.items():
        kept = torch.zeros(widths[layer])
        kept[kept_outputs(site, static, layer, layout)] = 1.0
        expected = (hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]) * kept
        torch.testing.assert_close(model.get_submodule(layer)(hidden), expected)


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("pruning_mode", ["scatter", "scatter-gated"])
def test_soft_values_scale_the_rows_of_their_parts_alone(name, pruning_mode):
    site, widths, layouts = FUSED[name]
    site = with_back_end(site, pruning_mode)
    model = FusedAttention(**widths)
    keep = {part: torch.arange(size) for part, size in site.parts.items()}
    soft = torch.rand(site.neurons, generator=torch.Generator().manual_seed(0)) + 0.1
    exact, scaled = cut_tensors(model, site, keep), cut_tensors(model, site, keep, soft)
    query_key, value = (part.tolist() for part in soft.split(list(site.parts.values())))
    factors = {
        "query": shared_by_queries(site, query_key, site.head_dim),
        "key": query_key if pruning_mode == "scatter-gated" else [],
        "value": value if pruning_mode == "scatter-gated" else [],
    }
    for layer, layout in layouts.items():
        numbers, expected = dict.fromkeys(layout, 0), []
        while len(expected) < widths[layer]:
            for part, width in layout.items():
                for _ in range(width):
                    expected.append(factors[part][numbers[part]] if factors.get(part) else 1.0)
                    numbers[part] += 1
        factor = torch.tensor(expected)
        torch.testing.assert_close(scaled[f"{layer}.weight"], exact[f"{layer}.weight"] * factor[:, None])
        torch.testing.assert_close(scaled[f"{layer}.bias"], exact[f"{layer}.bias"] * factor)
    torch.testing.assert_close(scaled["o.weight"], exact["o.weight"] * site.read_mask(soft))


@pytest.mark.parametrize("pruning_mode", ["dense", "scatter", "scatter-gated"])
@pytest.mark.parametrize("kept", [[0, 2, 3], [], [0, 1, 2, 3, 4, 5]], ids=str)
def test_both_projections_of_a_gated_unit_in_one_layer_are_cut_alike(pruning_mode, kept):
    producers = (Rows("qkv", 0, 6, 12), Rows("qkv", 6, 6, 12))
    site = FeedForwardSite("", "qkv", 5, "o", producers=producers, pruning_mode=pruning_mode)
    model, index = FusedAttention(qkv=12, o=6), torch.tensor(kept, dtype=torch.long)
    state, cut = dict(model.state_dict()), site_cut(site, {"intermediate": index})
    rows = [*kept, *(unit + 6 for unit in kept)]
    assert cut.widths == {"intermediate": len(kept)}
    tensors = cut_tensors(model, site, {"intermediate": index})
    assert torch.equal(tensors["qkv.weight"], state["qkv.weight"][rows])
    assert torch.equal(tensors["qkv.bias"], state["qkv.bias"][rows])
    assert torch.equal(tensors["o.weight"], state["o.weight"][:, kept])
    resize(model, site, cut.widths)
    model.load_state_dict({**state, **tensors}, strict=True)
    hidden = torch.randn(3, 5)
    gate, up = model.qkv(hidden).chunk(2, -1)
    full_gate, full_up = (hidden @ state["qkv.weight"].T + state["qkv.bias"]).chunk(2, -1)
    opened = torch.zeros(6).index_fill(0, index, 1.0)
    expected = (full_gate.sigmoid() * full_up * opened) @ state["o.weight"].T + state["o.bias"]
    torch.testing.assert_close(model.o(gate.sigmoid() * up), expected)


def test_soft_values_of_gated_units_go_into_both_projections_where_they_close_there():
    producers = (Rows("qkv", 0, 6, 12), Rows("qkv", 6, 6, 12))
    site = FeedForwardSite("", "qkv", 5, "o", producers=producers, is_gated_only=True)
    assert site.pruning_mode == "scatter-gated"
    model, keep = FusedAttention(qkv=12, o=6), {"intermediate": torch.arange(6)}
    soft = torch.rand(6, generator=torch.Generator().manual_seed(0))
    exact, scaled = cut_tensors(model, site, keep), cut_tensors(model, site, keep, soft)
    torch.testing.assert_close(scaled["qkv.weight"], exact["qkv.weight"] * torch.cat([soft, soft])[:, None])
    torch.testing.assert_close(scaled["qkv.bias"], exact["qkv.bias"] * torch.cat([soft, soft]))
    torch.testing.assert_close(scaled["o.weight"], exact["o.weight"] * soft)


@pytest.mark.parametrize("share", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("pruning_mode", ["dense", "dense-heads-kept-rescaled", "scatter"])
def test_resized_layers_take_exactly_the_cut_tensors(plain, share, pruning_mode):
    state = plain.state_dict()
    for site in find_sites(plain):
        if pruning_mode in {each.name for each in site.pruning_modes}:
            site = with_back_end(site, pruning_mode)
        keep = random_keep(site, share=share)
        cut = site_cut(site, keep)
        state.update(cut_tensors(plain, site, keep))
        resize(plain, site, cut.widths)
    plain.load_state_dict(state, strict=True)
    assert all(parameter.device.type == "cpu" for parameter in plain.parameters())


def test_attention_layers_know_their_new_widths():
    model = fresh("bert")
    site = first_site(model, "attention")
    scale = model.get_submodule(site.name).scaling
    resize(model, site, {"key_value_heads": 3, "head_dim": 5})
    attention = model.get_submodule(site.name)
    assert attention.attention_head_size == 5
    assert attention.all_head_size == 15
    assert attention.scaling == scale


def test_everything_kept_changes_nothing(plain):
    for site in find_sites(plain):
        keep = {name: torch.arange(size) for name, size in site.parts.items()}
        for name, tensor in cut_tensors(plain, site, keep).items():
            if "indices" not in name:
                old = plain.state_dict()[name]
                is_scattered_conv1d = tensor.shape != old.shape
                assert torch.equal(tensor, old.T if is_scattered_conv1d else old)


def test_heads_follow_the_order_of_the_labels():
    model = fresh("vit")
    labels = torch.tensor([3, 0])
    state = model.state_dict()
    cuts = tensor_cuts(model, [], {"classifier": labels})
    cut = {name: cut_tensor(state[name].index_select, tensor_cut) for name, tensor_cut in cuts.items()}
    resize_head(model, "classifier", 2)
    assert torch.equal(cut["classifier.weight"], state["classifier.weight"][labels])
    assert model.classifier.weight.shape == cut["classifier.weight"].shape


def test_padded_rows_are_zero_in_any_order_and_dtype():
    layer = nn.Linear(3, 4, dtype=torch.bfloat16)
    cuts = tensor_cuts(nn.Sequential(layer), [], {})
    assert cuts == {}
    index = torch.tensor([PAD, 2, PAD, 0])
    holder = nn.ModuleDict({"head": layer})
    for name, cut in tensor_cuts(holder, [], {"head": index}).items():
        old = holder.state_dict()[name]
        new = cut_tensor(old.index_select, cut)
        assert new.dtype == torch.bfloat16
        assert new[[0, 2]].abs().max() == 0
        assert torch.equal(new[[1, 3]], old[[2, 0]])


@pytest.mark.parametrize(
    ("kind", "has_bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)], ids=["linear", "no bias", "Conv1D"]
)
def test_a_scattered_layer_is_the_full_one_under_a_mask(kind, has_bias):
    torch.manual_seed(0)
    layer = Conv1D(6, 5) if kind is Conv1D else nn.Linear(5, 6, bias=has_bias)
    weight = layer.weight.detach().T if kind is Conv1D else layer.weight.detach()
    outputs, inputs = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    hidden = torch.randn(2, 3, 5)

    writes = ScatterLinear(5, 3, full_outputs=6, full_inputs=None, has_bias=has_bias)
    writes.load_state_dict(
        {"weight": weight[outputs], "output_indices": outputs} | ({"bias": layer.bias[outputs]} if has_bias else {})
    )
    opened = torch.zeros(6).index_fill(0, outputs, 1.0)
    torch.testing.assert_close(writes(hidden), layer(hidden) * opened)

    reads = ScatterLinear(2, 6, full_outputs=None, full_inputs=5, has_bias=has_bias)
    reads.load_state_dict(
        {"weight": weight[:, inputs], "input_indices": inputs} | ({"bias": layer.bias} if has_bias else {})
    )
    torch.testing.assert_close(reads(hidden), layer(hidden * torch.zeros(5).index_fill(0, inputs, 1.0)))


def test_an_empty_scattered_layer_gives_zeros_or_its_bias():
    hidden = torch.randn(2, 3, 5)
    writes = ScatterLinear(5, 0, full_outputs=6, full_inputs=None, has_bias=True)
    assert torch.equal(writes(hidden), torch.zeros(2, 3, 6))
    reads = ScatterLinear(0, 6, full_outputs=None, full_inputs=5, has_bias=True)
    nn.init.constant_(reads.bias, 2.0)
    assert torch.equal(reads(hidden), torch.full((2, 3, 6), 2.0))


FEED_FORWARD = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),))
SCATTERED_UNITS = with_back_end(FEED_FORWARD, "scatter")
CONV = replace(FEED_FORWARD, least_width=1)
DENSE = AttentionSite(
    "attention",
    "q",
    8,
    "o",
    query=Rows("q", 0, 8),
    key_rows=Rows("k", 0, 8),
    value=Rows("v", 0, 8),
    heads=2,
    key_value_heads=2,
    head_dim=4,
    head_dim_attribute="head_dim",
)
SCATTERED = with_back_end(DENSE, "scatter")
FULL = {
    FEED_FORWARD: {"intermediate": 6},
    DENSE: {"key_value_heads": 2, "head_dim": 4},
    SCATTERED: {"query": 8, "key": 8, "value": 8, "output": 8},
    SCATTERED_UNITS: {"intermediate": 6},
    SIDE_BY_SIDE: {"query": 24, "key": 8, "value": 8, "output": 24},
}
SITES = pytest.mark.parametrize("site", list(FULL), ids=["ffn", "dense", "scatter", "scattered ffn", "side by side"])


@SITES
def test_widths_up_to_the_full_ones_are_accepted(site):
    check_widths(site, FULL[site])
    check_widths(site, dict.fromkeys(FULL[site], 1))


@SITES
@pytest.mark.parametrize("width", [-1, 25, 10**12, 2.0, "2", True, None])
def test_absurd_widths_are_refused(site, width):
    for name in FULL[site]:
        with pytest.raises(
            ValueError, match=rf"^Got the width {name}=.* for '.*'; expected an integer from .*\. The con"
        ):
            check_widths(site, {**FULL[site], name: width})


@SITES
@pytest.mark.parametrize("widths", [{}, {"intermediate": 3, "head_dim": 2}, {"width": 1}])
def test_widths_of_other_names_are_refused(site, widths):
    with pytest.raises(ValueError, match=r"^Got the widths \{.*\} for '.*'; expected one for each of \[.*\]\. The con"):
        check_widths(site, widths)


def test_dense_heads_can_t_be_none_but_scattered_rows_can():
    with pytest.raises(ValueError, match=r"expected an integer from 1 to 2"):
        check_widths(DENSE, {"key_value_heads": 0, "head_dim": 4})
    check_widths(SCATTERED, dict.fromkeys(FULL[SCATTERED], 0))


def test_units_can_be_none_except_where_torch_can_t_read_none():
    for site in (FEED_FORWARD, SCATTERED_UNITS, with_back_end(CONV, "scatter")):
        check_widths(site, {"intermediate": 0})
    with pytest.raises(ValueError, match=r"expected an integer from 1 to 6"):
        check_widths(CONV, {"intermediate": 0})
    assert site_cut(CONV, {"intermediate": torch.tensor([], dtype=torch.long)}).widths == {"intermediate": 1}


@SITES
def test_one_more_than_the_full_width_is_refused(site):
    for name, most in FULL[site].items():
        with pytest.raises(ValueError, match=rf"^Got the width {name}={most + 1} .*an integer from . to {most}\."):
            check_widths(site, {**FULL[site], name: most + 1})
