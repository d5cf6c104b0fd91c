"""Builds a module anew with another configuration and state, and compares the two."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import NeMoPreTrainedModel
from .loading import hidden_progress
from .weight_files import size_in_bytes

TOLERANCE = 1e-5  # of logits, times the largest one if that is over 1


def replace_module(
    module: NeMoPreTrainedModel,
    config: Any,
    state: Mapping[str, Tensor],
    checks: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> int:
    """Builds a module anew with another configuration and state, as loading does, and lets it take a module's place.

    `checks` are pairs of inputs, for the module as it is and for the new one, that must have the same logits. Returns
    how many bytes of weights are saved.
    """
    config.save_identity = config.rejection = None
    dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in state.values()} else torch.float32
    with hidden_progress():
        values = {name: tensor.detach() for name, tensor in state.items()}
        kwargs: dict[str, Any] = {"config": config, "state_dict": values, "dtype": dtype}
        try:
            new = type(module).from_pretrained(None, None, module.sites, **kwargs)
        except (OSError, ValueError) as error:  # tensors that don't fit
            raise ValueError(
                f"Got a module of {config.base_class} with other tensors of the size of its tables ({error}); expected "
                "none. Leave the tables as they are."
            ) from error
    new.config.name_or_path = module.config.name_or_path
    for name, tensor in new.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(state[name])  # its precision and device
        tensor.requires_grad_(state[name].requires_grad)
    new.to(module.device)  # type: ignore[arg-type]
    for before, after in checks:
        expected, got = _logits(module, before), _logits(new, after)
        difference = float((got - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"Got logits that change by {difference:.1e} with smaller tables; expected the same: this "
                f"{config.base_class} uses them in another way. Leave them as they are."
            )
    size, new_size = (size_in_bytes(each.state_dict(keep_vars=True).values()) for each in (module, new))
    new.train(module.training)
    module.model, module.config, module.heads = new.model, new.config, new.heads
    module._report = module._weight_versions = module._weight_hashes = None
    module.drop_stale_results()  # from here on changes of the weights count
    return size - new_size


@torch.no_grad()
def _logits(module: NeMoPreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Logits in eval mode, on the CPU."""
    was_training = module.training
    module.eval()
    moved = {name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    logits: Tensor = module(**moved).logits
    module.train(was_training)
    return logits.float().cpu()
