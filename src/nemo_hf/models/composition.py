"""Joins modules with different labels into one model, and calibrates their logits against each other."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import NeMoPreTrainedModel
from .batches import labelled_batches
from .composed_model import NeMoComposedConfig, NeMoComposedModel
from .configuration import model_class
from .finiteness import check_finite, check_outputs
from .labels import check_answers_once
from .shared_tensors import joint_sizes

logger = logging.getLogger(__name__)

PRIOR = 1e-4
"""Weight of squared log scales and squared biases, in units of each module's spread, so that every fit is finite."""


def compose(
    modules: Sequence[NeMoPreTrainedModel],
    labels: Sequence[str] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> NeMoComposedModel:
    """Joins modules with different labels, of one parent or of several, into one model with joint logits.

    A plain model joins as `make_parent(model).extract_module(labels)`, which keeps all its neurons. Parameters that are
    equal in several modules, as those that no cut changes are in modules of one source, become one, also in the
    modules that were given. `config.sizes` of the result compares it with one module that keeps the neurons of all.

    Args:
        modules: Modules for the same kind of input; they become parts of the result.
        labels: Names of the joint labels in their order; `None`: those of the first module, of the second and so on.
        batches: Validation data on which one scale and one bias per module are fitted: batches of model inputs with
            `labels`, places in the joint order. `None` joins the logits as they are, which suits modules of one source
            only, since models that were trained apart have logits of other scales: modules that share no tensors give
            a warning.

    Returns:
        A model that is saved and loaded like any module.

    Raises:
        TypeError: If an entry is no module.
        ValueError: If modules share a label, differ in task, precision or processor, or `labels` are not theirs.

    References:
        CNNSplitter (arXiv 2209.06116) and MODA (arXiv 2411.01074) reuse modules in other models; the calibration is
        ours, vector scaling (Guo et al., arXiv 1706.04599) with two numbers per module.
    """
    modules = list(modules)
    _check_modules(modules)
    names = [name for module in modules for name in module.config.names.values()]
    joint = names if labels is None else list(labels)
    if sorted(joint) != sorted(names):
        raise ValueError(f"Got labels={joint} for {names}; expected just these in any order. Name each once.")
    processors = [module.processor_files for module in modules if module.processor_files]
    if any(files != processors[0] for files in processors):
        raise ValueError(
            "Got modules with different processors; expected one. Attach one to each: module.attach_processor(...)."
        )
    config = NeMoComposedConfig(
        parts=[module.config.to_dict() for module in modules],
        label_order=[names.index(name) for name in joint],
        scales=[1.0] * len(modules),
        biases=[0.0] * len(modules),
        id2label=dict(enumerate(joint)),
        label2id={name: index for index, name in enumerate(joint)},
        problem_type="single_label_classification",
    )
    composed: NeMoComposedModel = model_class(modules[0].task, NeMoComposedConfig)(config, modules)
    composed.train(False)
    composed.processor_files = processors[0] if processors else {}
    composed.config.sizes = joint_sizes(modules)
    _compare_with_joint_cut(composed)
    if batches is not None:
        _calibrate(composed, batches)
    elif composed.config.sizes is None:
        logger.warning(
            "Joined %d modules that share no tensors, so they may be of models that were trained apart, whose logits "
            "have other scales. Pass batches of validation data to calibrate them.",
            len(modules),
        )
    return composed


def _check_modules(modules: Sequence[Any]) -> None:
    if len(modules) < 2:
        raise ValueError(f"Got {len(modules)} modules to join; expected at least two. Cut some with extract_module.")
    for module in modules:
        if not isinstance(module, NeMoPreTrainedModel) or module.is_parent:
            kind = "parent" if isinstance(module, NeMoPreTrainedModel) else type(module).__name__
            raise TypeError(
                f"Got a {kind} to join; expected modules. Cut one: make_parent(...).extract_module(labels)."
            )
        check_answers_once(module, "Cut one module of all these labels: extract_module(labels).")
        check_finite(module)
    names = [name for module in modules for name in module.config.names.values()]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Got the labels {repeated} in several modules; expected each in one. Cut one of the modules without them."
        )
    for what, name in (("tasks", "task"), ("precisions", "dtype"), ("devices", "device")):
        values = [str(getattr(module, name)) for module in modules]
        if len(set(values)) > 1:
            raise ValueError(
                f"Got modules of the {what} {values}; expected the same. Load them with one task, dtype and device."
            )
    if any(module.config.has_several_labels for module in modules):
        raise ValueError(
            "Got a multi-label module; expected single-label ones, whose labels exclude each other. Run the modules "
            "separately and use their logits side by side."
        )


def _compare_with_joint_cut(composed: NeMoComposedModel) -> None:
    """Says that one cut for all labels would be smaller, if so: neurons that several modules keep are there once."""
    found = composed.config.sizes
    if found is None or found["joint_parameters"] >= found["parameters"]:
        return
    is_larger, rows = found["parameters"] > found["source_parameters"], found["repeated_rows"]
    logger.log(
        logging.WARNING if is_larger else logging.INFO,
        "Joined modules of one source into a model of %d parameters%s: %s. One module for all %d labels with the same "
        "neurons has about %d: if the modules need not be apart, cut it with extract_module and all labels.",
        *(found["parameters"], f", more than the {found['source_parameters']} of the source" if is_larger else ""),
        f"{rows} rows of its tensors are in several of them" if rows else "each fills its heads up to one width",
        *(len(composed.config.id2label or ()), found["joint_parameters"]),
    )


@torch.no_grad()
def _calibrate(composed: NeMoComposedModel, batches: Iterable[Mapping[str, Any]]) -> None:
    """Fits scales and biases by the cross-entropy of the joint logits."""
    found: list[Tensor] = []
    rights: list[Tensor] = []
    names = [name for module in composed.parts for name in module.config.names.values()]
    for inputs, labels, numbers in labelled_batches(composed, batches):
        if bool((labels >= len(names)).any()):
            raise ValueError(
                f"Got the label {labels.max().item()}; expected places among the {len(names)} joint labels. Leave "
                "samples of other labels out, or give them the label -100."
            )
        logits = composed.part_logits(**inputs)
        check_outputs(composed, inputs, logits, names, numbers)
        found.append(logits.double().cpu())
        rights.append(labels.cpu())
    if not found:
        raise ValueError("Got no samples to calibrate on; expected some. Pass validation data with labels.")
    sizes = [len(module.config.names) for module in composed.parts]
    fitted = fit_scales(torch.cat(found), torch.cat(rights), sizes, composed.config.label_order or [])
    composed.config.scales, composed.config.biases = fitted


def fit_scales(
    logits: Tensor, labels: Tensor, sizes: Sequence[int], order: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Fits one scale (above 0) and one bias per module by the cross-entropy of the joint logits.

    `logits`, shape (samples, labels), float64, are those of modules of `sizes` labels in a row; `labels` the joint
    label of each sample; `order` the column of each joint label.
    """
    own = logits.split(list(sizes), -1)
    centers = torch.stack([part.mean() for part in own])
    spreads = torch.stack([part.std(correction=0) for part in own]).clamp(min=1e-6)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[list(order)]
    units = (logits[:, list(order)] - centers[owner]) / spreads[owner]
    fitted = torch.zeros(2, len(sizes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        joint = fitted[0].exp()[owner] * units + fitted[1][owner]
        value = F.cross_entropy(joint, labels) + PRIOR * fitted.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    scales = fitted.detach()[0].exp() / spreads
    return scales.tolist(), (fitted.detach()[1] - scales * centers).tolist()
