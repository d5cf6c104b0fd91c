"""Masks of heads and units by Fisher information, with mask tuning, for `cutting.py`.

After Kwon et al., arXiv 2204.09656.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from cutting_units import Job, Masks, UnitGroup, cut, unit_groups
from tasks import Split
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from nemo_hf.neurons.sites import AttentionSite

DAMP = 1.0  # of mask tuning, as in the paper
LARGEST_MASK = 10.0  # beyond which the masks of a layer, and of those behind it, stay untuned; as in the paper


@contextmanager
def masked(model: nn.Module, units: Sequence[UnitGroup], masks: Masks, seen: dict[str, Tensor] | None = None):
    """Multiplies units by masks, (units,) or (batch, units), by site key; `seen` gets the inputs before."""

    def hook(group: UnitGroup) -> Callable:
        def multiply(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            if seen is not None:
                seen[group.site.key] = inputs[0]
            values = masks[group.site.key][..., group.of_input]
            values = values if values.ndim == 1 else values.view(len(values), *[1] * (inputs[0].ndim - 2), -1)
            return (inputs[0] * values,)

        return multiply

    handles = [model.get_submodule(group.site.output).register_forward_pre_hook(hook(group)) for group in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask_gradients(job: Job, units: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """Gradients of the loss to masks of one, for each calibration sample: (samples, units) by site key."""
    found: dict[str, list[Tensor]] = {group.site.key: [] for group in units}
    for batch in job.calibration.batches(50):
        labels = batch.pop("labels")
        masks = {group.site.key: torch.ones(len(labels), group.count, requires_grad=True) for group in units}
        with masked(job.source, units, masks):
            logits = job.source(**batch).logits[:, list(job.labels)]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for key, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
            found[key].append(gradient)
    return {key: torch.cat(gradients) for key, gradients in found.items()}


def search(fisher: Masks, units: Sequence[UnitGroup], budget: float) -> dict[str, Tensor]:
    """Masks of 0 and 1 within a budget of weights that lose the least importance: diagonal Fisher, heads and units."""
    kinds = [
        [group for group in units if isinstance(group.site, AttentionSite) == is_attention] for is_attention in (1, 0)
    ]
    orders = []
    for groups in kinds:
        scores = torch.cat([fisher[group.site.key] for group in groups]).double()
        orders.append((scores, scores.argsort(descending=True, stable=True), groups[0].cost))
    (head_scores, head_order, head_cost), (unit_scores, unit_order, unit_cost) = orders
    best, chosen = -1.0, (0, 0)
    for count in range(min(len(head_order), int(budget / head_cost)) + 1):
        rest = min(len(unit_order), int((budget - count * head_cost) / unit_cost))
        kept = float(head_scores[head_order[:count]].sum() + unit_scores[unit_order[:rest]].sum())
        if kept > best:
            best, chosen = kept, (count, rest)
    masks = {}
    for (scores, order, _), groups, count in zip(orders, kinds, chosen, strict=True):
        flat = torch.zeros(len(scores)).index_fill(0, order[:count], 1.0)
        masks |= dict(zip([g.site.key for g in groups], flat.split([g.count for g in groups]), strict=True))
    return masks


def rearrange(mask: Tensor, gradients: Tensor) -> Tensor:
    """The mask of as many units whose closed ones' gradients (samples, units) sum to little, chosen greedily."""
    products = (gradients.T @ gradients).double()  # (units, units)
    order = products.diagonal().argsort(stable=True)
    count = int((mask == 0).sum())
    closed = torch.zeros(len(mask), dtype=torch.float64).index_fill(0, order[:count], 1.0)
    sums = products @ closed
    for unit in order[count:] if count else ():
        closed[unit], sums = 1.0, sums + products[unit]
        gains = torch.where(closed > 0, 2 * sums - products.diagonal(), -torch.inf)  # of opening a closed one again
        opened = gains.argmax()
        closed[opened], sums = 0.0, sums - products[opened]
    return 1 - closed.to(mask.dtype)


def stream_layer(model: nn.Module, group: UnitGroup) -> tuple[nn.Module, bool]:
    """The layer that takes, or whose output is, the residual stream right behind a site; whether it is the output."""
    layers = dict(model.named_modules())
    around = group.site.output.rpartition(".")[0]
    if f"{around}.LayerNorm" in layers:  # BERT and its relatives
        return layers[f"{around}.LayerNorm"], False
    while around and f"{around}.layernorm_after" not in layers:
        around = around.rpartition(".")[0]
    if not around:
        raise SystemExit(f"Got {group.site.key}; expected a block as in BERT or ViT, whose residual stream is known.")
    is_attention = isinstance(group.site, AttentionSite)
    return (layers[f"{around}.layernorm_after"], False) if is_attention else (layers[around], True)


