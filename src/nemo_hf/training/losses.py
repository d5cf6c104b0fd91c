"""The terms of the training loss as pure functions of tensors.

Soft masks come as one tensor of shape (batch, neurons) with `widths`: how many of its columns belong to each site and
call, in order, as `flatten_masks` returns them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_hf.models.labels import label_ids, labelled_cross_entropy, shares_group


@dataclass(frozen=True)
class GatheredMasks:
    """The masks of all processes' samples, with which the samples of one process are compared."""

    masks: Tensor  # soft, (samples, neurons), with gradient
    groups: Tensor  # group of each sample, (samples,), or membership, boolean, (samples, groups)
    is_sample: Tensor  # boolean, (samples,): False without a label, and in the rows that fill up a short batch
    first: int  # row of the process's own first sample; its others follow


def flatten_masks(neuron_masks: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Joins an output's masks, (batch, calls, neurons) each, to one tensor and the widths of its sites and calls."""
    widths = [mask.shape[-1] for mask in neuron_masks.values() for _ in range(mask.shape[1])]
    return torch.cat([mask.flatten(1) for mask in neuron_masks.values()], -1), widths


def have_labels(groups: Tensor) -> Tensor:
    """Which samples have a label, by their groups as in `shares_group`: boolean, shape (batch,)."""
    return groups >= 0 if groups.ndim == 1 else torch.ones_like(groups[:, 0], dtype=torch.bool)


def cosine_similarities(masks: Tensor, widths: Sequence[int], others: Tensor) -> Tensor:
    """Cosine similarity at each site of samples' masks and others', float32, shape (sites, batch, samples)."""

    def unit(flat: Tensor) -> list[Tensor]:
        sites = flat.float().split(list(widths), -1)
        # The norm of a mask that is closed everywhere would have a gradient of 1e12 without the 1e-6.
        return [site * torch.rsqrt(site.square().sum(-1, keepdim=True) + 1e-6) for site in sites]

    with torch.autocast(masks.device.type, enabled=False):
        own = unit(masks)
        return torch.stack([a @ b.T for a, b in zip(own, own if others is masks else unit(others), strict=True)])


def mask_objective(
    masks: Tensor,
    widths: Sequence[int],
    groups: Tensor,
    objective: str = "contrastive",
    temperature: float = 0.2,
    coupling_weight: float = 1.0,
    gathered: GatheredMasks | None = None,
    mean_counts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Loss over masks that `NeMoConfig.objective` names, a float32 scalar; 0 where there is nothing to compare.

    `groups` is as in `shares_group`. With `gathered` samples are compared with those of all processes; `mean_counts`
    averages numbers of anchors or pairs over the processes, so that their mean loss is that of all samples at once.
    """
    if gathered is None:
        gathered = GatheredMasks(masks, groups, have_labels(groups), first=0)
    similarities = cosine_similarities(masks, widths, gathered.masks)
    rows = torch.arange(len(groups), device=groups.device) + gathered.first
    columns = torch.arange(len(gathered.is_sample), device=groups.device)
    compared = have_labels(groups)[:, None] & gathered.is_sample  # (batch, samples)
    others = compared & (rows[:, None] != columns)  # two different samples
    alike = shares_group(groups, gathered.groups) & compared
    if objective == "contrastive":
        sums, counts = _contrastive(similarities / temperature, others, alike & others)
    elif objective == "contrastive-authors":
        sums, counts = _authors_contrastive(similarities / temperature, compared, alike)
    else:
        sums, counts = _cohesion_coupling(similarities.mean(0), alike & others, ~alike & others, coupling_weight)
    if mean_counts is not None:
        counts = mean_counts(counts)
    return (sums / counts.masked_fill(counts == 0, 1)).sum()


def _contrastive(logits: Tensor, others: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the anchors' losses, mean over sites, and the number of anchors, as in NeMo (arXiv 2508.11348).

    For anchor i with positives P(i), the other samples of its group, and logits z, similarities over temperature:
    -1/|P(i)| sum_{j in P(i)} log(e^{z_ij} / sum_{k != i} e^{z_ik}); an anchor without positives is left out.
    """
    # The sum over no other sample at all would be 0, its logarithm -inf and its gradient NaN.
    summed = others | ~others.any(-1, keepdim=True)
    log_share = logits - logits.masked_fill(~summed, float("-inf")).logsumexp(-1, keepdim=True)
    counts = positive.sum(-1)
    per_anchor = (log_share * positive).sum(-1) / counts.clamp(min=1)  # (sites, batch)
    return -per_anchor.sum(-1).mean().reshape(1), (counts > 0).sum().float().reshape(1)


def _authors_contrastive(logits: Tensor, compared: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    """The contrastive loss as the repository XiaohanBi-Hub/NeMo computes it: a baseline to compare with.

    It sets the similarity of pairs that a sum leaves out to 0 before `exp`, so each still adds 1 to the sum, and counts
    a sample as its own positive: masks that are closed everywhere score well.
    """
    is_anchor = compared.any(-1)
    left_out = ~compared & is_anchor[:, None]  # a sum over no sample at all would be 0, its logarithm -inf
    inside = logits.where(alike, 0.0).masked_fill(left_out, float("-inf")).logsumexp(-1)
    outside = logits.where(~alike, 0.0).masked_fill(left_out, float("-inf")).logsumexp(-1)
    per_anchor = (torch.logaddexp(inside, outside) - inside) * is_anchor
    return per_anchor.mean(0).sum().reshape(1), is_anchor.sum().float().reshape(1)


def _cohesion_coupling(similarities: Tensor, within: Tensor, between: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The loss of MwT (arXiv 2306.09376) over masks: sums and numbers of the pairs within and between groups."""
    sums = torch.stack([((1 - similarities) * within).sum(), weight * (similarities * between).sum()])
    return sums, torch.stack([within.sum(), between.sum()]).float()


def sparsity_loss(masks: Tensor, widths: Sequence[int]) -> Tensor:
    """Mean mask value of each site, averaged over sites: a float32 scalar in [0, 1), 0 without samples."""
    sites = masks.float().sum(0).split(list(widths))
    return torch.stack([site.mean() for site in sites]).mean() / max(1, len(masks))


def specific_cross_entropy(
    logits: Tensor, targets: Tensor, in_module: Tensor, weight: float, label_smoothing: float = 0.0
) -> Tensor:
    """Mean loss of a batch that runs as the module with the labels `in_module`, boolean, shape (labels,); float32.

    Own samples choose among all labels, as the parent does; for the others it is `weight` times the divergence of their
    answers among the other labels from even odds. `targets` as of `label_targets`.
    """
    total = logits.float().sum() * 0.0
    labels = label_ids(targets, has_several=False)
    known = labels >= 0
    logits, targets, labels = logits[known], targets[known], labels[known]
    if not len(labels):
        return total
    own = in_module[labels]
    if bool(own.any()):
        right = F.cross_entropy(logits[own].float(), targets[own], label_smoothing=label_smoothing)
        total = total + right * own.float().mean()
    if not bool(own.all()):
        chances = logits[~own][:, ~in_module].float().log_softmax(-1)
        divergence = -chances.mean(-1) - math.log(chances.shape[-1])
        total = total + weight * divergence.sum() / len(labels)
    return total


def restricted_binary_cross_entropy(logits: Tensor, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over samples and the `allowed` labels, boolean, shape (labels,), or over all."""
    if allowed is not None:
        logits, labels = logits[:, allowed], labels[:, allowed]
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def nemo_loss(
    logits: Tensor,
    labels: Tensor,
    neuron_masks: Mapping[str, Tensor] | None,
    groups: Tensor,
    contrastive_weight: float = 0.5,
    sparsity_weight: float = 0.0,
    temperature: float = 0.2,
) -> Tensor:
    """Computes the whole training loss, for a training loop of your own.

    Args:
        logits: Shape (batch, labels).
        labels: Right label of each sample, shape (batch,); or 0 and 1 for each label, shape (batch, labels).
        neuron_masks: The `neuron_masks` of the parent's output: site name to (batch, calls, neurons).
        groups: Group of each sample, integers of shape (batch,); or where a sample may belong to several, membership,
            boolean, shape (batch, groups).
        contrastive_weight: Weight of the contrastive term [alpha].
        sparsity_weight: Weight of the mean mask value [lambda].
        temperature: Temperature of the contrastive term [tau], above 0.

    Returns:
        A float32 scalar: (binary) cross-entropy plus the two weighted terms. Samples without another one of their
        group only count as negatives of the contrastive term.

    References:
        NeMo (arXiv 2508.11348), overall objective; the sparsity term is ours.
    """
    if neuron_masks is None:
        raise ValueError(
            "Got no neuron_masks; expected those of a parent whose masks are generated. Make it with "
            "make_parent(model, NeMoConfig(masks='generated'))."
        )
    masks, widths = flatten_masks(neuron_masks)
    is_list = labels.ndim == 2
    task = restricted_binary_cross_entropy(logits, labels) if is_list else labelled_cross_entropy(logits, labels)
    contrast = mask_objective(masks, widths, groups, temperature=temperature)
    return task + contrastive_weight * contrast + sparsity_weight * sparsity_loss(masks, widths)
