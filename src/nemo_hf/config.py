"""Options of training with neuron masks, and how labels, groups and ids are named."""

import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

TARGETS = ("attention", "ffn", "conv")
SITE_KEYS = {  # of a description of a site: required keys, and optional ones
    "ffn": ({"producers", "output"}, {"pooled"}),
    "attention": ({"query", "key", "value", "output"}, {"heads", "layer", "pooled", "is_rotary"}),
    "conv": ({"producers", "readers"}, {"passing"}),
    "fused attention": ({"fused", "output"}, {"heads", "layer", "pooled", "is_rotary", "layout"}),
}
LAYER_LISTS = ("producers", "passing", "readers")  # keys of a description that name several layers
MASKS = ("generated", "assigned", "static")
OBJECTIVES = ("contrastive", "contrastive-authors", "cohesion-coupling", "moda")
SHAPING_OPTIONS = (
    "targets",
    "masks",
    "sites",
    "generator_rank",
    "hard_masks",
    "label_groups",
    "group_column",
    "has_generators",
    "core_share",
)
"""Options that decide the shape of a parent's masks."""
GENERATED_OPTIONS = (
    *("generator_rank", "objective", "contrastive_weight", "coupling_weight", "temperature", "gather_across_devices"),
    *("sparsity_weight", "hard_masks", "static_evaluation", "detach_pooled", "mask_learning_rate", "warmup_ratio"),
    "rehearsal_probability",
)
"""Options that have no effect on masks that are not generated."""
LAYOUTS = ("one after another", "by key/value head")
RANGES = {  # interval of each number among the options
    **dict.fromkeys(("contrastive_weight", "coupling_weight", "sparsity_weight", "specificity_weight"), "[0, inf)"),
    **dict.fromkeys(("warmup_ratio", "rehearsal_probability", "core_share", "plain_ratio"), "[0, 1]"),
    **dict.fromkeys(("relevance_threshold", "retention_target"), "(0, 1]"),
    "temperature": "(0, inf)",
    "mask_learning_rate": "[0, inf)",
}
LabelLike = int | str


