"""The losses are what their formulas say, for one process and as the mean over several."""

import math

import pytest
import torch
from torch.nn import functional as F

from nemo_hf.config import OBJECTIVES
from nemo_hf.training.losses import (
    GatheredMasks,
    cosine_similarities,
    flatten_masks,
    mask_objective,
    nemo_loss,
    sparsity_loss,
    specific_cross_entropy,
)

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # the groups 2 and 3 have one sample: anchors without a positive
MEMBERSHIP = torch.rand(len(GROUPS), 3, generator=torch.Generator().manual_seed(3)) > 0.6
WIDTHS = [6, 9]
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES)


def soft_masks(batch: int = len(GROUPS), seed: int = 0) -> torch.Tensor:
    return (torch.rand(batch, sum(WIDTHS), generator=torch.Generator().manual_seed(seed)) - 0.3).relu()


def naive_objective(objective, masks, widths, groups, temperature, coupling_weight):
    """Mean over sites of loops over single pairs of samples."""
    losses, samples = [], range(len(groups))
    for site in masks.split(widths, -1):
        unit = site / (site.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        member = groups if groups.ndim == 2 else F.one_hot(groups) > 0
        alike = [[bool((member[i] & member[j]).any()) for j in samples] for i in samples]
        s = [[float(unit[i] @ unit[j]) for j in samples] for i in samples]
        pairs = [(i, j) for i in samples for j in samples if i != j]
        if objective == "contrastive":
            anchors = []
            for i in samples:
                positives = [j for j in samples if j != i and alike[i][j]]
                whole = sum(math.exp(s[i][k] / temperature) for k in samples if k != i)
                if positives:
                    anchors.append(sum(math.log(math.exp(s[i][j] / temperature) / whole) for j in positives))
                    anchors[-1] /= -len(positives)
            losses.append(sum(anchors) / len(anchors))
        elif objective == "contrastive-authors":  # left out pairs count as one, a sample as its own positive
            anchors = []
            for i in samples:
                inside, outside = (
                    sum(math.exp(s[i][j] / temperature) if alike[i][j] == kind else 1.0 for j in samples)
                    for kind in (True, False)
                )
                anchors.append(-math.log(inside / (inside + outside)))
            losses.append(sum(anchors) / len(anchors))
        else:
            within = [s[i][j] for i, j in pairs if alike[i][j]]
            between = [s[i][j] for i, j in pairs if not alike[i][j]]
            losses.append(1 - sum(within) / len(within) + coupling_weight * sum(between) / len(between))
    return sum(losses) / len(losses)


@EVERY_OBJECTIVE
@pytest.mark.parametrize("temperature", [0.05, 2.0])
@pytest.mark.parametrize("groups", [GROUPS, MEMBERSHIP], ids=["one label", "several labels"])
def test_an_objective_is_its_loop_over_pairs(objective, temperature, groups):
    masks = soft_masks()
    masks[2, :6] = 0.0
    expected = naive_objective(objective, masks, WIDTHS, groups, temperature, 0.7)
    got = mask_objective(masks, WIDTHS, groups, objective, temperature, 0.7)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("groups", [torch.arange(0), torch.tensor([0]), torch.arange(4)], ids=["0", "1", "no pair"])
def test_without_a_pair_of_a_group_the_loss_is_zero_and_its_gradient_finite(groups):
    masks = soft_masks(len(groups)).requires_grad_()
    loss = mask_objective(masks, WIDTHS, groups) + sparsity_loss(masks[:0], WIDTHS)
    loss.backward()
    assert loss.item() == 0.0
    assert not masks.grad.any()


@EVERY_OBJECTIVE
@pytest.mark.parametrize("closed", [slice(None), slice(0, 1)], ids=["all closed", "one closed"])
def test_closed_masks_have_a_finite_gradient(objective, closed):
    masks = soft_masks()
    masks[closed] = 0.0
    mask_objective(masks.requires_grad_(), WIDTHS, GROUPS, objective).backward()
    assert masks.grad.abs().max() < 1e5


def over_processes(masks, groups, split, objective):
    """The mean over processes of their losses, where each has its part of the samples, filled up to one size."""
    capacity, counts = max(split), []

    def filled(rows):
        return torch.cat([torch.cat([p, p.new_zeros(capacity - len(p), *p.shape[1:])]) for p in rows.split(split)])

    everyone = [filled(rows) for rows in (masks, groups, torch.ones(len(groups), dtype=torch.bool))]

    def losses(mean_counts):
        for rank, (part, own) in enumerate(zip(masks.split(split), groups.split(split), strict=True)):
            gathered = GatheredMasks(*everyone, rank * capacity)
            yield mask_objective(part, WIDTHS, own, objective, 0.2, 0.7, gathered, mean_counts)

    list(losses(lambda count: counts.append(count) or count))
    mean = torch.stack(counts).mean(0)
    return torch.stack(list(losses(lambda count: mean))).mean()


@EVERY_OBJECTIVE
@pytest.mark.parametrize("has_several", [False, True], ids=["one label", "several labels"])
@pytest.mark.parametrize("split", [(4, 3), (6, 1), (7, 0), (1, 0), (1, 1), (2, 1, 0), (0, 0)], ids=str)
def test_the_mean_over_processes_is_the_loss_of_all_samples(split, has_several, objective):
    batch = sum(split)
    groups = (MEMBERSHIP if has_several else GROUPS)[:batch]
    masks, own = soft_masks(batch).requires_grad_(), soft_masks(batch).requires_grad_()
    loss = over_processes(masks, groups, list(split), objective)
    loss.backward()
    expected = mask_objective(own, WIDTHS, groups, objective, 0.2, 0.7)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(masks.grad, own.grad)


def test_losses_over_masks_are_in_float32():
    masks = soft_masks()
    for low in (masks.bfloat16(), masks.half()):
        assert mask_objective(low, WIDTHS, GROUPS).dtype == sparsity_loss(low, WIDTHS).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_similarities(masks, WIDTHS, masks)
    assert torch.equal(got, cosine_similarities(masks, WIDTHS, masks))


def test_masks_are_joined_by_site_and_call_and_every_site_weighs_the_same():
    first, second = torch.full((2, 1, 1), 0.25), torch.stack([torch.full((2, 4), 0.5), torch.full((2, 4), 0.75)], 1)
    masks, widths = flatten_masks({"a": first, "b": second})
    assert widths == [1, 4, 4]
    assert torch.equal(masks, torch.cat([first[:, 0], second[:, 0], second[:, 1]], -1))
    assert sparsity_loss(masks, widths).item() == pytest.approx(0.5)


@pytest.mark.parametrize("has_several", [False, True], ids=["one label", "several labels"])
def test_nemo_loss_is_the_weighted_sum(has_several):
    logits, masks = torch.randn(len(GROUPS), 4, generator=torch.Generator().manual_seed(0)), soft_masks()
    labels = F.one_hot(GROUPS).float() if has_several else GROUPS
    outputs = dict(zip("ab", (mask[:, None] for mask in masks.split(WIDTHS, -1)), strict=True))
    contrast = naive_objective("contrastive", masks, WIDTHS, GROUPS, 0.7, 0)
    sparsity = sum(mask.mean() for mask in masks.split(WIDTHS, -1)) / 2
    loss = F.binary_cross_entropy_with_logits if has_several else F.cross_entropy
    expected = loss(logits, labels) + 0.3 * contrast + 2.0 * sparsity
    torch.testing.assert_close(nemo_loss(logits, labels, outputs, GROUPS, 0.3, 2.0, 0.7), expected)
    assert nemo_loss(logits.half(), GROUPS, outputs, GROUPS).dtype == torch.float32
    with pytest.raises(ValueError, match=r"no neuron_masks; .*masks='generated'"):
        nemo_loss(logits, labels, None, GROUPS)


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
    for rows in ([0, 1], [2, 3, 4]):  # own labels alone, others alone
        some = logits[rows].requires_grad_()
        specific_cross_entropy(some, labels[rows], in_module, 1.0, label_smoothing=0.1).backward()
        assert some.grad.isfinite().all()
        assert some.grad.any()
