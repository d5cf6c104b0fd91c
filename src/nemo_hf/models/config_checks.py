"""What a config.json of a parent or module may say, checked before anything is built from it.

Such a file may come from a stranger. Nothing here knows shapes: whether the sizes are those of the weights is
seen when these are opened.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEEPEST = 24
"""Levels of nested lists and mappings; ordinary files have 5."""
LARGEST_COUNT = 100_000
"""Layers, labels, heads and the like; configurations make a list or a loop of as many entries."""
LARGEST_NUMBER = 2**48
DTYPES = ("bfloat16", "float16", "float32", "float64")
COUNTED = re.compile(r"layer|depth|block|stage|label|heads|expert|n_group")
REPEATED = re.compile(r"layer|depth|block|stage|num_labels")
SMALL = re.compile(r"(^|_)(eps|epsilon)$")
LOADING_KEYS = (
    "adapter_config",
    "attn_implementation",
    "distributed_config",
    "experts_implementation",
    "fusion_config",
    "quantization_config",
    "transformers_weights",
)
"""Keys by which a file would choose what code or weights `transformers` loads; these are the caller's choice."""
PROBLEMS = ("single_label_classification", "multi_label_classification")
SOURCES = ("initial", "running", "exact")
EQUIVALENCE_STATUSES = ("verified", "unverified")
EQUIVALENCE_KEYS = {"status", "difference", "tolerance"}
LONGEST_TEXT = 10_000
MOST_VALUES = 200
"""Options of a training, and values in one of them."""
REJECTION_KEYS = {"weight", "bias", "threshold"}
MOST_COMPANIONS = 32
COMPANION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
NO_COMPANIONS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "report.json",
    "readme.md",
    "neurons.png",
)
"""Names in a model's directory, in lower case, that no file of a processor has."""
NO_COMPANION_ENDS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".pkl", ".py")
"""Ends of the names of weights and code."""
REMEDY = "The config.json is damaged or of another version: save or download the model again."


def check_config(data: Mapping[str, Any]) -> None:
    """Checks the types, ranges and sizes of what a config.json says.

    Args:
        data: The file's content.

    Raises:
        ValueError: If something is of the wrong type, out of range or absurdly large; the message names it.
    """
    repeats: dict[str, int] = {}
    for path, value in leaves(data):
        if path[:1] == ("training",) or path[:2] == (
            "parts",
            "training",
        ):  # a record, from which nothing is built; it has a check of its own
            continue
        _check_leaf(path, value)
        if path and REPEATED.search(path[-1]) and isinstance(value, int):
            name = ".".join(path)
            repeats[name] = repeats.get(name, 0) + abs(value)
            if repeats[name] > LARGEST_COUNT:
                raise _refused(name, repeats[name], f"at most {LARGEST_COUNT} in all")
    for name, (is_right, expected) in _FIELDS.items():
        value = data.get(name)
        if value is not None and not is_right(value):
            raise _refused(name, value, expected)
    for name in ("role", "base_class", "relevance_source"):
        if name in data and data[name] is None:
            raise _refused(name, None, _FIELDS[name][1])