@dataclass
class NeMoConfig:
    """What is masked and how the masks are trained.

    The symbols in brackets are those of the NeMo paper (arXiv 2508.11348) and of module rehearsal.

    Args:
        masks: `"assigned"` (each label group keeps the neurons that do most for it, `retention_target` of them;
            `NeMoTrainer` trains the whole network, and taught by it the modules of random groups, see
            docs/training.md), `"generated"` (by sample, from a network at each site, as the paper has them) or
            `"static"` (only those that a call brings: what cutting a plain model needs).
        core_share: Under `"assigned"`, share of a group's neurons, in [0, 1], that are those of all groups.
        plain_ratio: Under `"assigned"`, share of the training steps, in [0, 1], in which the network trains as a plain
            model does, bit for bit; after them neurons are assigned, and modules are taught in the steps that are left.
            1, the default, costs nothing and leaves modules to reconstruction; 0 suits a trained classifier.
        targets: Kinds of neurons that get masks, any of `"attention"`, `"ffn"` and `"conv"` (channels of convolutions).
        generator_rank: Hidden width of each mask generator. `None` takes the largest rank, at most 64, whose generators
            stay within 10 % of the base model's parameters (6 % from hidden size 384 up).
        objective: Loss that pulls the masks of one group together and those of others apart: `"contrastive"`,
            `"contrastive-authors"` (the NeMo authors' code, see `losses.authors_contrastive_loss`),
            `"cohesion-coupling"` (MwT, arXiv 2306.09376) or `"moda"` (arXiv 2411.01074): that loss over the activity of
            rectified units in place of masks, without generators; a unit is open if it is not 0 at all positions.
        contrastive_weight: Weight of that loss [alpha; MODA's affinity], at least 0.
        coupling_weight: Weight of coupling relative to cohesion under `"cohesion-coupling"` [MwT's beta / alpha]
            and `"moda"` [dispersion / affinity].
        temperature: Temperature of the contrastive loss [tau], above 0.
        gather_across_devices: Whether that loss compares masks across all processes and not only within each.
        sparsity_weight: Weight of the mean mask value [lambda; 0 in the paper; MODA's compactness], at least 0.
        retention_target: Share of the weights of masked layers, in (0, 1], that the module of one group shall keep on
            average: so many attention and feed-forward neurons, and its square root of channels, which are cut on both
            sides. `sparsity_weight` is then where the weight starts; it adapts to modules' size. `None` keeps it.
        hard_masks: Whether the forward pass sees 0/1 masks (straight-through gradient) or soft values in [0, 1).
        static_evaluation: Whether a parent with hard masks uses in eval mode one static mask for all inputs, that of
            the module of all its labels. If not, each input opens its own neurons, as in the paper.
        detach_pooled: Whether no gradient of the generators flows into the hidden states that they read.
        mask_learning_rate: Learning rate of the mask generators; `None` takes 3 times
            `TrainingArguments.learning_rate`, so that masks close early and the model adapts to them.
        warmup_ratio: Share of the training steps, in [0, 1], over which `contrastive_weight` and
            `sparsity_weight` grow linearly from 0, and before whose end no module is rehearsed.
        rehearsal_probability: Share of the optimizer steps, in [0, 1], in which a random set of groups
            is trained as the module that it would become [p].
        specificity_weight: Weight of a term of rehearsed steps, under `"assigned"` of all, that makes the module's
            answers to samples of other groups uniform. Modules of other labels then know less of these, at a price in
            the parent's accuracy.
        relevance_threshold: Share of a group's samples, in (0, 1], that must open a neuron for the
            group's modules to keep it [theta]. Rehearsal and extraction both use it.
        label_groups: Which labels form a group: a mapping of group name to label names or ids. `None`
            makes each label its own group, unless `group_column` is given.
        group_column: Name of a training data set column that holds each sample's group, a function of the label.
        sites: Neuron sites of architectures whose layers have other names than those known: one description a site,
            in place of those that would be found; `nemo-hf inspect --propose` and `propose_sites` write them. `"*"`
            stands for one whole part of a path. Feed-forward: `{"kind": "ffn", "producers": [...], "output": ...}`.
            Attention: `{"kind": "attention", "query": ..., "key": ..., "value": ..., "output": ..., "heads": 12}`, or
            `"fused": ...` with `"layout"` (`"one after another"`, the default, or `"by key/value head"`) in place of
            the three. Optional: `layer`, whose attribute holds the width of a head; `is_rotary`, whether q and k are
            rotated as a whole; and `pooled`, the layer whose input is pooled. Channels: `{"kind": "conv", "producers":
            [...], "passing": [...], "readers": [...]}`: layers that make the channels, norms and grouped convolutions
            that they pass through, and layers that read them.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is outside its range.

    Example:
        >>> NeMoConfig(label_groups={"pets": ["cat", "dog"], "vehicles": [0, 1]}).temperature
        0.2
    """

    targets: Sequence[str] = TARGETS
    masks: str = "assigned"
    core_share: float = 0.5
    plain_ratio: float = 1.0
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
        self._check_masks()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Got objective={self.objective!r}; expected one of {list(OBJECTIVES)}.")
        for name, interval in RANGES.items():
            self._check_range(name, interval)
        for name in ("hard_masks", "static_evaluation", "detach_pooled", "gather_across_devices"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Got {name}={getattr(self, name)!r}; expected True or False.")
        if not self.has_generators and not self.hard_masks:
            given = "objective='moda'" if self.objective == "moda" else f"masks={self.masks!r}"
            raise ValueError(f"Got hard_masks=False with {given}; expected True: only mask generators make soft masks.")
        if self.masks == "assigned":
            self._check_assigned()
        self._check_groups()
        if self.sites is not None:
            if not _is_list(self.sites) or not self.sites:
                raise TypeError(f"Got sites={self.sites!r}; expected a list of descriptions, or None to find them.")
            self.sites = [checked_site(site) for site in self.sites]

    @property
    def has_generators(self) -> bool:
        """Whether networks make the masks; under `"moda"` the units' own activity takes their place."""
        return self.masks == "generated" and self.objective != "moda"

    @property
    def trains_modules(self) -> bool:
        """Whether training makes modules that can do without reconstruction."""
        return self.masks != "assigned" or self.plain_ratio < 1

    def _check_assigned(self) -> None:
        if self.retention_target is None:
            raise ValueError(
                "Got masks='assigned' without retention_target; expected the share of the weights that the module of "
                "one group keeps. Pass retention_target=0.2, say."
            )
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: getattr(self, name) for name in GENERATED_OPTIONS if getattr(self, name) != defaults[name]}
        if given:
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(
                f"Got {shown} for assigned masks, on which that has no effect; expected options of theirs. For masks "
                f"by sample pass NeMoConfig(masks='generated', {shown})."
            )

    def _check_masks(self) -> None:
        if not _is_list(self.targets):
            raise TypeError(f"Got targets={self.targets!r}; expected a list of {list(TARGETS)}.")
        self.targets = tuple(self.targets)
        if not self.targets or any(target not in TARGETS for target in self.targets):
            raise ValueError(f"Got targets={list(self.targets)}; expected at least one of {list(TARGETS)}.")
        if self.masks not in MASKS:
            raise ValueError(f"Got masks={self.masks!r}; expected one of {list(MASKS)}.")
        rank = self.generator_rank
        if rank is not None and not _is_count(rank):
            raise ValueError(f"Got generator_rank={rank!r}; expected None or an integer of 1 or more.")

    def _check_range(self, name: str, interval: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("mask_learning_rate", "retention_target"):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"Got {name}={value!r}; expected a number.")
        low, high = (float(bound) for bound in interval[1:-1].split(", "))
        is_above = value > low if interval[0] == "(" else value >= low
        if not is_above or not value <= high or math.isinf(value):
            raise ValueError(f"Got {name}={value!r}; expected a number in {interval}.")

    def _check_groups(self) -> None:
        if self.group_column is not None and not isinstance(self.group_column, str):
            raise TypeError(f"Got group_column={self.group_column!r}; expected the name of a column, or None.")
        if self.label_groups is None:
            return
        if self.group_column is not None:
            raise ValueError("Got both label_groups and group_column; expected at most one. Drop group_column.")
        if not isinstance(self.label_groups, Mapping) or not self.label_groups:
            kind = ValueError if self.label_groups == {} else TypeError
            raise kind(f"Got label_groups={self.label_groups!r}; expected a mapping of group name to labels, or None.")
        for name, members in self.label_groups.items():
            if not isinstance(name, str):
                raise TypeError(f"Got the group name {name!r}; expected a string.")
            if not _is_list(members) or not members:
                raise ValueError(f"Got {members!r} for the group {name!r}; expected a list of labels.")
        self.label_groups = {name: [_plain(label) for label in own] for name, own in self.label_groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain data that `from_dict` reads back."""
        return {**asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NeMoConfig":
        """Builds the options from what `to_dict` returned; unknown ones are a `ValueError`."""
        if not isinstance(data, Mapping):
            raise TypeError(f"Got the options {data!r}; expected a mapping of options by name.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"Got unknown options {unknown}; expected some of {sorted(known)}. Correct the names, or update "
                "nemo-hf if a newer version wrote the file."
            )
        return cls(**data)

    def to_json_file(self, path: str | Path) -> None:
        """Writes the options to `path` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> "NeMoConfig":
        """Reads options that `to_json_file` wrote to `path`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _plain(label: Any) -> Any:
    """A label as JSON holds it: ids of numpy as `int`."""
    return int(label) if isinstance(label, Integral) and not isinstance(label, bool) else label


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def checked_site(site: Any) -> dict[str, Any]:
    """Checks the keys and values of one description, as `NeMoConfig.sites` holds them, and returns a copy."""
    if not isinstance(site, Mapping) or site.get("kind") not in TARGETS:
        raise ValueError(f"Got the site {site!r}; expected a mapping with 'kind', one of {list(TARGETS)}.")
    needed, optional = SITE_KEYS["fused attention" if "fused" in site else str(site["kind"])]
    keys = set(site) - {"kind"}
    if (site["kind"] != "attention" and "fused" in site) or not needed <= keys <= needed | optional:
        raise ValueError(
            f"Got the site {dict(site)!r}; expected the keys {sorted(needed)} and perhaps {sorted(optional)}. "
            "See `nemo-hf inspect --propose`."
        )

    def check(key: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"Got {key}={site[key]!r} in the site {dict(site)!r}; expected {expected}.")

    check("is_rotary", isinstance(site.get("is_rotary", True), bool), "True or False")
    check("heads", site.get("heads") is None or _is_count(site["heads"]), "a positive integer")
    check("layout", site.get("layout", LAYOUTS[0]) in LAYOUTS, f"one of {list(LAYOUTS)}")
    lists = {key: site[key] for key in LAYER_LISTS if key in site}
    for key, layers in lists.items():
        check(key, _is_list(layers) and bool(layers or key == "passing"), "a list of layers")
    paths = [site[key] for key in keys - {"heads", "is_rotary", "layout", *LAYER_LISTS}]
    for path in (*paths, *itertools.chain.from_iterable(lists.values())):
        if not isinstance(path, str) or not path:
            raise ValueError(f"Got the site {dict(site)!r}; expected paths of layers, such as 'blocks.*.fc1'.")
        if any("*" in part and part != "*" for part in path.split(".")):
            raise ValueError(f"Got the path {path[:200]!r} in a site; expected each '*' as one whole part of a path.")
    return {**site, **{key: list(layers) for key, layers in lists.items()}}


def label_id(label: LabelLike, id2label: Mapping[int, str], groups: Sequence[str] = ()) -> int:
    """Finds the id of a label that is given by id (int) or name (str); an error lists what `groups` there are, too."""
    label = _plain(label)
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"Got the label {label!r}; expected a label id (int) or name (str).")
    if isinstance(label, int):
        if label in id2label:
            return label
        raise ValueError(f"Got the label id {label}; expected 0 to {len(id2label) - 1}. Pass an id of the parent.")
    matches = [index for index, name in id2label.items() if name == label]
    if not matches:
        names = list(id2label.values())
        groups = [name for name in groups if name not in names]
        expected = _shortened(names) + (f", or a group: {_shortened(groups)}" if groups else "")
        do = _meant(label, [*names, *groups])
        raise ValueError(f"Got the unknown label {label!r}; expected one of {expected}. {do}")
    if len(matches) > 1:
        raise ValueError(f"Got the label name {label!r}, which the labels {matches} share; expected one. Pass an id.")
    return matches[0]


def resolve_groups(
    label_groups: Mapping[str, Sequence[LabelLike]] | None, id2label: Mapping[int, str]
) -> dict[str, list[int]]:
    """Turns label groups (`None`: one group per label) into group name to label ids, a partition of all labels."""
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
                where = f"the groups {owner[index]!r} and {group!r}" if owner[index] != group else f"{group!r} twice"
                raise ValueError(f"Got the label {id2label[index]!r} in {where}; expected it once, in one group.")
            owner[index] = group
        resolved[group] = ids
    if missing := [name for index, name in id2label.items() if index not in owner]:
        raise ValueError(
            f"Got label groups without {_shortened(missing)}; expected each of the {len(id2label)} labels in a group. "
            "Add them, such as in a group of their own."
        )
    return resolved


def resolve_labels(
    labels: LabelLike | Sequence[LabelLike], groups: Mapping[str, Sequence[int]], id2label: Mapping[int, str]
) -> tuple[list[int], list[str]]:
    """Finds the labels and groups that a module is asked for, by id, name or group name.

    Returns the label ids in the order asked for, a group standing for its labels, and the names of their groups.
    """
    if isinstance(labels, (Integral, str)):
        labels = [labels]
    if not isinstance(labels, Sequence) or isinstance(labels, bytes):
        raise TypeError(
            f"Got labels={labels!r}; expected a list of label ids, label names or group names. Turn tensors and arrays "
            "into one with labels.tolist(), other collections with list(labels)."
        )
    if len(labels) == 0:
        raise ValueError("Got an empty set of labels; expected at least one label or group. Name some.")
    ids = [index for label in labels for index in _label_or_group(label, groups, id2label)]
    if repeated := sorted({id2label[index] for index, count in Counter(ids).items() if count > 1}):
        raise ValueError(f"Got the labels {repeated} more than once; expected each label once. Remove the repeats.")
    asked = set(ids)
    return ids, [name for name, members in groups.items() if not asked.isdisjoint(members)]


def _label_or_group(label: LabelLike, groups: Mapping[str, Sequence[int]], id2label: Mapping[int, str]) -> list[int]:
    if not isinstance(label, str) or label not in groups:
        return [label_id(label, id2label, list(groups))]
    members = list(groups[label])
    same_name = [index for index, name in id2label.items() if name == label]
    if same_name and same_name != members:
        raise ValueError(
            f"Got {label!r}, which names both the label {same_name[0]} and a group of {len(members)} labels; expected "
            "a name of one. Pass label ids."
        )
    return members


def closest(name: str, names: Sequence[str]) -> str | None:
    """The name that is most like another one, if any is."""
    by_letters = {each.casefold(): each for each in names}
    close = difflib.get_close_matches(name.casefold(), by_letters, n=1)
    return by_letters[close[0]] if close else None


def _meant(label: str, names: Sequence[str]) -> str:
    """Asks for the name that is most like an unknown one, or says where they all are."""
    close = closest(label, names)
    return f"Did you mean {close!r}?" if close else "See model.config.id2label for all names."


def _shortened(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