@torch.no_grad()
def streams(
    model: nn.Module, wanted: Sequence[UnitGroup], units: Sequence[UnitGroup], masks: Masks, data: Split
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yields for each batch, by site key, what the layer that reads the units takes, and the stream behind it."""
    found: dict[str, Tensor] = {}

    def recorder(group: UnitGroup, is_output: bool) -> Callable:
        def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor | tuple[Tensor]) -> None:
            found[group.site.key] = (output[0] if isinstance(output, tuple) else output) if is_output else inputs[0]

        return record

    layers = [(group, *stream_layer(model, group)) for group in wanted]
    handles = [layer.register_forward_hook(recorder(group, is_output)) for group, layer, is_output in layers]
    try:
        for batch in data.batches(50):
            del batch["labels"]
            seen: dict[str, Tensor] = {}
            with masked(model, units, masks, seen):
                model(**batch)
            read = {group.site.key: seen[group.site.key] for group in wanted}
            first = next(iter(read.values()))
            admitted = batch.get("attention_mask", torch.ones(first.shape[:2])).bool()
            yield {key: (inputs[admitted], found[key][admitted]) for key, inputs in read.items()}
    finally:
        for handle in handles:
            handle.remove()


def tuned_mask(
    pairs: Iterator[tuple[Tensor, Tensor, Tensor]], weight: Tensor, of_input: Tensor, mask: Tensor, damp: float = DAMP
) -> Tensor:
    """Scales the open units of a mask so that the stream behind a site is nearest to the source's (least squares).

    `pairs` yields the layer's inputs, (tokens, inputs), the stream behind it, and that of the source, (tokens, width);
    `weight` is (width, inputs). Minimises |A r - (source - stream)|^2 + damp^2 |r|^2, where column i of A is what unit
    i adds; the masks are 1 + r. Products of unit columns are those of inputs times those of weights.
    """
    kept = mask.nonzero().squeeze(-1)
    is_read = mask[of_input] != 0
    units = torch.searchsorted(kept, of_input[is_read])  # place in `kept` of each input that is read
    inputs, count = len(units), len(kept)
    weight = weight[:, is_read].double()
    products, sides = torch.zeros(inputs, inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64)
    for read, stream, source in pairs:
        read, missing = read[:, is_read].double(), (source - stream).double()
        products += read.T @ read
        sides += (read.T @ missing * weight.T).sum(-1)
    products *= weight.T @ weight
    system = damp**2 * torch.eye(count, dtype=torch.float64)
    by_unit = torch.zeros(count, inputs, dtype=torch.float64).index_add_(0, units, products)
    system.index_add_(1, units, by_unit)
    sides = torch.zeros(count, dtype=torch.float64).index_add_(0, units, sides)
    return mask.index_copy(0, kept, (1 + torch.linalg.solve(system, sides)).to(mask.dtype))


def fisher(job: Job, tunes: bool = True) -> PreTrainedModel:
    """Masks by Fisher information, rearranged in each layer and, perhaps, tuned (Kwon et al., arXiv 2204.09656)."""
    units = unit_groups(job.source)
    gradients = mask_gradients(job, units)
    budget = job.retention * sum(group.cost * group.count for group in units)
    masks = search({key: values.square().mean(0) for key, values in gradients.items()}, units, budget)
    masks = {key: rearrange(mask, gradients[key]) for key, mask in masks.items()}
    kept = {key: mask.nonzero().squeeze(-1) for key, mask in masks.items()}
    open_masks = {group.site.key: torch.ones(group.count) for group in units}
    whole = streams(job.source, units, units, open_masks, job.calibration) if tunes else ()
    sources = [{key: stream for key, (_, stream) in batch.items()} for batch in whole]
    for group in units if tunes else ():
        key, layer = group.site.key, job.source.get_submodule(group.site.output)
        own = streams(job.source, [group], units, masks, job.calibration)
        triples = ((*batch[key], source[key]) for batch, source in zip(own, sources, strict=True))
        tuned = tuned_mask(triples, layer.weight.detach(), group.of_input, masks[key])
        if not bool(tuned.abs().max() <= LARGEST_MASK):
            break
        masks[key] = tuned
    model = copy.deepcopy(job.source)
    for group in units:
        mask = masks[group.site.key]
        scales = torch.where(mask == 0, 1.0, mask)  # what is closed is cut
        model.get_submodule(group.site.output).weight.data *= scales[group.of_input]
    return cut(model, job.labels, units, kept)
