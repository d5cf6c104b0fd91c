"""How labels and groups are named: by id, by name, and by the group that they are in."""

from collections.abc import Mapping, Sequence

from .config import LabelLike


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
