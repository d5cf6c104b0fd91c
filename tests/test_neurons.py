"""Where neurons lie in the outputs of layers, and how one mask spreads over all that it closes."""

from functools import partial

import pytest
import torch

from nemo_hf.neurons.sites import (
    DENSE_ATTENTION,
    PAD,
    PRUNING_MODES,
    AttentionSite,
    FeedForwardSite,
    NeuronSite,
    Rows,
    with_pruning_modes,
)

ROWS = {
    "a layer of its own": Rows("q", 0, 12),
    "the second of three": Rows("qkv", 12, 6, 24),
    "the last of three": Rows("qkv", 18, 6, 24),
    "k of two heads with three queries each": Rows("qkv", 9, 6, 30, shares=2),
    "q of two heads with three queries each": Rows("qkv", 0, 18, 30, shares=2),
    "q with a gate beside it": Rows("q", 0, 12, 24, shares=4),
    "all of each share": Rows("q", 0, 12, 12, shares=3),
}


def naive_outputs(rows: Rows) -> list[int]:
    """The layer's output of each of some rows: share by share, from `start` on in each."""
    found = []
    for share in range(rows.shares):
        first = share * (rows.layer_outputs // rows.shares) + rows.start
        found.extend(range(first, first + rows.size // rows.shares))
    return found


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
def test_rows_are_numbered_share_by_share(rows):
    expected = naive_outputs(rows)
    assert len(expected) == rows.size
    assert rows.indices(torch.arange(rows.size)).tolist() == expected
    kept = torch.tensor([[5, PAD, 0], [PAD, rows.size - 1, 3]])
    assert rows.indices(kept).tolist() == [[expected[5], PAD, expected[0]], [PAD, expected[-1], expected[3]]]
    assert rows.indices(torch.tensor([], dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_factors_reach_the_rows_and_no_other_output(rows, batch):
    values = torch.rand(*batch, rows.size, generator=torch.Generator().manual_seed(0)) - 2
    expected = torch.ones(*batch, rows.layer_outputs)
    for number, output in enumerate(naive_outputs(rows)):
        expected[..., output] = values[..., number]
    assert torch.equal(rows.spread(values), expected)


def test_the_three_parts_of_a_fused_layer_cover_it_once():
    query, key = (ROWS[f"{part} of two heads with three queries each"] for part in "qk")
    parts = (query, key, Rows("qkv", 12, 6, 30, shares=2))
    outputs = [output for rows in parts for output in rows.indices(torch.arange(rows.size)).tolist()]
    assert sorted(outputs) == list(range(30))


def attention(heads: int = 4, key_value_heads: int = 2, head_dim: int = 8, value_dim: int = 8, **options):
    return AttentionSite(
        "a",
        "q",
        32,
        "o",
        query=Rows("q", 0, heads * head_dim),
        key_rows=Rows("k", 0, key_value_heads * head_dim),
        value=Rows("v", 0, key_value_heads * value_dim),
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        **options,
    )


def test_heads_that_share_keys_share_their_mask():
    site = attention(value_dim=6)  # 2 x 8 of q.k, then 2 x 6 of v
    assert site.parts == {"query_key": 16, "value": 12}
    assert site.value_dim == 6
    mask = torch.arange(28.0)
    query = [mask[(head // 2) * 8 + dim] for head in range(4) for dim in range(8)]
    assert site.part_mask("query", mask).tolist() == query
    assert site.part_mask("key", mask).tolist() == [mask[head * 8 + dim] for head in range(2) for dim in range(8)]
    assert site.part_mask("value", mask).tolist() == mask[16:].tolist()
    assert site.read_mask(mask).tolist() == [mask[16 + (head // 2) * 6 + dim] for head in range(4) for dim in range(6)]


def test_a_frequency_is_one_pair_in_all_heads():
    site = attention(is_rotary=True)  # 4 frequencies, then 2 x 8 of v
    assert site.parts == {"query_key": 4, "value": 16}
    assert (site.query_key_heads, site.query_key_dims) == (1, 4)
    mask = torch.arange(20.0)
    assert site.part_mask("query", mask).tolist() == [mask[dim % 4] for head in range(4) for dim in range(8)]
    assert site.part_mask("key", mask).tolist() == [mask[dim % 4] for head in range(2) for dim in range(8)]
    assert site.part_mask("value", mask).tolist() == mask[4:].tolist()
    assert site.read_mask(mask).tolist() == [mask[4 + (head // 2) * 8 + dim] for head in range(4) for dim in range(8)]


SITES = {"shared": attention(), "rotary": attention(is_rotary=True), "one": attention(1, 1)}


@pytest.mark.parametrize("site", list(SITES.values()), ids=list(SITES))
def test_masks_spread_alike_for_each_sample(site):
    masks = torch.rand(2, 3, site.neurons, generator=torch.Generator().manual_seed(0))
    for spread in (site.read_mask, *(partial(site.part_mask, part) for _, part in site.produced())):
        together = spread(masks)
        assert all(torch.equal(together[i, j], spread(masks[i, j])) for i in range(2) for j in range(3))


def test_the_mask_of_each_part_has_a_value_for_each_of_its_rows():
    for site in (attention(), attention(is_rotary=True), attention(value_dim=3)):
        mask = torch.ones(site.neurons)
        assert all(len(site.part_mask(part, mask)) == rows.size for rows, part in site.produced())
        assert [part for _, part in site.produced()] == ["query", "key", "value"]
        assert len(site.read_mask(mask)) == site.heads * site.value_dim
    units = FeedForwardSite("b", "up", 4, "down", producers=(Rows("up", 0, 6, 12), Rows("up", 6, 6, 12)))
    assert [(rows.start, part) for rows, part in units.produced()] == [(0, "units"), (6, "units")]
    assert units.parts == {"intermediate": 6}
    assert units.layers == {"up", "down"}


def names_of(site: NeuronSite) -> list[str]:
    return [pruning_mode.name for pruning_mode in site.pruning_modes]


def test_back_ends_are_known_by_name_and_scattered_ones_come_last():
    assert {name: mode.name for name, mode in PRUNING_MODES.items()} == {name: name for name in PRUNING_MODES}
    assert names_of(attention()) == [
        *(mode.name for mode in DENSE_ATTENTION),
        "scatter",
        "scatter-gated",
    ]
    assert sorted(PRUNING_MODES) == sorted(names_of(attention()))
    for name, pruning_mode in PRUNING_MODES.items():
        told = (pruning_mode.is_scattered, pruning_mode.is_gated, pruning_mode.rescales)
        assert told == ("scatter" in name, "gated" in name, "rescaled" in name)
        assert pruning_mode.drops_heads == (not pruning_mode.is_scattered and "heads-kept" not in name)


def test_the_first_back_end_is_taken_until_another_is_chosen():
    units = FeedForwardSite("b", "up", 4, "down", producers=(Rows("up", 0, 6),))
    assert names_of(units) == ["dense", "scatter", "scatter-gated"]
    assert (units.pruning_mode, attention().pruning_mode, attention(is_gated_only=True).pruning_mode) == (
        "dense",
        "dense",
        "scatter-gated",
    )
    changed = with_pruning_modes([units, attention()], {"a:attention": "dense-rescaled"})
    assert [site.pruning_mode for site in changed] == ["dense", "dense-rescaled"]
    assert changed[1].cut_by is PRUNING_MODES["dense-rescaled"]
    assert with_pruning_modes(changed, {}) == changed


def test_heads_that_lie_side_by_side_or_have_other_values_are_only_scattered():
    fused = {"query": Rows("qkv", 0, 16, 32), "key_rows": Rows("qkv", 16, 8, 32), "value": Rows("qkv", 24, 8, 32)}
    sizes = {"heads": 4, "key_value_heads": 2, "head_dim": 4}
    assert "dense" in names_of(AttentionSite("a", "qkv", 32, "o", **fused, **sizes))
    scattered = ["scatter", "scatter-gated"]
    assert names_of(attention(value_dim=6)) == scattered
    side_by_side = {
        "query": Rows("qkv", 0, 16, 32, shares=2),
        "key_rows": Rows("qkv", 8, 8, 32, shares=2),
        "value": Rows("qkv", 12, 8, 32, shares=2),
    }
    assert names_of(AttentionSite("a", "qkv", 32, "o", **side_by_side, **sizes)) == scattered
    some_are_no_neurons = {**fused, "value": Rows("qkv", 24, 8, 40)}
    assert names_of(AttentionSite("a", "qkv", 32, "o", **some_are_no_neurons, **sizes)) == scattered
    gated = AttentionSite("a", "qkv", 32, "o", **fused, **sizes, is_gated_only=True)
    assert names_of(gated) == ["scatter-gated"]


def test_a_site_can_only_have_the_back_ends_that_it_has():
    units = FeedForwardSite("b", "up", 4, "down", producers=(Rows("up", 0, 6),))
    for site, wanted in ((units, "dense-rescaled"), (attention(value_dim=6), "dense"), (units, "warp")):
        told = (
            rf"^Got the pruning mode '{wanted}' for '{site.key}'; expected one of \['.*'\]\. The config.json is damaged"
        )
        with pytest.raises(ValueError, match=told):
            with_pruning_modes([site], {site.key: wanted})


def test_a_site_of_no_kind_can_t_be_made():
    with pytest.raises(NotImplementedError):
        NeuronSite("block", "up", 4, "down")
