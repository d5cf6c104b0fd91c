"""What the labels of a batch say: targets of the loss, ids of labels, and the groups that samples belong to."""

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration import PLACE_TASKS, SEVERAL_LABELS

logger = logging.getLogger(__name__)

IGNORED = -100  # label of samples that count nowhere, as in torch's cross_entropy
SINGLE_LABEL = "single_label_classification"
LABEL_COLUMNS = ("label", "labels", "label_ids")  # in which data sets hold labels
REST_LABELS = ("o", "background", "_background_", "outside", "other", "none", "void")  # for all that has no other label


def label_targets(labels: Any, count: int | None, has_several: bool, checks_values: bool | None = None) -> Tensor:
    """Turns labels as a batch holds them into what a loss takes, or says what is wrong with them (`ValueError`).

    They are ids, int64, shape (batch,), `IGNORED` among them; chances of each label, shape (batch, labels), as mixing
    samples gives them; or, where a sample may have several labels, numbers from 0 to 1 of that shape. `count` is the
    number of labels, if it is known. Checking values makes the host wait for a GPU; `None` checks ids on CPUs only.
    """
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # names, None, lists of unequal lengths
        raise ValueError(
            f"Got labels that make no tensor ({str(labels)[:80]}); expected numbers of one shape for each sample. Turn "
            "names into ids, in the data or the data collator."
        ) from error
    if not has_several and values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    is_float = values.is_floating_point()
    is_list = values.ndim == 2 and count in (None, values.shape[1])
    if values.ndim == 2 and not is_list:
        raise ValueError(
            f"Got lists of {values.shape[1]} labels for a model of {count}; expected a number for each of its labels. "
            f"Correct the labels, or load the model with num_labels={values.shape[1]}."
        )
    if not (is_list if has_several else values.ndim == 1 or (is_list and is_float)):
        wanted, problem, do = "an id", SEVERAL_LABELS, "Correct the labels, or where a sample may have several"
        if has_several:
            wanted, problem, do = "a list of 0 and 1", SINGLE_LABEL, "Turn ids into such lists, or where each has one"
        raise ValueError(
            f"Got labels of shape {tuple(values.shape)}; expected {wanted} for each sample, as the model's "
            f"problem_type says for {count or 'its'} labels. {do}, load the model with problem_type='{problem}'."
        )
    if is_float and not is_list:
        do = (
            "Cast ids that are stored as numbers with a point: dataset.cast_column('label', datasets.Value('int64')); "
            "regression is not supported."
        )
        if bool(values.isnan().any()):
            do = f"Give samples whose label is NaN {IGNORED}, which counts nowhere, and store all as integers."
        raise ValueError(f"Got labels of type {values.dtype}; expected integer ids. {do}")
    if not torch.compiler.is_compiling() and (checks_values or is_list or values.device.type == "cpu"):
        if is_list:
            _check_shares(values, has_several)
        else:
            _check_ids(values, count)
    return values.float() if is_list else values.long()


def _check_ids(ids: Tensor, count: int | None) -> None:
    ids = ids.long()
    wrong = (ids < 0) & (ids != IGNORED) | (ids >= (torch.iinfo(torch.int64).max if count is None else count))
    if bool(wrong.any()):
        value = int(ids[wrong][0])
        do = f"Number the labels from 0, or load the model with num_labels={int(ids.max()) + 1}."
        if value < 0:
            do = f"Leave samples without a label out, or give them the label {IGNORED}, which counts nowhere."
        raise ValueError(f"Got the label {value}; expected ids from 0 to {'' if count is None else count - 1}. {do}")


def _check_shares(shares: Tensor, has_several: bool) -> None:
    inside = (shares >= 0) & (shares <= 1)
    if not bool(inside.all()):
        value = shares[~inside][0].item()
        raise ValueError(f"Got {value} in a list of labels; expected numbers from 0 to 1. Correct the labels.")
    sums = shares.float().sum(-1)
    if not has_several and bool(((sums - 1).abs() > 0.01).any()):
        raise ValueError(
            f"Got lists of labels of which one sums to {sums[(sums - 1).abs().argmax()].item():g}; expected ids, or "
            f"the chances of each label, which sum to 1. Where a sample may have several labels, load the model with "
            f"problem_type='{SEVERAL_LABELS}'."
        )


def label_ids(targets: Tensor, has_several: bool) -> Tensor:
    """Says which labels samples have, by `label_targets`: the id of the one, or the likeliest, shape (batch,).

    Where a sample may have several labels, it marks each that is at least half there, boolean, (batch, labels).
    """
    if has_several:
        return targets >= 0.5
    return targets.argmax(-1) if targets.ndim == 2 else targets


