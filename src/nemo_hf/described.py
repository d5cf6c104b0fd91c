"""Sites that a user describes, for architectures whose layers have other names than those in `sites`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from .config import LAYOUTS, NeMoConfig
from .layouts import attention_site, feed_forward_site, fused_rows, head_count, inputs_of, separate_rows
from .neurons import NeuronSite, layer_features
from .sites import find_sites

PATHS = ("output", "query", "key", "value", "fused", "layer", "pooled")
"""Keys of a description that name one layer."""


def model_sites(model: PreTrainedModel, nemo_config: NeMoConfig) -> list[NeuronSite]:
    """Returns a model's sites: those that the options describe, or else those that are found by name.

    Args:
        model: A plain classification model; its weights may be on the meta device.
        nemo_config: The options.

    Returns:
        The sites of the kinds in `targets`.

    Raises:
        UnsupportedArchitectureError: If there is none.
        ValueError: If a description fits no layers, or layers of other widths.
    """
    if nemo_config.sites is None:
        return find_sites(model, nemo_config.targets)
    sites = [
        site
        for description in nemo_config.sites
        if description["kind"] in nemo_config.targets
        for site in described_sites(model, description)
    ]
    keys = [site.key for site in sites]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated or not sites:
        raise ValueError(
            f"Got NeMoConfig(sites=[...]) with {repeated[0] + ' twice' if repeated else 'no site of these targets'}; "
            "expected each site once. Remove the description that repeats it, or name other targets."
        )
    return sites


def described_sites(model: PreTrainedModel, description: Mapping[str, Any]) -> list[NeuronSite]:
    """Builds the sites that one description of `NeMoConfig.sites` stands for.

    Args:
        model: A plain classification model.
        description: The description; `"*"` in its paths stands for one part of a path.

    Returns:
        One site for each way in which the paths fit.

    Raises:
        ValueError: If a path is none of a linear layer, or widths don't fit together.
    """
    return [_site(model, concrete) for concrete in _expanded(model, description)]


def _expanded(model: PreTrainedModel, description: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    pattern = re.compile(re.escape(description["output"]).replace(r"\*", r"([^.]+)"))
    matches = [match for name, _ in model.named_modules() if (match := pattern.fullmatch(name))]
    if not matches:
        linear = [name for name, layer in model.named_modules() if layer_features(layer)]
        raise ValueError(
            f"Got the path {description['output']!r} in NeMoConfig(sites=[...]), which no layer has; expected a linear "
            f"layer such as {linear[:6]}. Correct the path."
        )
    for match in matches:

        def fill(path: str, parts: Sequence[str] = match.groups()) -> str:
            for part in parts if "*" in path else ():
                path = path.replace("*", part, 1)
            return path

        concrete = {key: fill(value) if key in PATHS else value for key, value in description.items()}
        if "producers" in concrete:
            concrete["producers"] = [fill(path) for path in description["producers"]]
        yield concrete


def _site(model: PreTrainedModel, described: Mapping[str, Any]) -> NeuronSite:
    named = [described[key] for key in ("query", "key", "value", "fused", "output") if key in described]
    named += described.get("producers", [])
    for path in (*named, *(described[key] for key in ("layer", "pooled") if key in described)):
        _check_layer(model, path, is_linear=path in named)
    output, pooled = described["output"], described.get("pooled")
    projections = [described[key] for key in ("query", "key", "value", "fused") if key in described]
    name = output if described["kind"] == "ffn" else described.get("layer") or _layer_around(projections)
    site: NeuronSite | None
    if described["kind"] == "ffn":
        site = feed_forward_site(model, name, described["producers"], output, pooled)
    else:
        heads = described.get("heads") or head_count(model, model.get_submodule(name), inputs_of(model, output))
        if "fused" in described:
            rows = fused_rows(model, described["fused"], described.get("layout", LAYOUTS[0]), output, heads)
        else:
            rows = separate_rows(model, [described[key] for key in ("query", "key", "value")], output, heads)
        rotary = described.get("is_rotary")
        site = None if rows is None else attention_site(model, name, output, rows, pooled, rotary)
    if site is None:
        shapes = {path: layer_features(model.get_submodule(path)) for path in named}
        raise ValueError(
            f"Got the site {dict(described)!r} with layers of (inputs, outputs) {shapes}; expected outputs that are "
            "the inputs of 'output': units, or q, k and v of whole heads. Correct the paths, or give 'heads'."
        )
    return site


def _check_layer(model: PreTrainedModel, path: str, is_linear: bool) -> None:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if layer is None or (is_linear and layer_features(layer) is None):
        got = "which the model has not" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"Got the path {path!r} in NeMoConfig(sites=[...]), {got}; expected a {'linear ' * is_linear}layer of the "
            "model. Correct the path; a '*' stands for the part that it has in 'output'."
        )


def _layer_around(paths: Sequence[str]) -> str:
    """Path of the innermost layer around some layers."""
    common: list[str] = []
    for parts in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
