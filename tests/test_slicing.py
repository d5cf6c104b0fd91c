"""Cut layers hold the rows and columns of what is kept, and nothing else."""

import pytest
import torch
from conftest import fresh
from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons import AttentionSite, FeedForwardSite, NeuronSite, Rows, with_back_ends
from nemo_hf.sites import find_sites
from nemo_hf.slicing import PAD, ScatterLinear, check_widths, resize, resize_head, site_cut
from nemo_hf.weights import cut_tensor, tensor_cuts

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
    for rows, part in ((query_rows, site.query), (query_rows, site.key_rows), (value_rows, site.value)):
        weight, bias = weight_and_bias(model, part.layer)
        assert torch.equal(cut[f"{part.layer}.weight"], naive_rows(weight, rows))
        assert torch.equal(cut[f"{part.layer}.bias"], naive_rows(bias, rows))
    output, _ = weight_and_bias(model, site.output)
    assert torch.equal(cut[f"{site.output}.weight"], naive_rows(output.T, value_rows).T)


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


def test_scattered_rotary_heads_keep_pairs_and_shared_heads():
    model = fresh("llama")  # 4 query heads of 8 share 2 key/value heads; dimension j is tied to j + 4
    site = first_site(model, "attention")
    keep = {"query_key": torch.tensor([1, 4, 7]), "value": torch.tensor([0, 9])}
    cut = cut_tensors(model, site, keep)
    key = [1, 5, 8, 11, 12, 15]
    query = sorted([1, 5, 9, 13] + [row + shared for shared in (16, 24) for row in (0, 3, 4, 7)])
    output = [0, 8, 17, 25]
    attention = model.model.layers[0].self_attn
    for layer, rows in ((site.query.layer, query), (site.key_rows.layer, key), (site.value.layer, [0, 9])):
        assert cut[f"{layer}.output_indices"].tolist() == rows
        assert torch.equal(cut[f"{layer}.weight"], model.get_submodule(layer).weight[rows])
    assert cut[f"{site.output}.input_indices"].tolist() == output
    assert torch.equal(cut[f"{site.output}.weight"], attention.o_proj.weight[:, output])


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


@pytest.mark.parametrize("share", [0.6, 0.0, 1.0])
def test_resized_layers_take_exactly_the_cut_tensors(plain, share):
    state = plain.state_dict()
    for site in find_sites(plain):
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

    writes = ScatterLinear(5, 3, full_outputs=6, reads_some=False, has_bias=has_bias)
    writes.load_state_dict(
        {"weight": weight[outputs], "output_indices": outputs} | ({"bias": layer.bias[outputs]} if has_bias else {})
    )
    opened = torch.zeros(6).index_fill(0, outputs, 1.0)
    torch.testing.assert_close(writes(hidden), layer(hidden) * opened)

    reads = ScatterLinear(2, 6, full_outputs=None, reads_some=True, has_bias=has_bias)
    reads.load_state_dict(
        {"weight": weight[:, inputs], "input_indices": inputs} | ({"bias": layer.bias} if has_bias else {})
    )
    torch.testing.assert_close(reads(hidden), layer(hidden * torch.zeros(5).index_fill(0, inputs, 1.0)))


def test_an_empty_scattered_layer_gives_zeros_or_its_bias():
    hidden = torch.randn(2, 3, 5)
    writes = ScatterLinear(5, 0, full_outputs=6, reads_some=False, has_bias=True)
    assert torch.equal(writes(hidden), torch.zeros(2, 3, 6))
    reads = ScatterLinear(0, 6, full_outputs=None, reads_some=True, has_bias=True)
    nn.init.constant_(reads.bias, 2.0)
    assert torch.equal(reads(hidden), torch.full((2, 3, 6), 2.0))


FEED_FORWARD = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),))
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
(SCATTERED,) = with_back_ends([DENSE], {DENSE.key: "scatter"})
FULL = {
    FEED_FORWARD: {"intermediate": 6},
    DENSE: {"key_value_heads": 2, "head_dim": 4},
    SCATTERED: {"query": 8, "key": 8, "value": 8, "output": 8},
}
SITES = pytest.mark.parametrize("site", list(FULL), ids=["ffn", "dense", "scatter"])


@SITES
def test_widths_up_to_the_full_ones_are_accepted(site):
    check_widths(site, FULL[site])
    check_widths(site, dict.fromkeys(FULL[site], 1))


@SITES
@pytest.mark.parametrize("width", [-1, 9, 10**12, 2.0, "2", True, None])
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


def test_a_site_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"^Got NeuronSite; expected a FeedForwardSite or an AttentionSite"):
        site_cut(NeuronSite("block", "up", 4, "down"), {})


def test_a_site_can_only_have_the_back_ends_that_it_has():
    with pytest.raises(ValueError, match=r"^Got the back end 'scatter' for 'block:ffn'; expected 'dense'\. The config"):
        with_back_ends([FEED_FORWARD], {FEED_FORWARD.key: "scatter"})
    assert with_back_ends([SCATTERED], {}) == [SCATTERED]
