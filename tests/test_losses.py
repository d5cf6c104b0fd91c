"""The losses are what their formulas say."""

import math

import pytest
import torch
from torch.nn import functional as F

from nemo_hf.config import OBJECTIVES
from nemo_hf.training.losses import (
    authors_contrastive_loss,
    cohesion_coupling_loss,
    contrastive_loss,
    cosine_similarities,
    cross_entropy,
    mask_objective,
    nemo_loss,
    site_masks,
    sparsity_loss,
    specific_cross_entropy,
)

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # the groups 2 and 3 have one sample: anchors without a positive


def soft_masks(seed: int = 0, batch: int = len(GROUPS), sites: tuple[int, ...] = (6, 9)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(batch, neurons, generator=generator) - 0.3).clamp(min=0) for neurons in sites]


def naive_contrastive_loss(masks: list[torch.Tensor], groups: torch.Tensor, temperature: float) -> float:
    def similarity(a: list[float], b: list[float]) -> float:
        norms = [math.sqrt(sum(value * value for value in mask) + 1e-6) for mask in (a, b)]
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms[0] / norms[1]

    losses = []
    for site in masks:
        rows, anchors = site.tolist(), []
        for i in range(len(rows)):
            others = {k: math.exp(similarity(rows[i], rows[k]) / temperature) for k in range(len(rows)) if k != i}
            positives = [j for j in others if groups[j] == groups[i]]
            if positives:
                anchors.append(sum(math.log(others[j] / sum(others.values())) for j in positives) / len(positives))
        losses.append(-sum(anchors) / len(anchors))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 2.0])
def test_contrastive_loss_is_the_double_loop(temperature):
    masks = soft_masks()
    masks[0][2] = 0.0
    expected = naive_contrastive_loss(masks, GROUPS, temperature)
    assert contrastive_loss(masks, GROUPS, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_does_not_depend_on_the_order_of_the_batch():
    masks, order = soft_masks(), torch.tensor([4, 2, 6, 0, 1, 5, 3])
    moved = contrastive_loss([mask[order] for mask in masks], GROUPS[order])
    torch.testing.assert_close(moved, contrastive_loss(masks, GROUPS))


def test_contrastive_loss_does_not_depend_on_the_names_of_the_groups():
    names = torch.tensor([7, 40, 3, 0])
    assert contrastive_loss(soft_masks(), names[GROUPS]) == contrastive_loss(soft_masks(), GROUPS)


def test_an_anchor_without_a_positive_only_counts_as_a_negative():
    masks = soft_masks()
    masks = [mask.requires_grad_() for mask in masks]
    loss = contrastive_loss(masks, GROUPS)
    loss.backward()
    assert masks[0].grad[3].abs().max() > 0
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Two anchors, each with one positive at similarity 1 and one negative at 0.
    expected = math.log(1 + math.exp(-1 / 0.2))
    assert contrastive_loss([pair], torch.tensor([0, 0, 1])).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("groups", [torch.tensor([0]), torch.arange(4)], ids=["batch of 1", "no positives"])
def test_without_a_pair_the_loss_is_zero_and_its_gradient_finite(groups):
    masks = [mask.requires_grad_() for mask in soft_masks(batch=len(groups))]
    loss = contrastive_loss(masks, groups)
    loss.backward()
    assert loss.item() == 0.0
    assert all(mask.grad.abs().max() == 0 for mask in masks)


@pytest.mark.parametrize("closed", [slice(None), slice(0, 1)], ids=["all closed", "one closed"])
def test_closed_masks_have_a_finite_gradient(closed):
    masks = soft_masks()
    for mask in masks:
        mask[closed] = 0.0
        mask.requires_grad_()
    contrastive_loss(masks, GROUPS).backward()
    assert all(mask.grad.abs().max() < 1e5 for mask in masks)


def test_losses_over_masks_are_in_float32():
    masks = [mask.bfloat16() for mask in soft_masks()]
    assert contrastive_loss(masks, GROUPS).dtype == torch.float32
    assert sparsity_loss(masks).dtype == torch.float32
    assert cosine_similarities(masks[0]).dtype == torch.float32


def test_equal_masks_have_similarity_one_and_disjoint_ones_zero():
    mask = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.9, 0.0], [0.0, 0.0, 0.7]])
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(cosine_similarities(mask), expected, atol=1e-5, rtol=0)


