"""Sites that a user describes, for architectures whose layers have other names than those in `sites`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from nemo_hf.config import LAYER_LISTS, LAYOUTS, NeMoConfig, checked_site

from .builders import attention_site, channel_site, feed_forward_site, fused_rows, head_count, inputs_of, separate_rows
from .patterns import find_sites
from .sites import ChannelSite, NeuronSite, layer_features

PATHS = ("output", "query", "key", "value", "fused", "layer", "pooled")
"""Keys of a description that name one layer."""


def model_sites(
    model: PreTrainedModel, nemo_config: NeMoConfig, traced: Sequence[Mapping[str, Any]] = (), reason: str = ""
) -> list[NeuronSite]:
    """Returns a model's sites: those that the options describe, or else those that are found.

    Args:
        model: A plain classification model; its weights may be on the meta device.
        nemo_config: The options.
        traced: Descriptions of what was found by running the model, besides what is found by name.
        reason: What to say besides if there is no site.

    Returns:
        The sites of the kinds in `targets`.

    Raises:
        UnsupportedArchitectureError: If there is none.
        ValueError: If a description fits no layers, or layers of other widths.
    """
    if nemo_config.sites is None:
        by_name = find_sites(model, nemo_config.targets, None if traced else reason)
        return _apart([*by_name, *(site for one in traced for site in build_user_sites(model, one))])
    sites = [
        site
        for description in nemo_config.sites
        if description["kind"] in nemo_config.targets
        for site in build_user_sites(model, description)
    ]
    keys = [site.key for site in sites]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated or not sites:
        raise ValueError(
            f"Got NeMoConfig(sites=[...]) with {repeated[0] + ' twice' if repeated else 'no site of these targets'}; "
            "expected each site once. Remove the description that repeats it, or name other targets."
        )
    return _apart(sites)


def _apart(sites: list[NeuronSite]) -> list[NeuronSite]:
    """The sites, if no layer makes, or reads, the channels of two of them."""
    channels = [site for site in sites if isinstance(site, ChannelSite)]
    for paths in ([path for site in channels for path in site.outputs], [p for site in channels for p in site.inputs]):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(
                f"Got two sites of the channels that {twice[0]!r} makes or reads; expected one for each layer. "
                "Put its channels into one description."
            )
    return sites


def user_site_entries(entries: Any) -> list[dict[str, Any]]:
    """Returns the descriptions in a configuration's list of sites: those of sites that can't be found by name.

    Args:
        entries: The list as a file says it, or `None`.

    Returns:
        The descriptions.

    Raises:
        ValueError: If one of them is none of a site.
    """
    found = [entry["site"] for entry in entries or [] if isinstance(entry, dict) and "site" in entry]
    checked = [checked_site(description) for description in found]
    if any("*" in path for site in checked for key in LAYER_LISTS for path in site.get(key, [])):
        raise ValueError(
            "Got '*' in the paths of a site in config.json; expected whole paths there. The file is damaged: save the "
            "model again."
        )
    return checked


def build_user_sites(model: PreTrainedModel, description: Mapping[str, Any]) -> list[NeuronSite]:
    """Builds the sites that one description of `NeMoConfig.sites` stands for.

    Args:
        model: A plain classification model.
        description: The description; `"*"` in its paths stands for one whole part of a path.

    Returns:
        One site for each way in which the paths fit.

    Raises:
        ValueError: If a path is none of a linear layer, or widths don't fit together.
    """
    return [_site(model, concrete) for concrete in _expanded(model, description)]


def _expanded(model: PreTrainedModel, description: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    anchor = description["output"] if "output" in description else description["readers"][0]
    wanted = anchor.split(".")
    names = [name.split(".") for name, _ in model.named_modules() if name]
    matches = [
        [part for part, want in zip(parts, wanted, strict=True) if want == "*"]
        for parts in names
        if len(parts) == len(wanted) and all(want in ("*", part) for part, want in zip(parts, wanted, strict=True))
    ]
    if not matches:
        linear = [name for name, layer in model.named_modules() if layer_features(layer)]
        raise ValueError(
            f"Got the path {anchor!r} in NeMoConfig(sites=[...]), which no layer has; expected a linear "
            f"layer such as {linear[:6]}. Correct the path."
        )
    for match in matches:

        def fill(path: str, stars: Sequence[str] = match) -> str:
            left = iter(stars)
            return ".".join(next(left, part) if part == "*" else part for part in path.split("."))

        concrete = {key: fill(value) if key in PATHS else value for key, value in description.items()}
        yield concrete | {key: [fill(path) for path in description[key]] for key in LAYER_LISTS if key in description}


def _site(model: PreTrainedModel, described: Mapping[str, Any]) -> NeuronSite:
    if described["kind"] == "conv":
        return _channels(model, described["producers"], described.get("passing", []), described["readers"])
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


def _channels(
    model: PreTrainedModel, producers: Sequence[str], passing: Sequence[str], readers: Sequence[str]
) -> NeuronSite:
    for path in (*producers, *passing, *readers):
        _check_layer(model, path, is_linear=False)
    site = channel_site(model, producers[0], producers, passing, readers)
    if site is None:
        raise ValueError(
            f"Got channels made by {list(producers)}, passed on by {list(passing)} and read by {list(readers)}; "
            "expected convolutions or linear layers that make and read the same number of channels, and norms by "
            "channel or grouped convolutions of as many inputs as outputs in between. Correct the paths."
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
