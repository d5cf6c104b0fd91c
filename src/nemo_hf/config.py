"""Options of a modularizing training run, checked once, and how labels, groups and ids are named."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TARGETS = ("attention", "ffn", "conv")
SITE_KEYS = {
    "ffn": ({"producers", "output"}, {"pooled"}),
    "attention": ({"query", "key", "value", "output"}, {"heads", "layer", "pooled", "is_rotary"}),
    "conv": ({"producers", "readers"}, {"passing"}),
    "fused attention": ({"fused", "output"}, {"heads", "layer", "pooled", "is_rotary", "layout"}),
}
"""What describes a site of one's own: needed keys, and others that may be given."""
LAYER_LISTS = ("producers", "passing", "readers")
"""Keys of a description that name several layers."""
OBJECTIVES = ("contrastive", "contrastive-authors", "cohesion-coupling", "moda")
SHAPING_OPTIONS = ("targets", "sites", "generator_rank", "hard_masks", "label_groups", "group_column", "has_generators")
"""Options by which the masks of a parent have their shape."""
LAYOUTS = ("one after another", "by key/value head")
LabelLike = int | str


@dataclass
class NeMoConfig:
    """What is masked and how the masks are trained.

    The symbols in brackets are those of the NeMo paper (arXiv 2508.11348) and of module rehearsal.

    Args:
        targets: Kinds of neurons that get masks, any of `"attention"`, `"ffn"` and `"conv"` (channels
            of convolutions).
        generator_rank: Hidden width of each mask generator. `None` takes the largest rank, at most 64, whose generators
            stay within 10 % of the base model's parameters (6 % from hidden size 384 up).
        objective: Which loss pulls the masks of one group together and those of others apart:
            `"contrastive"`, `"contrastive-authors"` (the NeMo authors' code, a baseline: see
            `losses.authors_contrastive_loss`), `"cohesion-coupling"` (MwT, arXiv 2306.09376) or `"moda"`
            (arXiv 2411.01074): that loss over the activity of rectified units in place of masks, without
            generators; a unit is open for a sample if it is not 0 at all positions.
        contrastive_weight: Weight of that loss [alpha; MODA's affinity], at least 0.
        coupling_weight: Weight of coupling relative to cohesion under `"cohesion-coupling"` [MwT's beta / alpha]
            and `"moda"` [dispersion / affinity].
        temperature: Temperature of the contrastive loss [tau], above 0.
        gather_across_devices: Whether that loss compares masks across all processes and not only within each.
        sparsity_weight: Weight of the mean mask value [lambda; 0 in the paper; MODA's compactness], at least 0.
        retention_target: Share of the weights of masked layers, in (0, 1], that the module of one group shall
            keep on average: so many of the attention and feed-forward neurons, and the square root of it of
            channels, since both sides of a weight are cut there. `sparsity_weight` is then only where the weight
            starts; it rises while modules are larger and falls while they are smaller. `None` keeps the weight.
        hard_masks: Whether the forward pass sees 0/1 masks (straight-through gradient) or the soft
            values in [0, 1).
        static_evaluation: Whether a parent with hard masks answers in eval mode as the module of all its labels
            would, or with the neurons that each input opens, as in the paper: a misjudged input loses its answer.
        detach_pooled: Whether the generators only watch the hidden states. If not, the gradient of the masks
            also moves what they watch, as in the paper.
        mask_learning_rate: Learning rate of the mask generators; `None` takes 3 times
            `TrainingArguments.learning_rate`, so that masks close early and the model adapts to them.
        warmup_ratio: Share of the training steps, in [0, 1], over which `contrastive_weight` and
            `sparsity_weight` grow linearly from 0, and before whose end no module is rehearsed.
        rehearsal_probability: Share of the optimizer steps, in [0, 1], in which a random set of groups
            is trained as the module that it would become [p].
        specificity_weight: In a rehearsed step the samples of other groups run as that module too, and
            this weighs how far its answers to them, among their own labels, are from even: 0 leaves them
            out. Modules of other labels then know less of these, at a price in the parent's accuracy.
        relevance_threshold: Share of a group's samples, in (0, 1], that must open a neuron for the
            group's modules to keep it [theta]. Rehearsal and extraction both use it.
        label_groups: Which labels form a group: a mapping of group name to label names or ids. `None`
            makes each label its own group, unless `group_column` is given.
        group_column: Name of a training data set column that holds each sample's group, a function of the label.
        sites: Where neurons are, for architectures that are not known by the names of their layers: one
            description a site, in place of those that would be found. `"*"` stands for one whole part of a path,
            so that one description serves all blocks. Feed-forward: `{"kind": "ffn", "producers": [...],
            "output": ...}`. Attention: `{"kind": "attention", "query": ..., "key": ..., "value": ...,
            "output": ..., "heads": 12}`, or `"fused": ...` with `"layout"` (`"one after another"`, the
            default, or `"by key/value head"`) in place of the three. Optional: `layer`, the attention layer
            whose attribute holds the width of a head; `is_rotary`, whether q and k are rotated as a whole;
            and `pooled`, the layer whose input is pooled. Channels: `{"kind": "conv", "producers": [...],
            "passing": [...], "readers": [...]}`: layers that make the channels, norms and grouped convolutions
            that they pass through, and layers that read them.
            `nemo-hf inspect --propose` and `propose_sites` write such descriptions.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is outside its range.

    Example:
        >>> NeMoConfig(label_groups={"pets": ["cat", "dog"], "vehicles": [0, 1]}).temperature
        0.2
    """

    targets: Sequence[str] = TARGETS
    generator_rank: int | None = None
    objective: str = "contrastive"
    contrastive_weight: float = 0.5
    coupling_weight: float = 1.0
    temperature: float = 0.2
    gather_across_devices: bool = True
    sparsity_weight: float = 0.2
    retention_target: float | None = 0.2
    hard_masks: bool = True
    static_evaluation: bool = True
    detach_pooled: bool = True
    mask_learning_rate: float | None = None
    warmup_ratio: float = 0.1
    rehearsal_probability: float = 0.5
    specificity_weight: float = 0.0
    relevance_threshold: float = 0.5
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None
    group_column: str | None = None
    sites: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        self._check_targets()
        rank = self.generator_rank
        if rank is not None and (not _is_number(rank, integer=True) or rank < 1):
            raise ValueError(f"Got generator_rank={rank!r}; expected None or an integer of 1 or more. Choose another.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Got objective={self.objective!r}; expected one of {list(OBJECTIVES)}. Choose another.")
        self._check_numbers()
        for name in ("hard_masks", "static_evaluation", "detach_pooled", "gather_across_devices"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Got {name}={getattr(self, name)!r}; expected True or False.")
        if not self.has_generators and not self.hard_masks:
            raise ValueError("Got hard_masks=False with objective='moda'; expected True: activity is no soft mask.")
        self._check_groups()
        if self.sites is not None:
            if isinstance(self.sites, (str, Mapping)) or not isinstance(self.sites, Sequence) or not self.sites:
                raise TypeError(f"Got sites={self.sites!r}; expected a list of descriptions, or None to find them.")
            self.sites = [checked_site(site) for site in self.sites]

    @property
    def has_generators(self) -> bool:
        """Whether networks make the masks; under `"moda"` the units' own activity takes their place."""
        return self.objective != "moda"

    def _check_numbers(self) -> None:
        for name in ("contrastive_weight", "coupling_weight", "sparsity_weight", "specificity_weight"):
            self._check_range(name, 0, float("inf"))
        for name in ("warmup_ratio", "rehearsal_probability"):
            self._check_range(name, 0, 1)
        self._check_range("temperature", 0, float("inf"), open_below=True)
        self._check_range("relevance_threshold", 0, 1, open_below=True)
        if self.mask_learning_rate is not None:
            self._check_range("mask_learning_rate", 0, float("inf"))
        if self.retention_target is not None:
            self._check_range("retention_target", 0, 1, open_below=True)

    def _check_targets(self) -> None:
        if isinstance(self.targets, str) or not isinstance(self.targets, Sequence):
            raise TypeError(f"Got targets={self.targets!r}; expected a list of {list(TARGETS)}.")
        self.targets = tuple(self.targets)
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"Got targets={list(self.targets)}; expected at least one of {list(TARGETS)}. "
                "Pass for example NeMoConfig(targets=['ffn'])."
            )

    def _check_groups(self) -> None:
        if self.group_column is not None and not isinstance(self.group_column, str):
            raise TypeError(f"Got group_column={self.group_column!r}; expected the name of a column, or None.")
        if self.label_groups is None:
            return
        if self.group_column is not None:
            raise ValueError(
                "Got both label_groups and group_column; expected at most one. "
                "Drop group_column, or leave label_groups to be read from that column."
            )
        self.label_groups = _checked_groups(self.label_groups)

    def _check_range(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value):
            raise TypeError(f"Got {name}={value!r}; expected a number.")
        if not (low < value if open_below else low <= value) or not value <= high or value == float("inf"):
            bracket = "(" if open_below else "["
            raise ValueError(f"Got {name}={value!r}; expected a number in {bracket}{low}, {high}]. Choose another.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain data that `from_dict` reads back."""
        data = asdict(self)
        data["targets"] = list(self.targets)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NeMoConfig":
        """Builds the options from plain data.

        Args:
            data: What `to_dict` returned; missing options take their defaults.

        Returns:
            The checked options.

        Raises:
            ValueError: If `data` holds an option that this version does not know.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(
                f"Got unknown options {unknown}; expected some of {sorted(known)}. "
                "Correct the name, or update nemo-hf if a newer version wrote the file."
            )
        return cls(**data)

    def to_json_file(self, path: str | Path) -> None:
        """Writes the options to `path` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> "NeMoConfig":
        """Reads options that `to_json_file` wrote to `path`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _is_number(value: Any, integer: bool = False) -> bool:
    return isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)


def _checked_groups(groups: Mapping[str, Sequence[LabelLike]]) -> dict[str, list[LabelLike]]:
    if not isinstance(groups, Mapping):
        raise TypeError(f"Got label_groups={groups!r}; expected a mapping of group name to labels.")
    if not groups:
        raise ValueError("Got label_groups={}; expected at least one group, or None for one group a label.")
    checked: dict[str, list[LabelLike]] = {}
    for name, members in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"Got the group name {name!r}; expected a string.")
        if isinstance(members, str) or not isinstance(members, Sequence) or not members:
            raise ValueError(f"Got {members!r} for the group {name!r}; expected a list of labels.")
        checked[name] = list(members)
    return checked


def checked_site(site: Any) -> dict[str, Any]:
    """Checks the keys and values of one description, as `NeMoConfig.sites` holds them, and returns a copy."""
    if not isinstance(site, Mapping) or site.get("kind") not in TARGETS:
        raise ValueError(f"Got the site {site!r}; expected a mapping with 'kind', one of {list(TARGETS)}.")
    needed, optional = SITE_KEYS["fused attention" if "fused" in site else str(site["kind"])]
    keys = set(site) - {"kind"}
    if (site["kind"] != "attention" and "fused" in site) or not needed <= keys <= needed | optional:
        raise ValueError(
            f"Got the site {dict(site)!r}; expected the keys {sorted(needed)} and perhaps {sorted(optional)}. "
            "Correct the description; `nemo-hf inspect --propose` writes ones that are right."
        )
    heads = site.get("heads")
    if not isinstance(site.get("is_rotary", True), bool):
        raise ValueError(f"Got is_rotary={site['is_rotary']!r} in the site {dict(site)!r}; expected True or False.")
    if heads is not None and (not _is_number(heads, integer=True) or heads < 1):
        raise ValueError(f"Got heads={heads!r} in the site {dict(site)!r}; expected a positive integer.")
    if site.get("layout", LAYOUTS[0]) not in LAYOUTS:
        raise ValueError(f"Got layout={site['layout']!r} in the site {dict(site)!r}; expected one of {list(LAYOUTS)}.")
    lists = {key: site[key] for key in LAYER_LISTS if key in site}
    for key, layers in lists.items():
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not (layers or key == "passing"):
            raise ValueError(f"Got {key}={layers!r} in the site {dict(site)!r}; expected a list of layers.")
    paths = [site[key] for key in keys - {"heads", "is_rotary", "layout", *LAYER_LISTS}]
    _check_paths(site, [*paths, *(path for layers in lists.values() for path in layers)])
    return {**site, **{key: list(layers) for key, layers in lists.items()}}


def _check_paths(site: Mapping[str, Any], paths: Sequence[Any]) -> None:
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"Got the site {dict(site)!r}; expected paths of layers, such as 'blocks.*.fc1'.")
    for path in paths:
        if any("*" in part and part != "*" for part in path.split(".")):
            raise ValueError(
                f"Got the path {path[:200]!r} in a site; expected each '*' to stand for one whole part of a path, as "
                "in 'blocks.*.fc1'. Put a dot around it, or write a description for each layer."
            )


def label_id(label: LabelLike, id2label: Mapping[int, str]) -> int:
    """Finds the id of one label.

    Args:
        label: A label id (int) or a label name (str).
        id2label: The model's labels.

    Returns:
        The label's id.

    Raises:
        TypeError: If `label` is neither int nor str.
        ValueError: If there is no such label.
    """
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"Got the label {label!r}; expected a label id (int) or name (str).")
    if isinstance(label, int):
        if label in id2label:
            return label
        raise ValueError(f"Got the label id {label}; expected 0 to {len(id2label) - 1}. Pass an id of the parent.")
    matches = [index for index, name in id2label.items() if name == label]
    if len(matches) > 1:
        raise ValueError(
            f"Got the label name {label!r}, which the labels {matches} share; expected a unique one. Pass an id."
        )
    if matches:
        return matches[0]
    raise ValueError(f"Got the unknown label {label!r}; expected one of {_shortened(list(id2label.values()))}.")


def resolve_groups(
    label_groups: Mapping[str, Sequence[LabelLike]] | None, id2label: Mapping[int, str]
) -> dict[str, list[int]]:
    """Turns label groups by name or id into a partition of the label ids.

    Args:
        label_groups: Group name to label names or ids, or `None` for one group a label.
        id2label: The model's labels.

    Returns:
        Group name to label ids; every label is in exactly one group.

    Raises:
        ValueError: If a label is unknown, in two groups or in none.
    """
    if label_groups is None:
        names = list(id2label.values())
        unique = len(set(names)) == len(names)
        return {name if unique else f"{name} ({index})": [index] for index, name in id2label.items()}
    owner: dict[int, str] = {}
    resolved: dict[str, list[int]] = {}
    for group, members in label_groups.items():
        ids = [label_id(member, id2label) for member in members]
        for index in ids:
            if index in owner:
                raise ValueError(
                    f"Got the label {id2label[index]!r} in the groups {owner[index]!r} and {group!r}; "
                    "expected each label in one group. Remove it from one of them."
                )
            owner[index] = group
        resolved[group] = ids
    missing = [id2label[index] for index in id2label if index not in owner]
    if missing:
        raise ValueError(
            f"Got label groups without {_shortened(missing)}; expected each of the {len(id2label)} labels in a group. "
            "Add them, for example as a group of their own."
        )
    return resolved


def resolve_labels(
    labels: LabelLike | Sequence[LabelLike], groups: Mapping[str, Sequence[int]], id2label: Mapping[int, str]
) -> tuple[list[int], list[str]]:
    """Finds the labels and groups that a module is asked for.

    Args:
        labels: Label ids (int), label names or group names (str), in the order of the module's outputs.
        groups: Group name to label ids, a partition.
        id2label: The parent's labels.

    Returns:
        The label ids in the order asked for, a group standing for its labels, and the names of the
        groups that they belong to, in the order of `groups`.

    Raises:
        ValueError: If there is no label, a label twice, an unknown one, or a name that is both a label
            and a group and does not mean the same.
    """
    if isinstance(labels, (int, str)):
        labels = [labels]
    if not isinstance(labels, Sequence):
        raise TypeError(f"Got labels={labels!r}; expected a list of label ids, label names or group names.")
    if len(labels) == 0:
        raise ValueError("Got an empty set of labels; expected at least one label or group. Name some.")
    ids: list[int] = []
    for label in labels:
        ids.extend(_label_or_group(label, groups, id2label))
    repeated = sorted({id2label[index] for index in ids if ids.count(index) > 1})
    if repeated:
        raise ValueError(f"Got the labels {repeated} more than once; expected each label once. Remove the repeats.")
    used = [name for name, members in groups.items() if set(members) & set(ids)]
    return ids, used


def _label_or_group(label: LabelLike, groups: Mapping[str, Sequence[int]], id2label: Mapping[int, str]) -> list[int]:
    if not isinstance(label, str) or label not in groups:
        try:
            return [label_id(label, id2label)]
        except ValueError as error:
            if isinstance(label, str) and groups:
                raise ValueError(f"{error} Or a group: {_shortened(list(groups))}.") from None
            raise
    members = list(groups[label])
    same_name = [index for index, name in id2label.items() if name == label]
    if same_name and same_name != members:
        raise ValueError(
            f"Got {label!r}, which names both the label {same_name[0]} and a group of {len(members)} labels; "
            "expected a name that means one thing. Pass label ids instead."
        )
    return members


def _shortened(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
