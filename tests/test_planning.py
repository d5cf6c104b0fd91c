"""Which neurons a module keeps."""

import pytest
import torch

from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, Rows, with_pruning_modes
from nemo_hf.pruning.plan import plan_module, retained_neurons, static_masks


def feed_forward(width: int = 6) -> FeedForwardSite:
    return FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, width),))


def attention(heads: int = 2, head_dim: int = 4, pruning_mode: str = "dense", **options) -> AttentionSite:
    sizes = {"heads": heads, "key_value_heads": heads, "head_dim": head_dim}
    rows = [Rows(layer, 0, heads * head_dim) for layer in ("q", "k", "v")]
    site = AttentionSite(
        "block.attention", "q", 4, "o", query=rows[0], key_rows=rows[1], value=rows[2], **sizes, **options
    )
    (chosen,) = with_pruning_modes([site], {site.key: pruning_mode})
    return chosen


def keep_lists(site, relevance, groups=(0,), threshold=0.5, round_to=None) -> dict[str, list[int]]:
    relevance = {site.key: torch.tensor(relevance, dtype=torch.uint8)}
    plan = plan_module([site], relevance, groups, threshold, round_to)
    return {name: index.tolist() for name, index in plan[site.key].items()}


def test_a_neuron_stays_from_the_threshold_on():
    kept = keep_lists(feed_forward(), [[0, 127, 128, 129, 255, 126]])
    assert kept == {"intermediate": [2, 3, 4]}
    assert keep_lists(feed_forward(), [[254, 255, 254, 0, 0, 0]], threshold=1.0) == {"intermediate": [1]}


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0])
def test_a_share_of_exactly_the_threshold_is_enough_as_it_is_stored(threshold):
    stored = round(255 * threshold)
    kept = keep_lists(feed_forward(), [[stored, stored - 1, 0, 0, 0, 0]], threshold=threshold)
    assert kept == {"intermediate": [0]}


def test_a_module_for_several_groups_keeps_the_union():
    relevance = [[255, 0, 0, 0, 0, 0], [0, 0, 0, 0, 255, 0], [0, 255, 0, 0, 0, 0]]
    assert keep_lists(feed_forward(), relevance, groups=[0, 1]) == {"intermediate": [0, 4]}
    assert keep_lists(feed_forward(), relevance, groups=[2]) == {"intermediate": [1]}


def test_kept_indices_are_sorted_int64():
    site = feed_forward()
    plan = plan_module([site], {site.key: torch.full((1, 6), 255, dtype=torch.uint8)}, [0], 0.5, 4)
    index = plan[site.key]["intermediate"]
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(index.tolist())


def test_rounding_fills_with_the_next_most_relevant():
    relevance = [[200, 10, 90, 20, 210, 90]]
    assert keep_lists(feed_forward(), relevance, round_to=4) == {"intermediate": [0, 2, 4, 5]}
    assert keep_lists(feed_forward(), relevance, round_to=3) == {"intermediate": [0, 2, 4]}
    assert keep_lists(feed_forward(), relevance, round_to=2) == {"intermediate": [0, 4]}


def test_rounding_never_asks_for_more_than_there_is():
    assert keep_lists(feed_forward(), [[255, 0, 0, 0, 0, 0]], round_to=16) == {"intermediate": [0, 1, 2, 3, 4, 5]}


def test_rounding_keeps_every_neuron_over_the_threshold():
    generator = torch.Generator().manual_seed(0)
    site = feed_forward(40)
    relevance = torch.randint(0, 256, (3, 40), generator=generator).tolist()
    exact = keep_lists(site, relevance, groups=[0, 2])["intermediate"]
    rounded = keep_lists(site, relevance, groups=[0, 2], round_to=8)["intermediate"]
    assert set(exact) < set(rounded)
    assert len(rounded) % 8 == 0
    assert len(rounded) - len(exact) < 8


def test_what_is_empty_stays_empty_under_rounding():
    first, second = feed_forward(), attention()
    relevance = {
        first.key: torch.zeros(1, 6, dtype=torch.uint8),
        second.key: torch.tensor([[0] * 8 + [0] * 4 + [255, 0, 0, 0]], dtype=torch.uint8),
    }
    plan = plan_module([first, second], relevance, [0], 0.5, 2)
    assert plan[first.key]["intermediate"].tolist() == []
    assert all(index >= 4 for index in plan[second.key]["value"].tolist())
    assert all(index >= 4 for index in plan[second.key]["query_key"].tolist())


def test_heads_without_values_lose_their_queries_and_keys():
    query_key, value = [255] * 8, [0, 0, 0, 0, 0, 255, 0, 0]
    assert keep_lists(attention(), [query_key + value]) == {"query_key": [4, 5, 6, 7], "value": [5]}