def place_labels(model: Any, labels: Any) -> Tensor:
    """Checks labels of tokens or pixels, the model's ids or the one that its loss ignores; refuses those of boxes."""
    if model.task == "object-detection":
        raise ValueError(
            "Got labels for a parent or module that detects objects; expected none: its loss is that of the plain "
            "model. Train the plain model before the cut, or save_plain(...) a module and train that."
        )
    ids, count = torch.as_tensor(labels), len(model.config.names)
    names = ("semantic_loss_ignore_index", "loss_ignore_index")  # of segmentation
    ignored = next((getattr(model.config, name) for name in names if hasattr(model.config, name)), IGNORED)
    if not torch.compiler.is_compiling() and ids.device.type == "cpu":
        is_known = (ids >= 0) & (ids < count) | (ids == ignored)
        if ids.is_floating_point() or not bool(is_known.all()):
            got = f"numbers of type {ids.dtype}" if ids.is_floating_point() else f"the label {ids[~is_known][0]}"
            raise ValueError(
                f"Got {got} for a {model.config.role} of {count} labels; expected ids from 0 to {count - 1}, in the "
                f"order of config.id2label, or {ignored}, which counts nowhere. Map the labels."
            )
    return ids.long()


def has_label(labels: Tensor, label_ids: Sequence[int]) -> Tensor:
    """Which samples have one of some labels, (batch,): of several, (batch, labels) booleans, or anywhere in them."""
    if labels.dtype == torch.bool:
        return labels[:, list(label_ids)].any(-1)
    own = torch.isin(labels, torch.tensor(label_ids, device=labels.device))
    return own.flatten(1).any(-1) if own.ndim > 1 else own


def task_loss(model: Any, logits: Tensor, labels: Any, known: Tensor | None = None) -> Tensor:
    """The loss of a plain model of the same `problem_type`, for labels of every kind that `label_targets` takes.

    `known` is what the plain model inside has computed, or `None`.
    """
    if logits.shape[1 if logits.ndim == 4 else -1] == 1 and model.config.problem_type != SEVERAL_LABELS:
        raise ValueError("Got labels for a model of one label; expected at least 2. Cut a module for more labels.")
    if known is not None:
        return known
    if logits.ndim == 3:  # of tokens, checked by `place_labels`
        return F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=IGNORED)
    several = model.config.problem_type == SEVERAL_LABELS
    count = logits.shape[-1]  # a module's configuration may name one more, for inputs that it rejects
    targets = label_targets(labels, count, several).to(logits.device)
    if targets.ndim == 2 and not several:
        return F.cross_entropy(logits, targets.to(logits.dtype))
    about = SimpleNamespace(num_labels=count, problem_type=model.config.problem_type)
    loss: Tensor = model.loss_function(targets, logits, about)
    return loss


def labelled_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, float32, mean over the samples with a label, 0 without any; `targets` as of `label_targets`."""
    if targets.ndim == 2:
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    is_any = (targets != IGNORED).any()  # the mean over none would be NaN, and the host does not wait to know
    found = F.cross_entropy(logits.float(), targets.masked_fill(~is_any, 0), label_smoothing=label_smoothing)
    return found * is_any


def check_label_numbers(names: Sequence[str], column: str, id2label: Mapping[int, str] | None) -> None:
    """Refuses a column of labels whose `names`, in order, have other ids than the same names have in a model."""
    known = {str(name): int(index) for index, name in (id2label or {}).items()}
    for index, name in enumerate(names):
        if known.get(name, index) != index:
            do = f"Use dataset.align_labels_with_mapping(model.config.label2id, {column!r})."
            if not set(names) <= set(known):
                do = "Load the model with id2label=dict(enumerate(names)) of the data's own names."
            raise ValueError(
                f"Got data whose column {column!r} calls the label {index} {name!r}, which is {known[name]} in the "
                f"model; expected the same ids in both. {do}"
            )


OWN_EVALUATION = (
    "Run the task's own evaluation on the module and on its source, with the answers of the latter restricted to the "
    "module's labels."
)


def check_answers_once(model: Any, remedy: str = OWN_EVALUATION) -> None:
    """Refuses models that answer at many places of a sample where one answer a sample is counted (`ValueError`)."""
    if model.task in PLACE_TASKS:
        raise ValueError(
            f"Got a model for {model.task}, where one answer a sample is counted; expected a classifier of whole "
            f"samples. {remedy}"
        )


def warn_of_no_rest(config: Any, task: str, label_ids: Sequence[int]) -> None:
    """Warns of a module that can't say that a token or pixel has none of its labels, and names the call that helps."""
    if task not in ("token-classification", "image-segmentation"):
        return
    rest = [index for index, name in config.names.items() if name.lower() in REST_LABELS]
    if set(rest) & set(label_ids):
        return
    where = "token" if task == "token-classification" else "pixel"
    do = "Look at the scores, or train a source that has one such label."
    if rest:
        do = f"Add it: labels={[config.names[index] for index in (*rest, *label_ids)]}."
    logger.warning("Got labels without one for all else: the module gives each %s one of its labels. %s", where, do)


