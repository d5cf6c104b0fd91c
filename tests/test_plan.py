"""Which neurons a module keeps."""

import pytest
import torch
from conftest import generated

from nemo_hf.neurons.masks import build_masks
from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, Rows
from nemo_hf.pruning.plan import is_relevant, module_masks, plan_module, retained_neurons, static_masks


def feed_forward(width: int = 6) -> FeedForwardSite:
    return FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, width),))


def attention(heads: int = 2, head_dim: int = 4, **options) -> AttentionSite:
    sizes = {"heads": heads, "key_value_heads": heads, "head_dim": head_dim}
    query, key, value = (Rows(layer, 0, heads * head_dim) for layer in ("q", "k", "v"))
    return AttentionSite("block.attention", "q", 4, "o", query=query, key_rows=key, value=value, **sizes, **options)


def kept(site, *relevance, groups=(0,), threshold=0.5, round_to=None) -> dict[str, list[int]]:
    relevance = {site.key: torch.tensor(relevance, dtype=torch.uint8)}
    plan = plan_module([site], relevance, groups, threshold, round_to)
    assert all(index.dtype == torch.int64 for index in plan[site.key].values())
    return {name: index.tolist() for name, index in plan[site.key].items()}


def kept_units(*relevance, **options) -> list[int]:
    return kept(feed_forward(len(relevance[0])), *relevance, **options)["intermediate"]


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0])
def test_a_share_of_exactly_the_threshold_is_enough_as_it_is_stored(threshold):
    stored = round(255 * threshold)
    assert kept_units([stored - 1, stored, 0, 255], threshold=threshold) == [1, 3]


@pytest.mark.parametrize("threshold", [1e-9, 0.001, 0.00195, 1 / 510])
def test_a_neuron_that_no_sample_opens_is_never_kept(threshold):
    assert kept_units([0, 1, 255, 0], threshold=threshold) == [1, 2]
    assert is_relevant(torch.tensor([0, 1], dtype=torch.uint8), threshold).tolist() == [False, True]
    site = feed_forward(3)
    masks = build_masks([site], generated(), 10**5, 2)
    next(masks.site_masks()).relevance.copy_(torch.tensor([[0, 0, 2], [0, 1, 0]]))
    assert module_masks(masks, slice(None), threshold)[site.key].tolist() == [0, 1, 1]
    assert module_masks(masks, torch.tensor([0]), threshold)[site.key].tolist() == [0, 0, 1]


def test_a_module_for_several_groups_keeps_the_union():
    relevance = [255, 0, 0, 0, 0, 0], [0, 0, 0, 0, 255, 0], [0, 255, 0, 0, 0, 0]
    assert kept_units(*relevance, groups=[0, 1]) == [0, 4]
    assert kept_units(*relevance, groups=[2]) == [1]


def test_rounding_fills_with_the_next_most_relevant_that_there_are():
    relevance = [200, 10, 90, 20, 210, 90]
    for round_to, expected in ((4, [0, 2, 4, 5]), (3, [0, 2, 4]), (2, [0, 4]), (16, [0, 1, 2, 3, 4, 5])):
        assert kept_units(relevance, round_to=round_to) == expected


def test_sites_and_heads_that_are_empty_stay_so_under_rounding():
    first, second = feed_forward(), attention()
    relevance = {
        first.key: torch.zeros(1, 6, dtype=torch.uint8),
        second.key: torch.tensor([[0] * 12 + [255, 0, 0, 0]], dtype=torch.uint8),
    }
    plan = plan_module([first, second], relevance, [0], 0.5, 2)
    assert plan[first.key]["intermediate"].tolist() == []
    assert [[index // 4 for index in rows.tolist()] for rows in plan[second.key].values()] == [[1, 1], [1, 1]]


VALUES = [255, 255, 255, 9, 8, 0, 0, 0, 255, 9, 0, 8, 7, 0, 0, 0]  # rotary: three of the first head, one of the second
TWO_HEADS = [255, 0, 9, 0, 0, 8, 255, 0, 255, 0, 0, 5, 6, 0, 0, 255]
ROTARY = {"head_dim": 8, "is_rotary": True}


@pytest.mark.parametrize(
    ("options", "relevance", "round_to", "query_key", "value"),
    [
        # A head without values goes; one without queries attends evenly, which is not nothing.
        ({}, [*[255] * 8, 0, 0, 0, 0, 0, 255, 0, 0], None, [4, 5, 6, 7], [5]),
        ({}, [0] * 8 + [255] * 8, None, [], list(range(8))),
        # A frequency, the same in all heads, stays as long as some head has values.
        ({"is_rotary": True}, [0, 255] + [0] * 4 + [255] * 4, None, [1], [4, 5, 6, 7]),
        # Head 0 keeps three q.k dimensions and one value, head 1 one and one: both get width 4 in both parts.
        ({}, [255, 255, 255, 1, 255, 3, 2, 1, 255, 9, 8, 7, 6, 5, 4, 255], 2, list(range(8)), list(range(8))),
        ({}, TWO_HEADS, 2, [0, 2, 5, 6], [0, 3, 4, 7]),
        # Scattered heads are rounded all together.
        ({"pruning_mode": "scatter"}, TWO_HEADS, 3, [0, 2, 6], [0, 4, 7]),
        # Rotary heads get one even width, since a frequency is two dimensions: 4, 6, 8 (the whole head), 6.
        (ROTARY, [0, 7, 255, 8, *VALUES], 2, [2, 3], [0, 1, 2, 3, 8, 9, 11, 12]),
        (ROTARY, [0, 7, 255, 8, *VALUES], 3, [1, 2, 3], [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]),
        (ROTARY, [255, 0, 255, 255, *VALUES], 2, [0, 2, 3], [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]),
        # Rotary heads without values are not filled.
        (ROTARY, [255, 0, 9, 8] + [9] * 8 + [255] * 3 + [0] * 5, 4, [0, 2], [8, 9, 10, 11]),
    ],
)
def test_heads_are_kept_for_their_values_and_filled_to_rounded_widths(options, relevance, round_to, query_key, value):
    assert kept(attention(**options), relevance, round_to=round_to) == {"query_key": query_key, "value": value}


@pytest.mark.parametrize("relevance", [[0] * 16, [127] * 16, [255] * 8 + [0] * 8], ids=["none", "below", "no values"])
def test_a_plan_of_no_neurons_is_an_error(relevance):
    with pytest.raises(ValueError, match=r"^Got a relevance that opens no neuron .*; expected .*\. Lower the thr"):
        kept(attention(), relevance)
    with pytest.raises(ValueError, match=r"^Got a relevance that opens no neuron"):
        kept(attention(is_rotary=True), [*relevance[:2], *relevance[8:]])


def test_masks_and_retention_of_a_plan():
    first, second = feed_forward(), attention()
    plan = {
        first.key: {"intermediate": torch.tensor([0, 3, 5])},
        second.key: {"query_key": torch.tensor([1, 6]), "value": torch.tensor([0])},
    }
    masks = static_masks([first, second], plan).values()
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 3, 5], [1, 6, 8]]
    assert retained_neurons([first, second], plan) == 6 / (6 + 16)