def test_heads_without_queries_keep_their_values():
    # Such a head attends evenly to all tokens, which is not nothing.
    assert keep_lists(attention(), [[0] * 8 + [255] * 8]) == {"query_key": [], "value": list(range(8))}


def test_frequencies_of_all_heads_are_one_neuron_of_queries_and_keys():
    site = attention(is_rotary=True)
    assert site.parts == {"query_key": 2, "value": 8}
    # They stay as long as some head has values; without any, they turn nothing that is read.
    assert keep_lists(site, [[0, 255] + [0] * 4 + [255] * 4]) == {"query_key": [1], "value": [4, 5, 6, 7]}
    with pytest.raises(ValueError, match="opens no neuron"):
        keep_lists(site, [[255, 255] + [0] * 8])


def test_dense_heads_are_filled_to_one_rounded_width():
    # Head 0 keeps three q.k dimensions and one value, head 1 one and one: both get width 4 in both parts.
    query_key = [255, 255, 255, 1, 255, 3, 2, 1]
    value = [255, 9, 8, 7, 6, 5, 4, 255]
    kept = keep_lists(attention(), [query_key + value], round_to=2)
    assert kept == {"query_key": list(range(8)), "value": list(range(8))}
    kept = keep_lists(attention(), [[255, 0, 9, 0, 0, 9, 255, 0, 255, 0, 0, 5, 6, 0, 0, 255]], round_to=2)
    assert kept == {"query_key": [0, 2, 5, 6], "value": [0, 3, 4, 7]}


def test_dense_rotary_heads_are_filled_by_pairs_to_one_even_width():
    # One frequency of four and values of both heads, three and one: width 4 is two frequencies and four values.
    site = attention(head_dim=8, is_rotary=True)
    values = [255, 255, 255, 9, 8, 0, 0, 0, 255, 9, 0, 8, 7, 0, 0, 0]
    kept = keep_lists(site, [[0, 7, 255, 8, *values]], round_to=2)
    assert kept == {"query_key": [2, 3], "value": [0, 1, 2, 3, 8, 9, 11, 12]}
    # Odd multiples are made even, since a frequency is two dimensions; the whole head is the most there is.
    kept = keep_lists(site, [[0, 7, 255, 8, *values]], round_to=3)
    assert kept == {"query_key": [1, 2, 3], "value": [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]}
    assert keep_lists(site, [[0, 7, 255, 8, *values]], round_to=16) == {
        "query_key": [0, 1, 2, 3],
        "value": list(range(16)),
    }
    # Three frequencies are six dimensions, wider than any head's values.
    kept = keep_lists(site, [[255, 0, 255, 255, *values]], round_to=2)
    assert kept == {"query_key": [0, 2, 3], "value": [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]}


def test_dense_rotary_heads_without_values_are_not_filled():
    site = attention(head_dim=8, is_rotary=True)
    kept = keep_lists(site, [[255, 0, 9, 8] + [9] * 8 + [255] * 3 + [0] * 5], round_to=4)
    assert kept == {"query_key": [0, 2], "value": [8, 9, 10, 11]}


def test_scattered_heads_are_rounded_in_all_and_not_one_by_one():
    relevance = [[255, 0, 9, 0, 0, 8, 255, 0, 255, 0, 0, 5, 6, 0, 0, 255]]
    for pruning_mode in ("scatter", "scatter-gated"):
        kept = keep_lists(attention(pruning_mode=pruning_mode), relevance, (0,), 0.5, 3)
        assert kept == {"query_key": [0, 2, 6], "value": [0, 4, 7]}


@pytest.mark.parametrize(
    "relevance", [[0] * 16, [127] * 16, [255] * 8 + [0] * 8], ids=["never open", "below", "no values"]
)
def test_nothing_left_is_an_error(relevance):
    with pytest.raises(
        ValueError, match=r"^Got a relevance that opens no neuron .*; expected .*\. Lower the threshold"
    ):
        keep_lists(attention(), [relevance])


@pytest.mark.parametrize("round_to", [0, -8, 2.5, True, "8"])
def test_a_bad_multiple_is_an_error(round_to):
    with pytest.raises(ValueError, match=r"^Got round_to=.*; expected None or a positive integer"):
        keep_lists(feed_forward(), [[255] * 6], round_to=round_to)


def test_static_masks_open_what_the_plan_keeps():
    site = attention()
    plan = {site.key: {"query_key": torch.tensor([1, 6]), "value": torch.tensor([0])}}
    assert static_masks([site], plan)[site.key].nonzero().flatten().tolist() == [1, 6, 8]


def test_retained_neurons_counts_all_sites():
    first, second = feed_forward(), attention()
    plan = {
        first.key: {"intermediate": torch.tensor([0, 3, 5])},
        second.key: {"query_key": torch.tensor([1]), "value": torch.tensor([2])},
    }
    assert retained_neurons([first, second], plan) == 5 / (6 + 16)
