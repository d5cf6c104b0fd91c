"""Builds the sites that `NeMoConfig(sites=...)` describes, for architectures whose layers have unknown names."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel

from nemo_hf.config import LAYER_LISTS, LAYOUTS, NeMoConfig, checked_site

from . import builders
from .builders import ModelLayers
from .patterns import check_found, find_sites
from .sites import ChannelSite, NeuronSite, layer_features

PROJECTIONS = ("query", "key", "value", "fused")
PATHS = (*PROJECTIONS, "output", "layer", "pooled")  # keys of a description that name one layer


def model_sites(
    model: PreTrainedModel, nemo_config: NeMoConfig, channels: Sequence[Mapping[str, Any]] = ()
) -> list[NeuronSite]:
    """The sites that the options describe, or else those that are found and the described `channels`."""
    layers = ModelLayers(model)
    if nemo_config.sites is None:
        found = [*find_sites(model, nemo_config.targets), *(s for one in channels for s in _build(layers, one))]
        return _checked_apart(check_found(model, found, nemo_config.targets))
    wanted = [description for description in nemo_config.sites if description["kind"] in nemo_config.targets]
    sites = [site for description in wanted for site in _build(layers, description)]
    keys = [site.key for site in sites]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated or not sites:
        raise ValueError(
            f"Got NeMoConfig(sites=[...]) with {repeated[0] + ' twice' if repeated else 'no site of these targets'}; "
            "expected each site once. Remove the description that repeats it, or name other targets."
        )
    return _checked_apart(sites)


def _checked_apart(sites: list[NeuronSite]) -> list[NeuronSite]:
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
    """The checked descriptions in a configuration's list of sites: those of sites that can't be found by name."""
    checked = [checked_site(entry["site"]) for entry in entries or [] if isinstance(entry, dict) and "site" in entry]
    if any("*" in path for site in checked for key in LAYER_LISTS for path in site.get(key, [])):
        raise ValueError(
            "Got '*' in the paths of a site in config.json; expected whole paths. The file is damaged: save it again."
        )
    return checked


def build_user_sites(model: PreTrainedModel, description: Mapping[str, Any]) -> list[NeuronSite]:
    """Builds the sites of one description: one for each way to fill in its `"*"`, which stand for parts of a path."""
    return _build(ModelLayers(model), description)


def _build(layers: ModelLayers, description: Mapping[str, Any]) -> list[NeuronSite]:
    build = _channel_site if description["kind"] == "conv" else _linear_site
    return [build(layers, concrete) for concrete in _expanded(layers, description)]


def with_paths(description: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A description with other paths of its layers."""
    return {
        key: change(value) if key in PATHS else [change(path) for path in value] if key in LAYER_LISTS else value
        for key, value in description.items()
    }


def shared_parts(paths: Iterable[str]) -> list[str]:
    """The parts with which all of some paths begin."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]


def _expanded(layers: ModelLayers, description: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    anchor = description["output"] if "output" in description else description["readers"][0]
    wanted = anchor.split(".")
    matches = [
        [part for part, want in zip(parts, wanted, strict=True) if want == "*"]
        for parts in (name.split(".") for name in layers.unique if name)
        if len(parts) == len(wanted) and all(want in ("*", part) for part, want in zip(parts, wanted, strict=True))
    ]
    if not matches:
        raise ValueError(
            f"Got the path {anchor!r} in NeMoConfig(sites=[...]), which no layer has; expected a linear layer such as "
            f"{list(layers.linear)[:6]}. Correct the path."
        )
    for match in matches:

        def fill(path: str, stars: Sequence[str] = match) -> str:
            left = iter(stars)
            return ".".join(next(left, part) if part == "*" else part for part in path.split("."))

        yield with_paths(description, fill)


def _linear_site(layers: ModelLayers, description: Mapping[str, Any]) -> NeuronSite:
    projections = [description[key] for key in PROJECTIONS if key in description]
    linear = [*projections, description["output"], *description.get("producers", [])]
    for path in (*linear, *(description[key] for key in ("layer", "pooled") if key in description)):
        _check_layer(layers, path, is_linear=path in linear)
    output, pooled = description["output"], description.get("pooled")
    site: NeuronSite | None
    if description["kind"] == "ffn":
        site = builders.feed_forward_site(layers, output, description["producers"], output, pooled)
    else:
        # By default the innermost layer around the projections.
        name = description.get("layer") or ".".join(shared_parts(path.rpartition(".")[0] for path in projections))
        heads = description.get("heads")
        heads = heads or builders.head_count(layers.config, layers.by_path[name], layers.linear[output][0])
        if "fused" in description:
            rows = builders.fused_rows(layers, projections[0], description.get("layout", LAYOUTS[0]), output, heads)
        else:
            rows = builders.separate_rows(layers, projections, output, heads)
        site = rows and builders.attention_site(layers, name, output, rows, pooled, description.get("is_rotary"))
    if site is None:
        raise ValueError(
            f"Got the site {dict(description)!r} with layers of (inputs, outputs) "
            f"{ {path: layers.linear[path] for path in linear} }; expected outputs that are the inputs of 'output': "
            "units, or q, k and v of whole heads. Correct the paths, or give 'heads'."
        )
    return site


def _channel_site(layers: ModelLayers, description: Mapping[str, Any]) -> NeuronSite:
    producers, passing, readers = description["producers"], description.get("passing", []), description["readers"]
    for path in (*producers, *passing, *readers):
        _check_layer(layers, path, is_linear=False)
    site = builders.channel_site(layers, producers, passing, readers)
    if site is None:
        raise ValueError(
            f"Got channels made by {list(producers)}, passed on by {list(passing)} and read by {list(readers)}; "
            "expected layers of the same number of channels, with norms by channel or grouped convolutions in between. "
            "Correct the paths."
        )
    return site


def _check_layer(layers: ModelLayers, path: str, is_linear: bool) -> None:
    layer = layers.by_path.get(path)
    if layer is None or (is_linear and layer_features(layer) is None):
        got = "which the model does not have" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"Got the path {path!r} in NeMoConfig(sites=[...]), {got}; expected a {'linear ' * is_linear}layer of the "
            "model. Correct the path; a '*' stands for the same part as in 'output'."
        )
