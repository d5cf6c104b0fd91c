"""The losses of modularizing training, as pure tensor functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_hf.models.label_groups import shares_group


@dataclass(frozen=True)
class GatheredMasks:
    """The masks of all processes' samples, with which the samples of one process are compared.

    Args:
        masks: Soft masks, one tensor a site, each of shape (samples, neurons), with gradient.
        groups: Group or membership of each sample, as `contrastive_loss` takes them.
        is_sample: Rows that are samples and don't fill up a short batch, boolean, shape (samples,).
        first: Row of the process's own first sample; its others follow.
    """

    masks: Sequence[Tensor]
    groups: Tensor
    is_sample: Tensor
    first: int


def cosine_similarities(mask: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosine similarity of every two samples' masks.

    Args:
        mask: Soft masks of one site, shape (batch, neurons), values in [0, 1).
        others: Masks to compare with, shape (samples, neurons); `None`: the same.

    Returns:
        Shape (batch, samples), float32. The norm is sqrt(sum m^2 + 1e-6): a plain one has a gradient of
        1e12 at a mask that is closed everywhere.
    """
    with torch.autocast(mask.device.type, enabled=False):
        unit = _unit(mask)
        return unit @ (unit if others is None else _unit(others)).T


def _unit(mask: Tensor) -> Tensor:
    mask = mask.float()
    return mask * torch.rsqrt(mask.square().sum(-1, keepdim=True) + 1e-6)


