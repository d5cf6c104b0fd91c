"""Cohesion and coupling are means of Jaccard indices over pairs."""

import itertools
import statistics

import pytest
import torch

from nemo_hf.evaluation.metrics import cohesion_and_coupling, jaccard_indices

MASKS = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.4
GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 2])


def jaccard(a: torch.Tensor, b: torch.Tensor) -> float:
    first, second = set(a.nonzero().flatten().tolist()), set(b.nonzero().flatten().tolist())
    return len(first & second) / len(first | second) if first | second else 1.0


def test_jaccard_indices_are_those_of_sets():
    masks = torch.cat([MASKS, torch.zeros(2, 12, dtype=torch.bool)])
    expected = torch.tensor([[jaccard(a, b) for b in masks] for a in masks])
    torch.testing.assert_close(jaccard_indices(masks), expected)


def test_two_empty_masks_are_equal_and_an_empty_one_shares_nothing():
    masks = torch.tensor([[False, False], [False, False], [True, False]])
    assert jaccard_indices(masks).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_cohesion_and_coupling_are_the_double_loop():
    pairs = list(itertools.combinations(range(len(GROUPS)), 2))
    within = [jaccard(MASKS[i], MASKS[j]) for i, j in pairs if GROUPS[i] == GROUPS[j]]
    between = [jaccard(MASKS[i], MASKS[j]) for i, j in pairs if GROUPS[i] != GROUPS[j]]
    cohesion, coupling = cohesion_and_coupling(MASKS, GROUPS)
    assert cohesion == pytest.approx(statistics.mean(within), abs=1e-6)
    assert coupling == pytest.approx(statistics.mean(between), abs=1e-6)


def test_masks_that_tell_the_groups_have_cohesion_one_and_coupling_zero():
    masks = torch.nn.functional.one_hot(GROUPS).bool()
    assert cohesion_and_coupling(masks, GROUPS) == (1.0, 0.0)


def test_where_there_is_no_pair_there_is_no_number():
    assert cohesion_and_coupling(MASKS[:3], torch.tensor([0, 1, 2]))[0] is None
    assert cohesion_and_coupling(MASKS[:3], torch.tensor([1, 1, 1]))[1] is None
    assert cohesion_and_coupling(MASKS[:1], torch.tensor([0])) == (None, None)


def test_more_samples_than_float16_counts_are_exact():
    masks = torch.ones(2, 5000, dtype=torch.bool)
    masks[1, 0] = False
    assert jaccard_indices(masks)[0, 1].item() == pytest.approx(4999 / 5000)
