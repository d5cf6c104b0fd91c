"""Where neurons lie in the outputs of layers, and how one mask spreads over all of them."""

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
    "the last of three": Rows("qkv", 18, 6, 24),
    "k of two heads with three queries each": Rows("qkv", 9, 6, 30, shares=2),
    "q of two heads with three queries each": Rows("qkv", 0, 18, 30, shares=2),
    "q with a gate beside it": Rows("q", 0, 12, 24, shares=4),
}
UNITS = FeedForwardSite("b", "up", 4, "down", producers=(Rows("up", 0, 6, 12), Rows("up", 6, 6, 12)))


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
    assert rows.indices(torch.arange(rows.size)).tolist() == expected
    kept = torch.tensor([[5, PAD, 0], [PAD, rows.size - 1, 3]])
    assert rows.indices(kept).tolist() == [[expected[5], PAD, expected[0]], [PAD, expected[-1], expected[3]]]
    assert rows.indices(torch.tensor([], dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_factors_reach_the_rows_and_no_other_output(rows, batch):
    values = torch.rand(*batch, rows.size, generator=torch.Generator().manual_seed(0)) - 2
    expected = torch.ones(*batch, rows.layer_outputs)
    for number, output in enumerate(naive_outputs(rows)):
        expected[..., output] = values[..., number]
    assert torch.equal(rows.spread(values), expected)


def attention(heads: int = 4, key_value_heads: int = 2, head_dim: int = 8, value_dim: int = 8, **options):
    rows = {
        "query": Rows("q", 0, heads * head_dim),
        "key_rows": Rows("k", 0, key_value_heads * head_dim),
        "value": Rows("v", 0, key_value_heads * value_dim),
    }
    sizes = {"heads": heads, "key_value_heads": key_value_heads, "head_dim": head_dim}
    return AttentionSite("a", "q", 32, "o", **{**rows, **sizes, **options})


def test_heads_that_share_keys_share_their_mask():
    site = attention(value_dim=6)  # 2 x 8 of q.k, then 2 x 6 of v
    assert site.parts == {"query_key": 16, "value": 12}
    mask = torch.arange(28.0)
    query = [mask[(head // 2) * 8 + dim] for head in range(4) for dim in range(8)]
    assert site.part_mask("query", mask).tolist() == query
    assert site.part_mask("key", mask).tolist() == [mask[head * 8 + dim] for head in range(2) for dim in range(8)]
    assert site.part_mask("value", mask).tolist() == mask[16:].tolist()
    assert site.read_mask(mask).tolist() == [mask[16 + (head // 2) * 6 + dim] for head in range(4) for dim in range(6)]


def test_a_frequency_is_one_pair_in_all_heads():
    site = attention(is_rotary=True)  # 4 frequencies, then 2 x 8 of v
    assert site.parts == {"query_key": 4, "value": 16}
    mask = torch.arange(20.0)
    assert site.part_mask("query", mask).tolist() == [mask[dim % 4] for head in range(4) for dim in range(8)]
    assert site.part_mask("key", mask).tolist() == [mask[dim % 4] for head in range(2) for dim in range(8)]
    assert site.part_mask("value", mask).tolist() == mask[4:].tolist()
    assert site.read_mask(mask).tolist() == [mask[4 + (head // 2) * 8 + dim] for head in range(4) for dim in range(8)]


@pytest.mark.parametrize("site", [attention(), attention(is_rotary=True), attention(1, 1), attention(value_dim=3)])
def test_masks_spread_over_the_rows_of_each_part_and_each_sample_has_its_own(site):
    masks = torch.rand(2, 3, site.neurons, generator=torch.Generator().manual_seed(0))
    for rows, part in site.produced():
        together = site.part_mask(part, masks)
        assert together.shape == (2, 3, rows.size)
        assert torch.equal(together[1, 2], site.part_mask(part, masks[1, 2]))
    assert site.read_mask(masks).shape == (2, 3, site.heads * site.value_dim)
    assert torch.equal(site.read_mask(masks)[0, 1], site.read_mask(masks[0, 1]))


def names_of(site: NeuronSite) -> list[str]:
    return [pruning_mode.name for pruning_mode in site.pruning_modes]


def test_pruning_modes_are_named_after_what_they_do_and_scattered_ones_come_last():
    assert names_of(attention()) == [*(mode.name for mode in DENSE_ATTENTION), "scatter", "scatter-gated"]
    assert sorted(PRUNING_MODES) == sorted(names_of(attention()))
    assert names_of(UNITS) == ["dense", "scatter", "scatter-gated"]
    for name, mode in PRUNING_MODES.items():
        properties = (mode.name, mode.is_scattered, mode.is_gated, mode.rescales, mode.drops_heads)
        drops_heads = "scatter" not in name and "heads-kept" not in name
        assert properties == (name, "scatter" in name, "gated" in name, "rescaled" in name, drops_heads)


def test_the_first_pruning_mode_is_taken_until_another_is_chosen():
    assert [site.pruning_mode for site in (UNITS, attention(), attention(is_gated_only=True))] == [
        "dense",
        "dense",
        "scatter-gated",
    ]
    changed = with_pruning_modes([UNITS, attention()], {"a:attention": "dense-rescaled"})
    assert [site.pruning_mode for site in changed] == ["dense", "dense-rescaled"]
    assert changed[1].cut_by is PRUNING_MODES["dense-rescaled"]
    assert with_pruning_modes(changed, {}) == changed


def fused(value: Rows, shares: int = 1, **options) -> AttentionSite:
    key = Rows("qkv", 8 if shares > 1 else 16, 8, 32, shares)
    return attention(4, 2, 4, query=Rows("qkv", 0, 16, 32, shares), key_rows=key, value=value, **options)


@pytest.mark.parametrize(
    ("site", "is_dense"),
    [
        (fused(Rows("qkv", 24, 8, 32)), True),
        (attention(value_dim=6), False),  # heads of v have another width
        (fused(Rows("qkv", 12, 8, 32, 2), shares=2), False),  # q, k and v of a head lie side by side
        (fused(Rows("qkv", 24, 8, 40)), False),  # some outputs are no neurons
    ],
)
def test_only_whole_layers_of_equal_heads_can_be_dense(site, is_dense):
    assert names_of(site)[-2:] == ["scatter", "scatter-gated"]
    assert (names_of(site)[0] == "dense") == (len(names_of(site)) > 2) == is_dense
    assert names_of(fused(Rows("qkv", 24, 8, 32), is_gated_only=True)) == ["scatter-gated"]


@pytest.mark.parametrize(
    ("site", "wanted"), [(UNITS, "dense-rescaled"), (attention(value_dim=6), "dense"), (UNITS, "warp")]
)
def test_a_pruning_mode_that_a_site_can_t_have_is_refused(site, wanted):
    message = (
        rf"^Got the pruning mode '{wanted}' for '{site.key}'; expected one of \['.*'\]\. The config.json is damaged"
    )
    with pytest.raises(ValueError, match=message):
        with_pruning_modes([site], {site.key: wanted})
