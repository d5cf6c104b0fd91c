"""Trains modules of assigned masks beside the whole network, which teaches them: one more pass over half a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (1.0, 0.5, 0.25)  # of taught modules, relative to that which they have; so smaller cuts are trained, too


def taught_samples(labels: Tensor, in_module: Tensor) -> Tensor:
    """Places of the samples that teach a module: half of a batch, its own labels' first.

    Args:
        labels: As in `taught_loss`.
        in_module: Likewise.
    """
    own = (labels & in_module).any(-1) if labels.ndim == 2 else (labels >= 0) & in_module[labels.clamp(min=0)]
    return own.long().argsort(descending=True, stable=True)[: max(1, len(labels) // 2)]


def taught_loss(logits: Tensor, taught_by: Tensor, labels: Tensor, in_module: Tensor, specificity: float) -> Tensor:
    """Loss of a module's answers against those of the whole network on the same samples: a float32 scalar.

    Samples of the module's labels learn the whole network's chances among these labels (in-place distillation, arXiv
    1903.05134); for the others it is `specificity` times the cross-entropy of the answers, among all labels, to even
    odds; both are means. Where samples have several labels, all learn the chances of each of the module's.

    Args:
        logits: The module's, of all labels, (batch, labels).
        taught_by: The whole network's, likewise; no gradient flows into them.
        labels: Right label of each sample, -100 for none, (batch,); or booleans, (batch, labels).
        in_module: Whether a label is the module's, boolean, (labels,).
        specificity: Weight of the samples of other labels.
    """
    logits, taught_by = logits.float(), taught_by.detach().float()
    own_logits, own_taught = logits[:, in_module], taught_by[:, in_module]
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(own_logits, own_taught.sigmoid())
    known = labels >= 0
    is_own = known & in_module[labels.clamp(min=0)]
    lost = -(own_taught.softmax(-1) * own_logits.log_softmax(-1)).sum(-1)
    loss = (lost * is_own).sum() / is_own.sum().clamp(min=1)
    is_other = known & ~is_own
    spread = -logits.log_softmax(-1).mean(-1)
    return loss + specificity * (spread * is_other).sum() / is_other.sum().clamp(min=1)


@contextmanager
def own_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch norms as they are: those of the whole network and a module differ."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:  # others, as the backward pass of the whole network still needs its own
            norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