def _refused(name: str, value: Any, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 120 else f"{shown[:120]}..."
    return ValueError(f"Got {name}={shown} in config.json; expected {expected}. {REMEDY}")


def leaves(data: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Iterates over all values of nested mappings and lists.

    Args:
        data: What a JSON file holds.

    Yields:
        The path of keys to each value, those of mappings and lists too, and the value; an entry of a list has
        the path of the list.

    Raises:
        ValueError: If the nesting is too deep to be copied and written.
    """
    waiting: list[tuple[tuple[str, ...], int, Any]] = [((), 0, data)]
    while waiting:
        path, depth, value = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"Got JSON nested over {DEEPEST} levels deep; expected some 5. Save or download it again.")
        if isinstance(value, Mapping):
            waiting.extend(((*path, str(key)), depth + 1, inner) for key, inner in value.items())
        elif isinstance(value, (list, tuple)):
            waiting.extend((path, depth + 1, inner) for inner in value)
        yield path, value


def _check_leaf(path: tuple[str, ...], value: Any) -> None:
    if not path:
        return
    key, name = path[-1], ".".join(path)
    if key.removeprefix("_").removesuffix("_internal") in LOADING_KEYS and value is not None:
        raise _refused(name, value, "none, since a file doesn't choose how it is loaded")
    if key in ("dtype", "torch_dtype") and value is not None and str(value).removeprefix("torch.") not in DTYPES:
        raise _refused(name, value, f"one of {list(DTYPES)}")
    if key == "model_type" and not isinstance(value, str):
        raise _refused(name, value, "the name of a kind of model")
    if SMALL.search(key) and isinstance(value, (int, float)) and not 0 <= value < 1:
        raise _refused(name, value, "a number in [0, 1)")
    if isinstance(value, float) and math.isnan(value):
        raise _refused(name, value, "a number")
    if isinstance(value, bool) or not isinstance(value, int) or "label2id" in path:
        return
    most = LARGEST_COUNT if COUNTED.search(key) and not key.endswith("_id") else LARGEST_NUMBER
    if abs(value) > most:
        raise _refused(name, value, f"at most {most}")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_finite(value) and 0 <= value <= 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_index, value)) and len(set(value)) == len(value) > 0


def _are_names(value: Any) -> bool:
    """Label names by id: 0 to n - 1, as ints or, in a file, as strings."""
    if not isinstance(value, Mapping) or not all(isinstance(name, (str, int, float)) for name in value.values()):
        return False
    return {str(key) for key in value} == {str(index) for index in range(len(value))}


def _are_groups(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    entries = [entry for entry in value if isinstance(entry, Mapping) and set(entry) == {"name", "labels"}]
    if len(entries) < len(value) or not all(isinstance(entry["name"], str) for entry in entries):
        return False
    if not all(_are_indices(entry["labels"]) for entry in entries):
        return False
    members = [label for entry in entries for label in entry["labels"]]
    return len({entry["name"] for entry in entries}) == len(entries) and len(set(members)) == len(members)


def _are_sites(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, Mapping) and all(isinstance(entry.get(key, ""), str) for key in ("key", "pruning_mode"))
        for entry in value
    )


def _is_rejection(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) >= REJECTION_KEYS and all(map(_is_finite, value.values()))


def is_companion(name: Any) -> bool:
    """Tells whether a file name can be that of a processor's file: no path, no weights, no code, no file of ours."""
    if not isinstance(name, str) or not COMPANION_NAME.fullmatch(name):
        return False
    return name.lower() not in NO_COMPANIONS and not name.lower().endswith(NO_COMPANION_ENDS)


def _are_companions(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_COMPANIONS
        and all(map(is_companion, value))
        and len({name.lower() for name in value}) == len(value)
    )


def are_numbers(value: Any, count: int) -> bool:
    """Tells whether a value is a list of so many finite numbers."""
    return isinstance(value, list) and len(value) == count and all(map(_is_finite, value))


def is_permutation(value: Any) -> bool:
    """Tells whether a value is a list that holds each number from 0 on once, in any order."""
    return _are_indices(value) and sorted(value) == list(range(len(value)))


def _is_number(value: Any) -> bool:
    """A number that can be computed with and shown; whole ones have no bound in JSON."""
    return _is_finite(value) if isinstance(value, float) else _is_whole(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**63


def _is_line(value: Any) -> bool:
    """Text on one line, of a sane length."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _are_lines(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_line, value))


def _maps(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """A mapping of lines of text to values that are right."""
    return isinstance(value, Mapping) and all(_is_line(key) and is_right(entry) for key, entry in value.items())


def _is_equivalence(value: Any) -> bool:
    if (
        not isinstance(value, Mapping)
        or not set(value) >= EQUIVALENCE_KEYS
        or value["status"] not in EQUIVALENCE_STATUSES
    ):
        return False
    if value.get("source", "parent") != "parent":
        return False
    return all(_is_number(entry) for key, entry in value.items() if key not in ("status", "source"))


def _is_option(value: Any) -> bool:
    """What an option of a training may be: a plain value, or a few of them."""
    if isinstance(value, (list, Mapping)):
        entries = [entry for _, entry in leaves(value)]
        names = value if isinstance(value, Mapping) else ()
        return len(entries) <= MOST_VALUES and all(map(_is_line, names)) and all(map(_is_plain, entries))
    return _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, Mapping)):  # its entries are values of their own among the leaves
        return all(map(_is_line, value)) if isinstance(value, Mapping) else True
    return value is None or isinstance(value, (bool, float)) or _is_whole(value) or _is_line(value)


def _are_options(value: Any) -> bool:
    return _maps(value, _is_option) and len(value) <= MOST_VALUES and all(name.isidentifier() for name in value)


def _is_training(value: Any) -> bool:
    if not isinstance(value, Mapping) or (value and not set(value) >= {"arguments", "processes"}):
        return False
    return all(is_right(value[name]) for name, is_right in _TRAINING.items() if name in value)


def is_report(value: Mapping[str, Any]) -> bool:
    """Tells whether a mapping can be the report of a parent or of a module.

    Args:
        value: What a report.json holds.

    Returns:
        Whether all that `ModuleReport.to_dict` gives is there, or the `metrics` of a parent, each of its type; entries
        of other names may be anything.
    """
    if "metrics" in value and "labels" not in value:  # of a parent
        return isinstance(value["metrics"], Mapping) and all(
            _is_line(name) and not set("`|") & set(name) and (not isinstance(entry, int) or abs(entry) <= 2**63)
            for name, entry in value["metrics"].items()
        )
    needed = all(name in value and is_right(value[name]) for name, is_right in _MODULE_REPORT.items())
    return needed and ("formats" not in value or _are_formats(value["formats"]))


def _are_formats(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_line(value.get("device"))
        and _is_whole(value.get("threads", 1))
        and _maps(value.get("latency_ms"), lambda times: _maps(times, _is_number))
    )


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_TRAINING: dict[str, Callable[[Any], bool]] = {
    "arguments": _are_options,
    "processes": lambda value: _is_whole(value) and value > 0,
    "samples": _or_none(lambda value: _is_whole(value) and value >= 0),
    "base_model": _or_none(_is_line),
    "command": _or_none(_is_text),
    "datasets": _are_lines,
    "versions": lambda value: _maps(value, _is_line),
}
"""What a record of a training may hold; `provenance.training_record` makes it."""
_MODULE_REPORT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("labels", "groups"), lambda value: isinstance(value, list) and all(map(_is_text, value))),
    **dict.fromkeys(("accuracy", "parent_restricted_accuracy", "megabytes", "parent_megabytes"), _is_number),
    **dict.fromkeys(("neuron_retention_rate", "weight_retention_rate", "threshold"), _is_number),
    **dict.fromkeys(("samples", "parameters", "parent_parameters", "macs", "parent_macs", "seed"), _is_whole),
    **dict.fromkeys(("controls", "rejection"), lambda value: _maps(value, _or_none(_is_number))),
    **dict.fromkeys(("latency_ms", "parent_latency_ms"), lambda value: _maps(value, _is_number)),
    "device": _is_line,
    "input_shape": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
}
"""What the report of a module holds; `ModuleReport` makes it."""
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_config": (lambda value: isinstance(value, Mapping) or hasattr(value, "model_type"), "a mapping"),
    "base_class": (_is_text, "the name of a class"),
    "role": (_is_text, "'parent' or 'module'"),
    "nemo_config": (lambda value: isinstance(value, Mapping), "a mapping of options"),
    "id2label": (_are_names, "a name for each label from 0 on"),
    "label2id": (lambda value: isinstance(value, Mapping) and all(map(_is_index, value.values())), "ids by label"),
    "label_groups": (_are_groups, "a list of groups with different names and labels"),
    "label_ids": (_are_indices, "a list of different label ids"),
    "parent": (_is_text, "the name of a repository"),
    "problem_type": (lambda value: value in PROBLEMS, f"one of {list(PROBLEMS)}"),
    "sites": (_are_sites, "a list of sites, each with its key and pruning mode"),
    "relevance_source": (lambda value: value in SOURCES, f"one of {list(SOURCES)}"),
    "relevance_threshold": (_is_share, "a number in [0, 1]"),
    "round_to": (_is_index, "a positive integer"),
    "training": (_is_training, f"a record of a training with {', '.join(_TRAINING)} of the right types"),
    "processor_files": (_are_companions, f"at most {MOST_COMPANIONS} different names of a processor's files"),
    "retained_neurons": (_is_share, "a number in [0, 1]"),
    "equivalence": (
        _is_equivalence,
        f"finite numbers for {sorted(EQUIVALENCE_KEYS - {'status'})} and a status, one of {list(EQUIVALENCE_STATUSES)}",
    ),
    "rejection": (_is_rejection, f"finite numbers for {sorted(REJECTION_KEYS)}"),
}