def _compared(
    masks: Sequence[Tensor], groups: Tensor, gathered: GatheredMasks | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compares the samples of a batch with each other, or with those of all processes.

    Returns similarities, shape (sites, batch, samples), and boolean of shape (batch, samples): which pairs share a
    group, which are a sample and itself, and which are no pairs since they only fill up a short batch.
    """
    rows = torch.arange(len(groups), device=groups.device)
    if gathered is None:
        similarities = torch.stack([cosine_similarities(mask) for mask in masks])
        alike = shares_group(groups)
        return similarities, alike, rows[:, None] == rows, torch.zeros_like(alike)
    pairs = zip(masks, gathered.masks, strict=True)
    similarities = torch.stack([cosine_similarities(mask, others) for mask, others in pairs])
    columns = torch.arange(len(gathered.groups), device=groups.device)
    absent = ~gathered.is_sample.expand(len(groups), -1)
    alike = shares_group(groups, gathered.groups) & ~absent
    return similarities, alike, rows[:, None] + gathered.first == columns, absent


def contrastive_loss(masks: Sequence[Tensor], groups: Tensor, temperature: float = 0.2) -> Tensor:
    """Contrastive loss over neuron masks: samples of one group should open the same neurons.

    For each site, anchor i and positives P(i) (other samples of i's group), with s = cosine similarity:
    `-mean_i 1/|P(i)| sum_{j in P(i)} log(e^{s_ij/t} / sum_{k != i} e^{s_ik/t})`; then the mean over sites.

    Args:
        masks: Soft masks, one tensor a site, each of shape (batch, neurons) with values in [0, 1).
        groups: Group of each sample, shape (batch,), integers; or where a sample belongs to several,
            membership, boolean, shape (batch, groups): positives share any group.
        temperature: Above 0.

    Returns:
        A float32 scalar with gradient to every mask. Anchors without a positive are left out; if no
        sample has one, the loss is 0.

    References:
        NeMo (arXiv 2508.11348), contrastive objective. The authors' code zeroes excluded pairs before
        exp, so each still adds 1 to both sums, and counts a sample as its own positive; this does not.
    """
    return _mean(*_contrastive_sums(masks, groups, temperature, None))


def _contrastive_sums(
    masks: Sequence[Tensor], groups: Tensor, temperature: float, gathered: GatheredMasks | None
) -> tuple[Tensor, Tensor]:
    similarities, alike, itself, absent = _compared(masks, groups, gathered)
    similarities = similarities / temperature  # (sites, batch, samples)
    if similarities.shape[-1] < 2:  # the sum over "every other sample" is empty: its logarithm is -inf
        return similarities.sum().reshape(1) * 0.0, torch.zeros(1, device=groups.device)
    positive = alike & ~itself
    log_share = similarities - similarities.masked_fill(itself | absent, float("-inf")).logsumexp(-1, keepdim=True)
    counts = positive.sum(-1)
    per_anchor = (log_share * positive).sum(-1) / counts.clamp(min=1)  # (sites, batch)
    has_positive = (counts > 0).float()
    return -(per_anchor * has_positive).sum(-1).mean().reshape(1), has_positive.sum().reshape(1)


def authors_contrastive_loss(masks: Sequence[Tensor], groups: Tensor, temperature: float = 0.2) -> Tensor:
    """The contrastive loss as the NeMo authors' code computes it: a baseline to compare with, not to use.

    It sets the similarity of pairs that a sum leaves out to 0 before `exp`, so that each still adds 1 to the
    sum, and counts a sample as its own positive: masks that are closed everywhere score well.

    Args:
        masks: As in `contrastive_loss`. `groups` and `temperature` likewise.
        groups: As in `contrastive_loss`.
        temperature: As in `contrastive_loss`.

    Returns:
        A float32 scalar: the mean over sites and samples of -log of the sum over positives over the sum over all.

    References:
        NeMo (arXiv 2508.11348); its repository XiaohanBi-Hub/NeMo, described from reading.
    """
    return _mean(*_authors_sums(masks, groups, temperature, None))


def _authors_sums(
    masks: Sequence[Tensor], groups: Tensor, temperature: float, gathered: GatheredMasks | None
) -> tuple[Tensor, Tensor]:
    similarities, alike, _, absent = _compared(masks, groups, gathered)
    similarities, present = similarities / temperature, (~absent).float()
    inside = (torch.where(alike, similarities, 0.0).exp() * present).sum(-1)
    outside = (torch.where(alike, 0.0, similarities).exp() * present).sum(-1)
    per_anchor = -(inside / (inside + outside)).log()
    return per_anchor.mean(0).sum().reshape(1), torch.full((1,), float(len(groups)), device=groups.device)


def cohesion_coupling_loss(masks: Sequence[Tensor], groups: Tensor, coupling_weight: float = 1.0) -> Tensor:
    """The loss of MwT over masks: 1 - mean similarity within groups + coupling_weight * mean similarity between.

    Args:
        masks: Soft masks, one tensor a site, each of shape (batch, neurons).
        groups: Group of each sample, shape (batch,), or membership, boolean, shape (batch, groups).
        coupling_weight: Weight of the second term relative to the first [beta / alpha].

    Returns:
        A float32 scalar, the mean over sites. A term without pairs is 0.

    References:
        MwT (arXiv 2306.09376), modularizing while training.
    """
    return _mean(*_cohesion_coupling_sums(masks, groups, coupling_weight, None))


def _cohesion_coupling_sums(
    masks: Sequence[Tensor], groups: Tensor, coupling_weight: float, gathered: GatheredMasks | None
) -> tuple[Tensor, Tensor]:
    similarities, alike, itself, absent = _compared(masks, groups, gathered)
    similarities = similarities.mean(0)
    within, between = alike & ~itself, ~(alike | itself | absent)
    cohesion = ((1 - similarities) * within).sum()
    coupling = (similarities * between).sum()
    return torch.stack([cohesion, coupling_weight * coupling]), torch.stack([within.sum(), between.sum()]).float()


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Sum of the terms' means; a term that counts nothing is 0."""
    return (sums / counts.masked_fill(counts == 0, 1)).sum()


def mask_objective(
    objective: str,
    masks: Sequence[Tensor],
    groups: Tensor,
    temperature: float,
    coupling_weight: float,
    gathered: GatheredMasks | None = None,
    mean_counts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss over masks that `NeMoConfig.objective` names.

    Args:
        objective: One of `config.OBJECTIVES`.
        masks: As in `contrastive_loss`.
        groups: As in `contrastive_loss`.
        temperature: As in `contrastive_loss`.
        coupling_weight: As in `cohesion_coupling_loss`.
        gathered: The masks of all processes to compare those of the batch with, or `None`.
        mean_counts: Takes the numbers of anchors or pairs in this process and returns their mean over all
            processes, or `None` where there is one. The mean of the losses, and of their gradients, over the
            processes is then the loss, and the gradient, of all samples at once.

    Returns:
        A float32 scalar.
    """
    if objective in ("cohesion-coupling", "moda"):
        sums, counts = _cohesion_coupling_sums(masks, groups, coupling_weight, gathered)
    else:
        sums_of = _contrastive_sums if objective == "contrastive" else _authors_sums
        sums, counts = sums_of(masks, groups, temperature, gathered)
    return _mean(sums, counts if mean_counts is None else mean_counts(counts))


def sparsity_loss(masks: Sequence[Tensor]) -> Tensor:
    """Mean mask value of each site, averaged over sites.

    Args:
        masks: Soft masks, one tensor a site, each of shape (batch, neurons).

    Returns:
        A float32 scalar in [0, 1).
    """
    return torch.stack([mask.float().mean() for mask in masks]).mean()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in float32.

    Args:
        logits: Shape (batch, labels).
        labels: Right label of each sample, shape (batch,).
        label_smoothing: Share of the probability, in [0, 1), spread evenly over the labels.

    Returns:
        A float32 scalar, the mean over samples.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def specific_cross_entropy(
    logits: Tensor, labels: Tensor, in_module: Tensor, weight: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of a batch that runs as one module: right answers to its own labels, even ones to all others.

    Own samples choose among all labels, as the parent does.

    Args:
        logits: Shape (batch, labels).
        labels: Right label of each sample, shape (batch,).
        in_module: The module's labels, boolean, shape (labels,).
        weight: Weight of the second part: for samples of other labels, the divergence of the answers among
            these other labels from even odds.
        label_smoothing: As in `cross_entropy`, of the first part.

    Returns:
        A float32 scalar, the mean over all samples.
    """
    own = in_module[labels]
    total = logits.float().sum() * 0.0
    if bool(own.any()):
        total = total + cross_entropy(logits[own], labels[own], label_smoothing) * own.float().mean()
    if not bool(own.all()):
        chances = logits[~own][:, ~in_module].float().log_softmax(-1)
        divergence = -chances.mean(-1) - math.log(chances.shape[-1])
        total = total + weight * divergence.sum() / len(labels)
    return total


def restricted_binary_cross_entropy(logits: Tensor, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over the labels that count, where each label is a yes or no of its own.

    Args:
        logits: Shape (batch, labels).
        labels: 0 or 1, shape (batch, labels).
        allowed: Labels that count, boolean, shape (labels,). `None`: all.

    Returns:
        A float32 scalar, the mean over samples and labels that count.
    """
    if allowed is not None:
        logits, labels = logits[:, allowed], labels[:, allowed]
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def site_masks(neuron_masks: Mapping[str, Tensor]) -> list[Tensor]:
    """Splits the masks of a model's output into one tensor a site and call.

    Args:
        neuron_masks: Site name to soft masks of shape (batch, calls, neurons).

    Returns:
        Tensors of shape (batch, neurons), in site order, calls apart.
    """
    return [mask for calls in neuron_masks.values() for mask in calls.unbind(1)]


def nemo_loss(
    logits: Tensor,
    labels: Tensor,
    neuron_masks: Mapping[str, Tensor],
    groups: Tensor,
    contrastive_weight: float = 0.5,
    sparsity_weight: float = 0.0,
    temperature: float = 0.2,
) -> Tensor:
    """The whole training loss, for a training loop of one's own.

    Args:
        logits: Shape (batch, labels).
        labels: Right label of each sample, shape (batch,); or 0 and 1 for each label, shape (batch, labels).
        neuron_masks: The `neuron_masks` of the parent's output: site name to (batch, calls, neurons).
        groups: Group of each sample, shape (batch,), or membership as `contrastive_loss` takes it.
        contrastive_weight: Weight of `contrastive_loss` [alpha].
        sparsity_weight: Weight of `sparsity_loss` [lambda].
        temperature: Temperature of `contrastive_loss` [tau].

    Returns:
        A float32 scalar: cross-entropy plus the two weighted terms.

    References:
        NeMo (arXiv 2508.11348), overall objective; the sparsity term is ours.
    """
    masks = site_masks(neuron_masks)
    contrast = contrastive_loss(masks, groups, temperature)
    task = cross_entropy if labels.ndim == 1 else restricted_binary_cross_entropy
    return task(logits, labels) + contrastive_weight * contrast + sparsity_weight * sparsity_loss(masks)
