"""The losses of modularizing training, as pure tensor functions."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_similarities(mask: Tensor) -> Tensor:
    """Cosine similarity of every two samples' masks.

    Args:
        mask: Soft masks of one site, shape (batch, neurons), values in [0, 1).

    Returns:
        Shape (batch, batch), float32. The norm is sqrt(sum m^2 + 1e-6): a plain one has a gradient of
        1e12 at a mask that is closed everywhere.
    """
    with torch.autocast(mask.device.type, enabled=False):
        mask = mask.float()
        unit = mask * torch.rsqrt(mask.square().sum(-1, keepdim=True) + 1e-6)
        return unit @ unit.T


def group_membership(labels: Tensor, group_of_label: Tensor, groups: int) -> Tensor:
    """Tells which label groups each sample belongs to.

    Args:
        labels: Label ids, shape (batch,), or 0/1 for each label, shape (batch, labels), where a sample may
            have several or none.
        group_of_label: Group of each label id, shape (labels,).
        groups: Number of groups.

    Returns:
        Boolean, shape (batch, groups).
    """
    of_label = F.one_hot(group_of_label, groups)
    if labels.ndim == 1:
        return of_label[labels].bool()
    return (labels.to(torch.float32) @ of_label.to(torch.float32)) > 0


def shares_group(groups: Tensor) -> Tensor:
    """Tells which two samples have a group in common.

    Args:
        groups: Group of each sample, shape (batch,), or membership, boolean, shape (batch, groups).

    Returns:
        Boolean, shape (batch, batch).
    """
    if groups.ndim == 1:
        return groups[:, None] == groups[None, :]
    member = groups.float()
    return (member @ member.T) > 0


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
    similarities = torch.stack([cosine_similarities(mask) for mask in masks]) / temperature  # (sites, batch, batch)
    if groups.shape[0] < 2:  # the sum over "every other sample" is empty: its logarithm is -inf
        return similarities.sum() * 0.0
    itself = torch.eye(groups.shape[0], dtype=torch.bool, device=groups.device)
    positive = shares_group(groups) & ~itself
    log_share = similarities - similarities.masked_fill(itself, float("-inf")).logsumexp(-1, keepdim=True)
    counts = positive.sum(-1)
    per_anchor = (log_share * positive).sum(-1) / counts.clamp(min=1)  # (sites, batch)
    has_positive = (counts > 0).float()
    return -(per_anchor * has_positive).sum(-1).mean() / has_positive.sum().clamp(min=1)


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
    similarities = torch.stack([cosine_similarities(mask) for mask in masks]) / temperature
    positive = shares_group(groups)
    inside = torch.where(positive, similarities, 0.0).exp().sum(-1)
    outside = torch.where(positive, 0.0, similarities).exp().sum(-1)
    return -(inside / (inside + outside)).log().mean()


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
    similarities = torch.stack([cosine_similarities(mask) for mask in masks]).mean(0)
    itself = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    within = shares_group(groups) & ~itself
    between = ~within & ~itself
    cohesion = ((1 - similarities) * within).sum() / within.sum().clamp(min=1)
    coupling = (similarities * between).sum() / between.sum().clamp(min=1)
    return cohesion + coupling_weight * coupling


def mask_objective(
    objective: str, masks: Sequence[Tensor], groups: Tensor, temperature: float, coupling_weight: float
) -> Tensor:
    """The loss over masks that `NeMoConfig.objective` names.

    Args:
        objective: One of `config.OBJECTIVES`.
        masks: As in `contrastive_loss`.
        groups: As in `contrastive_loss`.
        temperature: As in `contrastive_loss`.
        coupling_weight: As in `cohesion_coupling_loss`.

    Returns:
        A float32 scalar.
    """
    if objective == "cohesion-coupling":
        return cohesion_coupling_loss(masks, groups, coupling_weight)
    return (contrastive_loss if objective == "contrastive" else authors_contrastive_loss)(masks, groups, temperature)


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
