"""Checks of the labels that are asked for while a model is loaded: they rename those that it has."""

from collections.abc import Collection, Mapping
from typing import Any

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
OTHER_HEADS = {
    "parent": "save the plain model, parent.detach_masks().save_pretrained(...), and load that with",
    "module": "save a plain model, module.save_plain(...), and load that with",
}


def check_label_options(options: Mapping[str, Any], count: int, role: str) -> None:
    """Refuses labels that are asked for while a model of `count` labels is loaded, unless they rename these.

    `options` are some of `num_labels`, `id2label` and `problem_type`; `role` is `"parent"` or `"module"`, or else says
    what is loaded.
    """
    names, problem = options.get("id2label"), options.get("problem_type")
    kind = f"a {role}" if role in OTHER_HEADS else role
    if names is not None:
        check_label_ids(names)
    numbers = {"as num_labels": options.get("num_labels"), "labels in id2label": names if names is None else len(names)}
    for what, number in numbers.items():
        if number not in (None, count):
            way = OTHER_HEADS.get(role, "do so with each module before compose(...): save_plain(...), then load with")
            raise ValueError(
                f"Got {number!r} {what} for {kind} of {count} labels; expected {count}, as its weights and groups "
                f"have. For a new head, {way} num_labels={number!r}, ignore_mismatched_sizes=True."
            )
    if problem not in (None, *PROBLEM_TYPES):
        raise ValueError(f"Got problem_type={problem!r} for {kind}; expected one of {PROBLEM_TYPES}. Leave it out.")


def check_label_ids(id2label: Any) -> None:
    """Refuses names of labels by ids that are not 0, 1, 2 and so on."""
    ids = list(id2label) if isinstance(id2label, Mapping) else None
    if ids is None or sorted(map(str, ids)) != sorted(map(str, range(len(ids)))):
        got, last = (f"the ids {ids[:12]}", len(ids) - 1) if ids is not None else (f"{id2label!r}", "the last")
        raise ValueError(
            f"Got id2label with {got}; expected names by the ids 0 to {last}, the places of the logits. Number them "
            "from 0, in id2label, label2id and the data alike."
        )


def check_rejected_label(label: Any, names: Collection[str]) -> None:
    """Refuses what can't name the answer to inputs with none of a module's labels, which are called `names`."""
    is_name = isinstance(label, str) and label.strip() and label.isprintable() and label not in names
    if label is not None and not is_name:
        raise ValueError(
            f"Got rejected_label={str(label)[:120]!r} for a module of {list(names)[:12]}; expected another name of one "
            "line, such as 'none of these', or None for no such label. Choose one that no label has."
        )