def test_sparsity_loss_weighs_every_site_the_same():
    masks = [torch.full((2, 1), 0.25), torch.full((2, 100), 0.75)]
    assert sparsity_loss(masks).item() == pytest.approx(0.5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch_in_float32(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3).half(), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    assert cross_entropy(logits, labels, smoothing) == expected


def test_masks_of_a_site_are_split_by_call_in_order():
    first, second = torch.rand(2, 1, 3), torch.rand(2, 2, 4)
    split = site_masks({"a": first, "b": second})
    assert [mask.shape for mask in split] == [(2, 3), (2, 4), (2, 4)]
    assert torch.equal(split[2], second[:, 1])


def test_nemo_loss_is_the_weighted_sum():
    torch.manual_seed(0)
    logits, labels = torch.randn(len(GROUPS), 4), GROUPS
    masks = soft_masks()
    outputs = {"a": masks[0][:, None], "b": masks[1][:, None]}
    expected = F.cross_entropy(logits, labels) + 0.3 * contrastive_loss(masks, GROUPS, 0.7) + 2.0 * sparsity_loss(masks)
    torch.testing.assert_close(nemo_loss(logits, labels, outputs, GROUPS, 0.3, 2.0, 0.7), expected)


def test_similarities_are_float32_under_autocast():
    mask = torch.rand(6, 11)
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_similarities(mask)
    assert torch.equal(got, cosine_similarities(mask))


def similarities_of(mask):
    unit = mask / (mask.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return [[float(a @ b) for b in unit] for a in unit]


def test_the_loss_of_mwt_is_that_of_a_double_loop():
    groups = [0, 1, 0, 2, 1]
    masks = [torch.rand(5, width, generator=torch.Generator().manual_seed(width)) for width in (4, 9)]
    terms = []
    for similar in map(similarities_of, masks):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        within = [similar[i][j] for i, j in pairs if groups[i] == groups[j]]
        between = [similar[i][j] for i, j in pairs if groups[i] != groups[j]]
        terms.append(1 - sum(within) / len(within) + 0.7 * sum(between) / len(between))
    loss = cohesion_coupling_loss(masks, torch.tensor(groups), 0.7)
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_the_authors_loss_counts_left_out_pairs_as_one_and_a_sample_as_its_own_positive():
    groups = [0, 1, 0, 2]
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    similar = similarities_of(mask)
    expected = []
    for i in range(4):
        inside = sum(math.exp(similar[i][j] / 0.2) if groups[i] == groups[j] else 1.0 for j in range(4))
        outside = sum(math.exp(similar[i][j] / 0.2) if groups[i] != groups[j] else 1.0 for j in range(4))
        expected.append(-math.log(inside / (inside + outside)))
    loss = authors_contrastive_loss([mask], torch.tensor(groups), 0.2)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_the_loss_of_its_name(objective):
    groups, mask = torch.tensor([0, 1, 0]), torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    losses = {
        "contrastive": contrastive_loss([mask], groups, 0.3),
        "contrastive-authors": authors_contrastive_loss([mask], groups, 0.3),
        "cohesion-coupling": cohesion_coupling_loss([mask], groups, 2.0),
        "moda": cohesion_coupling_loss([mask], groups, 2.0),
    }
    assert torch.equal(mask_objective(objective, [mask], groups, 0.3, 2.0), losses[objective])


def test_a_batch_that_runs_as_a_module_is_right_on_its_labels_and_even_on_others():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 3, 1, 4, 2, 0])
    in_module = torch.tensor([True, False, False, True, False])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        own = range(5) if label in (0, 3) else [1, 2, 4]
        log_sum = math.log(sum(math.exp(row[j]) for j in own))
        if label in (0, 3):
            total += log_sum - row[label]
        else:
            total += 0.4 * (sum(log_sum - row[j] for j in own) / 3 - math.log(3))
    loss = specific_cross_entropy(logits, labels, in_module, 0.4)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    even = torch.zeros(2, 5)
    assert specific_cross_entropy(even, torch.tensor([1, 2]), in_module, 1.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 3], [1, 2]], ids=["own alone", "others alone"])
def test_a_batch_of_one_kind_has_a_finite_loss(labels):
    logits = torch.randn(2, 5, requires_grad=True)
    in_module = torch.tensor([True, False, False, True, False])
    loss = specific_cross_entropy(logits, torch.tensor(labels), in_module, 1.0, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0