def settle_labels(config: Any) -> None:
    """Brings a configuration in line with a user's changes of `id2label`, `label2id` or `problem_type`.

    Of a parent the plain model takes them over, and groups that were called by their only label are renamed with it.
    """
    is_parent, base = config.role == "parent", config.base_config
    ids = [label for entry in config.label_groups or [] for label in entry["labels"]] if is_parent else config.label_ids
    ids = sorted(ids) if is_parent else list(ids or [])
    known = base.id2label or {}
    before = {index: str(known.get(label, f"LABEL_{label}")) for index, label in enumerate(ids)}
    by_name = {str(name): int(index) for name, index in (vars(config).get("label2id") or {}).items()}
    names = config.names
    if names == before and by_name not in ({}, _inverse(before)):  # `label2id` alone was changed
        names = {index: name for name, index in by_name.items()}
    if sorted(names) != list(range(len(ids))):
        raise ValueError(
            f"Got labels with the ids {sorted(names)[:12]}; expected 0 to {len(ids) - 1}, one for each output. Set "
            "config.id2label to a name for each."
        )
    if by_name not in ({}, _inverse(before), _inverse(names)):
        raise ValueError(
            f"Got label2id={str(by_name)[:200]} with id2label={str(names)[:200]}; expected the same labels in both. "
            "Set config.label2id to {name: index for index, name in config.id2label.items()}."
        )
    config.id2label, config.label2id = names, _inverse(names)
    if not is_parent:
        return
    if names != before:
        renamed = {(name, index): names[index] for index, name in before.items()}
        config.label_groups = [
            {**entry, "name": renamed.get((entry["name"], *entry["labels"]), entry["name"])}
            for entry in config.label_groups
        ]
        base.id2label, base.label2id = dict(names), _inverse(names)
    if config.problem_type != (base.problem_type or "single_label_classification"):
        base.problem_type = config.problem_type


def _inverse(names: Mapping[int, str]) -> dict[str, int]:
    return {name: index for index, name in names.items()}


def group_membership(labels: Tensor, group_of_label: Tensor, groups: int) -> Tensor:
    """Marks the groups of each sample, boolean, (batch, groups); `group_of_label` has shape (labels,).

    `labels` are as `label_ids` returns them.
    """
    if labels.ndim == 1:
        return sample_groups(labels, group_of_label, groups)[:, None] == torch.arange(groups, device=labels.device)
    return (labels.float() @ F.one_hot(group_of_label, groups).float()) > 0


def sample_groups(labels: Tensor, group_of_label: Tensor, groups: int) -> Tensor:
    """Returns the group of each sample, shape (batch,), -1 for none, or of several labels its `group_membership`."""
    if labels.ndim == 2:
        return group_membership(labels, group_of_label, groups)
    return torch.where(labels < 0, -1, group_of_label[labels.clamp(min=0)])


def shares_group(groups: Tensor, others: Tensor | None = None) -> Tensor:
    """Marks which samples share a group with which others (`None`: the same), boolean, shape (batch, samples).

    Both are the group of each sample, shape (batch,), -1 for none, or membership, boolean, shape (batch, groups).
    """
    others = groups if others is None else others
    if groups.ndim == 1:
        return (groups[:, None] == others) & (groups >= 0)[:, None]
    return (groups.float() @ others.float().T) > 0


def group_indices(parent: Any) -> Tensor:
    """Returns the index of each label's group, shape (labels,), on the parent's device."""
    indices = torch.zeros(len(parent.config.names), dtype=torch.long)
    for index, members in enumerate(parent.config.groups.values()):
        indices[list(members)] = index
    return indices.to(parent.device)


def is_settled(model: Any) -> bool:
    """Whether a plain model or a parent says if its samples may have several labels; if not, its labels will."""
    plain = model.model if getattr(model, "is_parent", False) else model
    return plain.config.problem_type is not None or model.config.problem_type == SEVERAL_LABELS


def settle_problem_type(parent: Any, labels: Any, has_loss_function: bool) -> None:
    """Sets the `problem_type` that a parent's plain model lacks by the labels of a batch, as `transformers` does.

    Lists of floats say that a sample may have several labels; chances, which sum to 1, only without a loss function.
    """
    if not is_settled(parent):
        is_list = isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == len(parent.config.names)
        several = is_list and labels.is_floating_point()
        if several and has_loss_function:
            several = bool(((labels.sum(-1) - 1).abs() > 0.01).any())
        parent.config.problem_type = parent.model.config.problem_type = SEVERAL_LABELS if several else SINGLE_LABEL
