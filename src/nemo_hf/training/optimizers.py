"""The learning rate of mask generators, and a check that an optimizer trains them."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nemo_hf.models.base import NeMoPreTrainedModel

from .distributed import is_sharded

MASK_LEARNING_RATE_FACTOR = 3


def split_mask_parameters(
    optimizer: Optimizer, masks: Sequence[nn.Parameter], given: float | None, default: float
) -> None:
    """Moves the generators' parameters to groups of their own with a learning rate, `given` or 3 times the group's.

    `default` stands in for the rate of a group that has none (Adafactor with relative steps).
    """
    ids = {id(parameter) for parameter in masks}
    for group in list(optimizer.param_groups):
        if chosen := [parameter for parameter in group["params"] if id(parameter) in ids]:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            base = default if group.get("lr") is None else group["lr"]
            rate = MASK_LEARNING_RATE_FACTOR * base if given is None else given
            optimizer.add_param_group({**group, "params": chosen, "lr": rate})


def check_optimizer(optimizer: Any, parent: NeMoPreTrainedModel) -> None:
    """Refuses an optimizer that trains the plain model alone, as one made from `model.parameters()` does."""
    if is_sharded(parent):  # whose optimizer gets other tensors later
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [p for p in parent.parent_masks().parameters() if p.requires_grad and id(p) not in trained]
    if left_out and any(id(parameter) in trained for parameter in parent.parameters()):
        raise ValueError(
            f"Got an optimizer without {len(left_out)} parameters of the mask generators; expected all of them. Make "
            "the parent before, parent = nemo_hf.make_parent(model, nemo_config), and the optimizer from "
            "parent.parameters(); or pass NeMoTrainer(..., optimizer_cls_and_kwargs=...)."
        )
