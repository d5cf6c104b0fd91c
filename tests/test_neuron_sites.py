"""Where neurons lie in the outputs of layers, and how one mask spreads over all of them."""

import pytest
import torch

from nemo_hf.neurons.sites import PAD, AttentionSite, FeedForwardSite, NeuronSite, Rows, with_pruning_modes

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
def test_rows_are_numbered_share_by_share_and_factors_reach_no_other_output(rows):
    outputs = naive_outputs(rows)
    assert rows.indices(torch.arange(rows.size)).tolist() == outputs
    kept = torch.tensor([[5, PAD, 0], [PAD, rows.size - 1, 3]])
    assert rows.indices(kept).tolist() == [[outputs[5], PAD, outputs[0]], [PAD, outputs[-1], outputs[3]]]
    values = torch.rand(2, 3, rows.size) - 2
    expected = torch.ones(2, 3, rows.layer_outputs)
    expected[..., outputs] = values
    assert torch.equal(rows.spread(values), expected)
    assert torch.equal(rows.spread(values[0, 0]), expected[0, 0])


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
    assert site.part_mask("key", mask).tolist() == mask[:16].tolist()
    assert site.part_mask("value", mask).tolist() == mask[16:].tolist()
    assert site.read_mask(mask).tolist() == [mask[16 + (head // 2) * 6 + dim] for head in range(4) for dim in range(6)]


def test_a_frequency_is_one_pair_in_all_heads():
    site = attention(is_rotary=True)  # 4 frequencies, then 2 x 8 of v
    assert site.parts == {"query_key": 4, "value": 16}
    mask = torch.rand(3, 20)
    assert torch.equal(site.part_mask("query", mask), mask[:, :4].repeat(1, 2 * 4))
    assert torch.equal(site.part_mask("key", mask), mask[:, :4].repeat(1, 2 * 2))
    assert torch.equal(site.read_mask(mask), mask[:, 4:].view(3, 2, 8).repeat_interleave(2, 1).flatten(1))


def names_of(site: NeuronSite) -> list[str]:
    return [pruning_mode.name for pruning_mode in site.pruning_modes]


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


def test_the_first_pruning_mode_is_taken_until_another_possible_one_is_chosen():
    assert [site.pruning_mode for site in (UNITS, attention(value_dim=6))] == ["dense", "scatter"]
    changed = with_pruning_modes([UNITS, attention()], {"a:attention": "dense-rescaled"})
    assert [site.cut_by.name for site in changed] == ["dense", "dense-rescaled"]
    for site, wanted in ((UNITS, "dense-rescaled"), (attention(value_dim=6), "dense"), (UNITS, "warp")):
        with pytest.raises(ValueError, match=rf"^Got the pruning mode '{wanted}' for '{site.key}'; expected one of \["):
            with_pruning_modes([site], {site.key: wanted})
