"""Tensors that modules of one source have in common: held once, and what a joint cut of the source would save."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_hf.pruning.layer_edits import layer_weight, weight_shape

from .base import NeMoPreTrainedModel
from .config_checks import damaged

Shares = dict[str, float]  # of rows or columns that are kept, by path of the layer


def share_equal(parts: Sequence[NeMoPreTrainedModel]) -> None:
    """Makes parameters of the same name, type and values in several modules one; what was measured of them holds on."""
    seen: dict[str, list[nn.Parameter]] = {}
    for part in parts:
        part.drop_stale_results()
        aliases: dict[nn.Parameter, list[str]] = {}
        for name, parameter in part.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        for parameter, names in aliases.items():
            known = seen.setdefault(names[0], [])
            same = next((other for other in known if _are_equal(parameter, other)), None)
            if same is None:
                known.append(parameter)
            for name in names if same is not None else ():
                path, _, leaf = name.rpartition(".")
                setattr(part.get_submodule(path), leaf, same)
        part._weight_versions = part._weight_hashes = None  # equal values: no change
        part.drop_stale_results()


def _are_equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    about = [(each.shape, each.dtype, each.device, each.requires_grad, each.is_meta) for each in (one, other)]
    return one is other or (about[0] == about[1] and not one.is_meta and torch.equal(one, other))


def shared_names(parts: Sequence[NeMoPreTrainedModel]) -> dict[str, str]:
    """Names of parameters that an earlier part holds too, and the names there; of tied ones, those that are stored."""
    found: dict[str, str] = {}
    first: dict[nn.Parameter, tuple[int, str]] = {}
    for index, part in enumerate(parts):
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if name in part.all_tied_weights_keys:
                continue
            owner, full = first.setdefault(parameter, (index, f"part_{index}.{name}"))
            if owner != index:
                found[f"part_{index}.{name}"] = full
    return found


def check_shared(parts: Sequence[NeMoPreTrainedModel], shared: Mapping[str, str]) -> None:
    """Checks names of shared tensors that a file gives: of two parts, of one shape, and none by way of another."""
    names = [{f"part_{i}.{name}": p for name, p in part.named_parameters()} for i, part in enumerate(parts)]
    owner = {name: index for index, own in enumerate(names) for name in own}
    shapes = {name: (p.shape, p.dtype) for own in names for name, p in own.items()}
    for name, other in shared.items():
        fits = name in owner and other in owner and owner[other] < owner[name] and shapes[name] == shapes[other]
        if not fits or other in shared:
            got = f"a config.json by which {name[:200]!r} is the tensor {str(other)[:200]!r}"
            raise damaged(got, "one of the same shape in an earlier module")


def joint_sizes(parts: Sequence[NeMoPreTrainedModel]) -> dict[str, int] | None:
    """Parameters of modules of one source that share tensors, of that source, and of one module with all their neurons.

    Neurons of several modules are the same where rows of a layer that produces them are equal. `None` for modules that
    have no matrix in common, or other configurations, and so are not known to be of one source.
    """
    matrices = {parameter for parameter in parts[0].parameters() if parameter.ndim > 1}
    about = _structure(parts[0])
    if any(_structure(part) != about or matrices.isdisjoint(part.parameters()) for part in parts):
        return None
    with torch.device("meta"):
        source = copy.deepcopy(parts[0].config).build_plain()
    outputs, inputs, repeated = _kept_shares(parts, source)
    outputs |= dict.fromkeys(parts[0].heads, sum(part.num_labels for part in parts) / (source.config.num_labels or 1))
    joint = 0.0
    for name, parameter in source.named_parameters():
        path, _, leaf = name.rpartition(".")
        joint += parameter.numel() * outputs.get(path, 1.0) * (inputs.get(path, 1.0) if leaf == "weight" else 1.0)
    held = {parameter: parameter.numel() for part in parts for parameter in part.parameters()}
    numbers = {"parameters": sum(held.values()), "joint_parameters": round(joint)}
    return numbers | {"source_parameters": int(source.num_parameters()), "repeated_rows": repeated}


def _structure(part: NeMoPreTrainedModel) -> Any:
    config: Any = part.config
    base = {**config.base_config.to_dict(), "dtype": None, "_name_or_path": None}
    return config.base_class, base, [site.key for site in part.sites]


def _kept_shares(parts: Sequence[NeMoPreTrainedModel], source: nn.Module) -> tuple[Shares, Shares, int]:
    """Shares of the outputs and inputs of a source's layers, by path, that any module keeps; rows held repeatedly."""
    repeated = 0
    outputs: Shares = {}
    inputs: Shares = {}
    for site in parts[0].sites:
        paths = list(dict.fromkeys(rows.layer for rows, _ in site.produced()))
        for path in paths:
            held = [layer_weight(part.model.get_submodule(path)).flatten(1).cpu() for part in parts]
            # Without the padding of narrow heads; channels may read different numbers of channels.
            rows = [row.tobytes() for weight in held for row in weight[weight.any(-1)].numpy()]
            distinct = len(set(rows))
            repeated += len(rows) - distinct
            outputs[path] = min(1.0, distinct / weight_shape(source.get_submodule(path))[0])
        kept = outputs[paths[-1]]  # of attention the values, which come last
        inputs |= dict.fromkeys(site.readers, kept)
        outputs |= dict.fromkeys(site.layers - {site.pooled, *site.readers, *paths}, kept)  # norms between
    return outputs, inputs, repeated
