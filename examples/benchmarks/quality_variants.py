"""Training options that were tried and are not in the library: trainers that `quality.py --validation` runs."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_hf import NeMoTrainer
from nemo_hf.models.label_groups import group_membership
from nemo_hf.pruning.plan import RELEVANCE_SCALE
from nemo_hf.training.losses import contrastive_loss, site_masks
from nemo_hf.training.relevance import sparsity_pressure


class Balanced(NeMoTrainer):
    """Batches with as many samples of each group as can be."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return BalancedSampler(self.train_dataset.labels.tolist(), self.args.seed)


class BalancedSampler(torch.utils.data.Sampler):
    """Goes through the groups in turn, each shuffled anew in every epoch."""

    def __init__(self, groups: list[int], seed: int) -> None:
        self.groups, self.draw = groups, random.Random(seed)  # noqa: S311 - not for cryptography

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        queues: dict[int, list[int]] = {}
        for index in self.draw.sample(range(len(self)), len(self)):
            queues.setdefault(self.groups[index], []).append(index)
        while any(queues.values()):
            yield from [queue.pop() for queue in queues.values() if queue]


class Distilling(NeMoTrainer):
    """Rehearsed samples also learn the answers that the parent gives them under their own masks."""

    weight = 1.0

    def compute_loss(self, model, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """As in `NeMoTrainer`, and the taught answers."""
        total, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        rehearsed = self._rehearsed_groups() if model.training else None
        if rehearsed is not None:
            in_module = torch.isin(self._group_of_label, rehearsed)
            own = in_module[inputs["labels"]]
            if bool(own.any()):
                with torch.no_grad():
                    taught = model(**{name: value[own] for name, value in inputs.items() if name != "labels"}).logits
                pairs = [part[:, in_module].log_softmax(-1) for part in (outputs.logits[own], taught)]
                share = own.float().mean()
                total = total + self.weight * share * F.kl_div(*pairs, log_target=True, reduction="batchmean")
        return (total, outputs) if return_outputs else total


class SmallSets(NeMoTrainer):
    """Rehearses sets of two to four groups only."""

    def _rehearsed_groups(self) -> Tensor | None:
        chosen = super()._rehearsed_groups()
        if chosen is None:
            return None
        draw = random.Random(f"{self.args.seed} {self.state.global_step} small")  # noqa: S311 - not for cryptography
        return torch.tensor(sorted(draw.sample(chosen.tolist(), min(len(chosen), draw.randint(2, 4)))))


class Masked(NeMoTrainer):
    """Changes the masks that the generators make; the parent's hooks call `changed` on each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for mask in self.parent.masks.site_masks():
            mask.generator.register_forward_hook(
                lambda generator, inputs, output, site=mask.site: self.changed(output, site, inputs[0])
            )

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask that takes the place of `mask`, (batch, neurons)."""
        raise NotImplementedError


class Settling(NeMoTrainer):
    """The generators stay as they are for the last part of training; the weights go on with the masks they make."""

    begins = 0.7

    def compute_loss(self, model, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """As in `NeMoTrainer`; in the last part the mask terms have no gradient."""
        if self.state.global_step >= self.begins * self.state.max_steps:
            for mask in self.parent.masks.site_masks():
                mask.generator.requires_grad_(False)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class OpenQueries(Masked):
    """No masks on q and k."""

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask that takes the place of `mask`, (batch, neurons)."""
        if "query_key" not in site.parts:
            return mask
        size = site.parts["query_key"]
        return torch.cat([torch.full_like(mask[:, :size], 0.99), mask[:, size:]], -1)


class Leaky(Masked):
    """Closed masks let a tenth of the gradient of the task through."""

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask that takes the place of `mask`, (batch, neurons)."""
        generator = next(m.generator for m in self.parent.masks.site_masks() if m.site is site)
        hidden = F.linear(pooled.float(), generator.down.weight, generator.down.bias).relu()
        leak = F.leaky_relu(F.linear(hidden, generator.up.weight, generator.up.bias).tanh(), 0.1)
        return mask.detach() + (leak - leak.detach())


class HardConcrete(Masked):
    """Gates of the hard concrete kind: noise on the logits while training (Louizos et al., arXiv 1712.01312)."""

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask that takes the place of `mask`, (batch, neurons)."""
        if not self.parent.training:
            return mask
        generator = next(m.generator for m in self.parent.masks.site_masks() if m.site is site)
        hidden = F.linear(pooled.float(), generator.down.weight, generator.down.bias).relu()
        logits = F.linear(hidden, generator.up.weight, generator.up.bias)
        uniform = torch.rand_like(logits).clamp(1e-4, 1 - 1e-4)
        return (logits + 0.3 * (uniform.log() - (1 - uniform).log())).tanh().relu()


class Felt(Masked):
    """The static mask of a rehearsed module passes its gradient on to the masks of the groups that it is made of."""

    def compute_loss(self, model, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """As in `NeMoTrainer`; remembers the groups of the batch."""
        rehearsed = self._rehearsed_groups() if model.training else None
        groups = self._group_of_label[inputs["labels"]]
        self.members = (
            None if rehearsed is None else [groups == group for group in rehearsed if (groups == group).any()]
        )
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask as it is; the static one gets a gradient."""
        static = self.parent.masks.state.static_masks
        if self.parent.training and static is not None and self.members:
            soft = torch.stack([mask[member].mean(0) for member in self.members]).amax(0)
            static[site.key] = static[site.key].detach() + (soft - soft.detach())
        return mask


class Budgets(NeMoTrainer):
    """Sparsity presses on one kind of site four times as much as on the other."""

    attention, ffn = 1.6, 0.4

    def _mask_terms(self, neuron_masks: Mapping[str, Tensor], labels: Tensor, *rest: Any) -> Tensor:
        for site in self.parent.sites:
            mask = neuron_masks[site.key]
            factor = self.attention if "query_key" in site.parts else self.ffn
            if mask.requires_grad:
                mask = Scaled.apply(mask, factor)
            neuron_masks[site.key] = mask
        return super()._mask_terms(neuron_masks, labels, *rest)


class Scaled(torch.autograd.Function):
    """The same value, its gradient times a factor."""

    @staticmethod
    def forward(context: Any, value: Tensor, factor: float) -> Tensor:
        """Returns the value."""
        context.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scales the gradient."""
        return gradient * context.factor, None


class FfnBudgets(Budgets):
    """The other way round."""

    attention, ffn = 0.4, 1.6


class PrototypeContrast(NeMoTrainer):
    """Contrast between the mean masks of groups, whose similarity costs its square, beside that of samples."""

    weight = 1.0

    def _mask_terms(self, neuron_masks: Mapping[str, Tensor], labels: Tensor, *rest: Any) -> Tensor:
        terms = super()._mask_terms(neuron_masks, labels, *rest)
        member = group_membership(labels, self._group_of_label, len(self.parent.config.groups)).float()
        member = member[:, member.sum(0) > 0]
        overlap = []
        for masks in neuron_masks.values():
            means = (member / member.sum(0)).T @ masks[:, 0].float()
            unit = F.normalize(means, dim=-1, eps=1e-3)
            similar = unit @ unit.T
            overlap.append(
                (similar.square().sum() - similar.diagonal().square().sum()) / max(1, similar.numel() - len(similar))
            )
        return terms + self._warmup() * self.weight * torch.stack(overlap).mean()


class Advantage(NeMoTrainer):
    """In a rehearsed step, samples of other labels must give their right label no standardised advantage."""

    def spread(self, centred: Tensor) -> Tensor:
        """Root mean square over the batch of logits of shape (batch, labels)."""
        return centred.square().mean().add(1e-6).sqrt()

    def _task_loss(self, outputs: Any, labels: Tensor, in_module: Tensor | None, kept: int) -> Tensor:
        """As in `NeMoTrainer`, with another penalty on the samples of other labels."""
        if in_module is None or not bool((~in_module[labels]).any()):
            return super()._task_loss(outputs, labels, in_module, kept)
        own = in_module[labels]
        total = outputs.logits.sum() * 0.0
        if bool(own.any()):
            total = F.cross_entropy(outputs.logits[own], labels[own]) * own.float().mean()
        others = (~in_module).nonzero().flatten()
        if len(others) > 1:
            logits = outputs.logits[~own][:, others]
            centred = logits - logits.mean(-1, keepdim=True)
            centred = centred - centred.mean(0)
            spread = self.spread(centred)
            right = centred.gather(1, torch.searchsorted(others, labels[~own])[:, None])
            advantage = (right / spread).mean().clamp(min=0)
            total = total + self.nemo_config.specificity_weight * (~own).float().mean() * advantage
        return total


class OwnAdvantage(Advantage):
    """The advantage of each sample by its own spread."""

    def spread(self, centred: Tensor) -> Tensor:
        """Root mean square over labels, (batch, 1)."""
        return centred.square().mean(-1, keepdim=True).add(1e-4).sqrt()


class Exclusive(NeMoTrainer):
    """Sparsity presses on a sample's neurons by the share of other groups that use them too."""

    least = 0.1

    def _mask_terms(self, neuron_masks: Mapping[str, Tensor], labels: Tensor, *rest: Any) -> Tensor:
        terms = super()._mask_terms(neuron_masks, labels, *rest)
        groups = self._group_of_label[labels]
        change = []
        for mask in self.parent.masks.site_masks():
            used = mask.relevance.float() / RELEVANCE_SCALE
            shared = (used.sum(0) - used) / (len(used) - 1)
            soft = neuron_masks[mask.site.key].amax(1)
            change.append((soft * (self.least + shared[groups] - 1)).mean())
        pressure = sparsity_pressure(self.parent.masks, self.nemo_config)
        return terms + self._warmup() * pressure * torch.stack(change).mean()


class OwnLabels(NeMoTrainer):
    """Rehearsed samples choose among the labels of the module only and not among all."""

    def _task_loss(self, outputs: Any, labels: Tensor, in_module: Tensor | None, kept: int) -> Tensor:
        """As in `NeMoTrainer`, restricted."""
        if in_module is None:
            return super()._task_loss(outputs, labels, in_module, kept)
        allowed = in_module[None, :] | ~in_module[labels][:, None]
        return F.cross_entropy(outputs.logits.masked_fill(~allowed, float("-inf")), labels)


class Taught(NeMoTrainer):
    """Half of the task loss is the divergence from a teacher's softened answers, wherever a sample has a right one.

    The teacher is the plain model that `plain_share` of the epochs trained before, with which the parent begins.
    Contrast may leave out the first sites.
    """

    teaching, softness, contrast_from, contrast_power = 0.5, 2.0, 0.0, 0.0
    teacher: Any = None

    def compute_loss(self, model, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """As in `NeMoTrainer`; asks the teacher first."""
        self.taught = None
        if model.training and self.teaching > 0:
            with torch.no_grad():
                self.taught = self.teacher.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def _task_loss(self, outputs: Any, labels: Tensor, in_module: Tensor | None, kept: int) -> Tensor:
        """As in `NeMoTrainer`, and the teacher's answers."""
        loss = super()._task_loss(outputs, labels, in_module, kept)
        if self.taught is None or not outputs.logits.requires_grad:
            return loss
        answered = torch.ones_like(labels, dtype=torch.bool)
        if in_module is not None and self.nemo_config.specificity_weight > 0:
            answered = in_module[labels]
        pairs = [(part / self.softness).log_softmax(-1) for part in (outputs.logits, self.taught)]
        apart = F.kl_div(*pairs, log_target=True, reduction="none").sum(-1) * self.softness**2
        right = F.cross_entropy(outputs.logits, labels, reduction="none")
        return loss + self.teaching * ((apart - right) * answered).mean()

    def _mask_terms(self, neuron_masks: Mapping[str, Tensor], labels: Tensor, kept: int, *rest: Any) -> Tensor:
        """As in `NeMoTrainer`, with a contrast of each site by its depth."""
        if self.contrast_from == 0 and self.contrast_power == 0:
            return super()._mask_terms(neuron_masks, labels, kept, *rest)
        config = self.nemo_config
        self.parent.nemo_config.contrastive_weight, weight = 0.0, config.contrastive_weight
        try:
            terms = super()._mask_terms(neuron_masks, labels, kept, *rest)
        finally:
            self.parent.nemo_config.contrastive_weight = weight
        depth = torch.linspace(0, 1, len(neuron_masks))
        weights = (depth >= self.contrast_from).float() * depth.clamp(min=1e-3) ** self.contrast_power
        weights = weights / weights.mean()
        groups = self._group_of_label[labels]
        total = terms
        for mask, share in zip(site_masks(neuron_masks), weights.tolist(), strict=True):
            if share > 0:
                contrast = contrastive_loss([mask], groups, config.temperature)
                total = total + self._warmup() * weight * share / len(weights) * contrast
        return total


class Whole(NeMoTrainer):
    """A share of the rehearsed modules is that of all labels."""

    share = 0.3

    def _rehearsed_groups(self) -> Tensor | None:
        chosen = super()._rehearsed_groups()
        draw = random.Random(f"{self.args.seed} {self.state.global_step} whole")  # noqa: S311 - not for cryptography
        if chosen is None or draw.random() >= self.share:
            return chosen
        return torch.arange(len(self.parent.config.groups))


class Noisy(Masked, Taught):
    """Samples take the masks of others of their group, and generators see part of what they pool."""

    exchanged, hidden, teaching = 0.0, 0.0, 0.0

    def compute_loss(self, model, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """As in `NeMoTrainer`; draws who takes whose mask."""
        groups = self._group_of_label[inputs["labels"]]
        order = torch.arange(len(groups))
        for group in groups.unique():
            own = (groups == group).nonzero().flatten()
            order[own] = own[torch.randperm(len(own))]
        stays = torch.rand(len(groups)) >= self.exchanged
        self.order = torch.where(stays, torch.arange(len(groups)), order)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def changed(self, mask: Tensor, site: Any, pooled: Tensor) -> Tensor:
        """The mask that takes the place of `mask`, (batch, neurons)."""
        if not self.parent.training:
            return mask
        if self.hidden > 0:
            generator = next(m.generator for m in self.parent.masks.site_masks() if m.site is site)
            seen = F.dropout(pooled.float(), self.hidden)
            inner = F.linear(seen, generator.down.weight, generator.down.bias).relu()
            mask = F.linear(inner, generator.up.weight, generator.up.bias).tanh().relu()
        return mask if self.exchanged == 0 else mask[self.order]


class Assigned(Taught):
    """In late feed-forward sites each neuron belongs to one group, which the generators learn to open it for.

    Balanced, so that a neuron opens for a sample that is likelier than by chance one of its group.
    """

    assigned_from, assigned_weight, kinds, teaching = 0.5, 1.0, ("units",), 0.0
    positive = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        masks = list(self.parent.masks.site_masks())
        chosen = [m for i, m in enumerate(masks) if i >= self.assigned_from * len(masks)]
        self.logits: dict[str, Tensor] = {}
        for mask in chosen:
            is_attention = "query_key" in mask.site.parts
            if ("attention" if is_attention else "units") in self.kinds:
                mask.generator.register_forward_hook(
                    lambda generator, inputs, output, site=mask.site: self.keep_logits(generator, inputs[0], site)
                )

    def keep_logits(self, generator: Any, pooled: Tensor, site: Any) -> None:
        """Keeps what the masks are made of, (batch, neurons)."""
        if self.parent.training:
            hidden = F.linear(pooled.float(), generator.down.weight, generator.down.bias).relu()
            self.logits[site.key] = F.linear(hidden, generator.up.weight, generator.up.bias)

    def _mask_terms(self, neuron_masks: Mapping[str, Tensor], labels: Tensor, *rest: Any) -> Tensor:
        terms = super()._mask_terms(neuron_masks, labels, *rest)
        groups, count = self._group_of_label[labels], len(self.parent.config.groups)
        losses = []
        for logits in self.logits.values():
            owner = torch.arange(logits.shape[1]) % count
            own = (owner[None, :] == groups[:, None]).float()
            weight = 1 + own * (self.positive * (count - 1) - 1)
            losses.append(F.binary_cross_entropy_with_logits(2 * logits, own, weight / 2))
        self.logits = {}
        return terms + self._warmup() * self.assigned_weight * torch.stack(losses).mean()


VARIANTS = {
    "assigned": Assigned,
    "whole": Whole,
    "noisy": Noisy,
    "taught": Taught,
    "rehearsal over own labels": OwnLabels,
    "exclusive neurons": Exclusive,
    "felt rehearsal": Felt,
    "advantage": Advantage,
    "advantage by sample": OwnAdvantage,
    "balanced batches": Balanced,
    "distilled modules": Distilling,
    "sets of 2 to 4": SmallSets,
    "settling": Settling,
    "q and k open": OpenQueries,
    "leaky gradient": Leaky,
    "hard concrete": HardConcrete,
    "attention presses more": Budgets,
    "ffn presses more": FfnBudgets,
    "group prototypes": PrototypeContrast,
}
