"""Checks of what a config.json or report.json says, before anything is built from it: it may come from a stranger."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, Literal

from huggingface_hub.dataclasses import type_validator

from .privacy import is_repository

DEEPEST = 24  # levels of nested lists and mappings; ordinary files have 5
LARGEST_COUNT = 100_000  # of layers, labels, heads and the like; configurations loop over as many
LARGEST_NUMBER = 2**48
LONGEST_TEXT, LONGEST_NAME = 10_000, 1000  # characters of values and of keys
LONGEST_MESSAGE = 1_000  # characters of what an error quotes from files
MOST_ENTRIES = 400_000  # of lists and mappings in a file, which take microseconds each
MOST_LABELS = 30_000  # which take a tenth of a millisecond each
LONGEST_LISTS = {
    **dict.fromkeys(("id2label", "label2id", "label_groups", "label_ids", "label_order", "labels"), MOST_LABELS),
    **dict.fromkeys(("sites", "parts", "widths"), 1000),
    **dict.fromkeys(("producers", "passing", "readers", "targets"), 1000),
}
DTYPES = ("bfloat16", "float16", "float32", "float64")
COUNTED = re.compile(r"(?<!size_per_)layer|depth|block|stage|label|heads|expert|n_group")
REPEATED = re.compile(r"(?<!size_per_)layer|depth|block|stage|num_labels")
POSITIVE = re.compile(r"(image|patch)_size|num_channels")
SMALL = re.compile(r"(^|_)(eps|epsilon)$")
SURROGATE = re.compile("[\ud800-\udfff]")  # can't be written as UTF-8
# Keys by which a file would choose what code or weights `transformers` loads; these are the caller's choice.
LOADING_KEYS = ("attn_implementation", "distributed_config", "experts_implementation", "fusion_config",
                "quantization_config", "transformers_weights")  # fmt: skip
BUILT_IN = (None, "eager", "sdpa")  # values of them by which nothing is loaded
# Types of entries that transformers (5.24) does not check, since it checks what a model's own class declares.
SWITCHES = ("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict")
UNCHECKED = {"chunk_size_feed_forward": (int,), **dict.fromkeys(SWITCHES, (bool, NoneType))}
MOST_COMPANIONS = 32
LARGEST_COMPANION = 512 * 2**20  # bytes of all files of a tokenizer or image processor together
COMPANION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
# Names, in lower case, of the model's own files, of weights and of code.
NO_COMPANION = re.compile(
    r"(config|adapter_config|audio_tokenizer_config|generation_config|report)\.json|readme\.md|neurons\.png|report\.html"
    r"|.*(\.safetensors|\.index\.json|\.bin|\.pt|\.pth|\.pkl|\.py)"
)
FREE_TEXTS = ("labels", "groups", "command")  # entries of records that may have line breaks; model cards escape them
FREE_NUMBERS = ("metrics", "parent_metrics", "arguments")  # entries of records whose numbers may be infinite or NaN
REMEDY = "The config.json is damaged or of another version: save or download the model again."

# Types of the entries of records; of those that may be missing `None` is one.
Number = float | int
SITE = {"key": str, "pruning_mode": str}
EQUIVALENCE = {
    "status": Literal["verified", "unverified"],
    **dict.fromkeys(("difference", "tolerance"), Number),
    **dict.fromkeys(("effect", "samples"), Number | None),
    "source": Literal["parent"] | None,
}
EXTRACTION = {
    "scores": str,
    **dict.fromkeys(("samples", "bytes", "source_bytes"), int),
    **dict.fromkeys(("weights", "neurons", "seconds"), Number),
    **dict.fromkeys(("operations", "retention", "cut_distance", "distance", "ridge"), Number | None),
    **dict.fromkeys(("refine_epochs", "scarce_layers"), int | None),
    "layers": dict[str, list[Number]] | None,
    "refused": str | None,
    **dict.fromkeys(("vocabulary", "validation", "dropped", "distances", "stream"), dict[str, Number] | None),
}
REJECTION = dict.fromkeys(("weight", "bias", "threshold"), Number)
TRAINING = {
    "arguments": dict[str, Any],
    "processes": int,
    "samples": int | None,
    **dict.fromkeys(("base_model", "command"), str | None),
    "datasets": list[str] | None,
    "versions": dict[str, str] | None,
}
MODULE_REPORT = {
    **dict.fromkeys(("labels", "groups"), list[str]),
    **dict.fromkeys(("accuracy", "parent_restricted_accuracy", "megabytes", "parent_megabytes"), Number),
    **dict.fromkeys(("neuron_retention_rate", "weight_retention_rate", "threshold"), Number),
    **dict.fromkeys(("samples", "parameters", "parent_parameters", "macs", "parent_macs", "seed"), int),
    **dict.fromkeys(("controls", "rejection"), dict[str, Number | None]),
    **dict.fromkeys(("latency_ms", "parent_latency_ms"), dict[str, Number]),
    "device": str,
    "input_shape": list[int],
    "latency_note": str | None,
    **dict.fromkeys(("metrics", "parent_metrics", "formats"), dict[str, Any] | None),
}
FORMATS = {"device": str, "latency_ms": dict[str, dict[str, Number]]}
PARENT_REPORT = {"metrics": dict[str, Any]}


def damaged(got: str, expected: str, kind: type[Exception] = ValueError) -> Exception:
    """Makes the error of files that don't hold what they should."""
    got = got if len(got) < LONGEST_MESSAGE else f"{got[:LONGEST_MESSAGE]}..."
    return kind(f"Got {got}; expected {expected}. The files are damaged or of another version: save or download again.")


def leaves(data: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path of keys to each value of nested JSON, and the value; an entry of a list has the list's path."""
    waiting: list[tuple[tuple[str, ...], int, Any]] = [((), 0, data)]
    entries = 0
    while waiting:
        path, depth, value = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"Got JSON nested over {DEEPEST} levels deep; expected about 5. Save or download again.")
        entries += len(value) if isinstance(value, (Mapping, list, tuple)) else 0
        if entries > MOST_ENTRIES:
            raise damaged(f"JSON of over {MOST_ENTRIES} entries", "fewer")
        texts = value if isinstance(value, Mapping) else [value]
        if any(isinstance(text, str) and SURROGATE.search(text) for text in texts):
            raise ValueError("Got half a character (a surrogate) in JSON; expected whole ones. Save or download again.")
        if isinstance(value, Mapping):
            waiting.extend(((*path, str(key)), depth + 1, inner) for key, inner in value.items())
        elif isinstance(value, (list, tuple)):
            waiting.extend((path, depth + 1, inner) for inner in value)
        yield path, value


def check_config(data: Mapping[str, Any], config_class: type) -> None:
    """Refuses absurd sizes and numbers in a config.json, NaN, names of methods, and `LOADING_KEYS`."""
    repeats: Counter[str] = Counter()
    for path, value in leaves(data):
        if not path:
            continue
        _check_size(path, value)
        if "training" in path[:2] or not {"id2label", "label2id"}.isdisjoint(path[:-1]):
            continue  # a record, from which nothing is built, or label names
        _check_entry(path, value, config_class)
        if REPEATED.search(path[-1]) and isinstance(value, int):
            repeats[".".join(path)] += abs(value)
            if (count := repeats[".".join(path)]) > LARGEST_COUNT:
                raise _refused(path, count, f"at most {LARGEST_COUNT} in all")


def _check_size(path: tuple[str, ...], value: Any) -> None:
    if len(path[-1]) > LONGEST_NAME:
        raise damaged(
            f"the key {path[-1][:60]!r}... of {len(path[-1])} characters in config.json", f"at most {LONGEST_NAME}"
        )
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise _refused(path, value, f"a text of at most {LONGEST_TEXT} characters")
    most = LONGEST_LISTS.get(path[-1], LARGEST_COUNT)
    if isinstance(value, (Mapping, list)) and len(value) > most:
        raise damaged(f"{'.'.join(path)[:200]} with {len(value)} entries in config.json", f"at most {most}")


def _check_entry(path: tuple[str, ...], value: Any, config_class: type) -> None:
    key, is_attribute = path[-1], "nemo_config" not in path[:-1]
    if is_attribute and (key.startswith("__") or callable(getattr(config_class, key, None))):
        raise _refused(path, value, "no entry with the name of a method")
    if key.removeprefix("_").removesuffix("_internal") in LOADING_KEYS and value not in BUILT_IN:
        raise _refused(path, value, "none, since a file doesn't choose how it is loaded")
    if key in ("dtype", "torch_dtype") and value is not None and str(value).removeprefix("torch.") not in DTYPES:
        raise _refused(path, value, f"one of {list(DTYPES)}")
    if key == "model_type" and not isinstance(value, str):
        raise _refused(path, value, "the name of a kind of model")
    if is_attribute and key in UNCHECKED and type(value) not in UNCHECKED[key]:
        raise _refused(path, value, " or ".join(kind.__name__ for kind in UNCHECKED[key]))
    if POSITIVE.fullmatch(key) and isinstance(value, int) and value < 1:
        raise _refused(path, value, "a number of 1 or more")
    if SMALL.search(key) and isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise _refused(path, value, "a number from 0 to 1")
    if isinstance(value, float) and math.isnan(value):
        raise _refused(path, value, "a number")
    most = LARGEST_COUNT if COUNTED.search(key) and not key.endswith("_id") else LARGEST_NUMBER
    if isinstance(value, int) and abs(value) > most:
        raise _refused(path, value, f"at most {most}")


def _refused(path: tuple[str, ...], value: Any, expected: str) -> Exception:
    return damaged(f"{'.'.join(path)[:200]}={repr(value)[:120]} in config.json", expected)


def check_record(data: Any, types: Mapping[str, Any]) -> None:
    """Checks the types of a record's entries, and that all in it are finite numbers and texts of one line."""
    type_validator("record", data, dict)
    for name, kind in types.items():
        type_validator(name, data.get(name), kind)
    for path, value in leaves(data):
        if isinstance(value, (Mapping, list)) and len(value) > LARGEST_COUNT:
            raise ValueError(f"expected at most {LARGEST_COUNT} entries of {'.'.join(path)[:200]!r}, got {len(value)}")
        key, name = "".join(path[-1:]), ".".join(path)[:200]
        texts = [key, *([value] if isinstance(value, str) and path[0] not in FREE_TEXTS else [])]
        if not all(len(text) <= LONGEST_TEXT and text.isprintable() for text in texts):
            raise ValueError(f"expected a text of one line for {name!r}, got {repr(value)[:200]}")
        is_bounded = not isinstance(value, float) or math.isfinite(value) or path[0] in FREE_NUMBERS
        if not is_bounded or (isinstance(value, int) and abs(value) > 2**63):
            raise ValueError(f"expected a finite number for {name!r}, got {str(value)[:40]}")


def check_report(data: Mapping[str, Any]) -> None:
    """Checks what a report.json holds, as `check_record` does: the report of a module, or the metrics of a parent."""
    check_record(data, MODULE_REPORT if "labels" in data else PARENT_REPORT)
    if data.get("formats"):
        check_record(data["formats"], FORMATS)


def holds(types: Mapping[str, Any]) -> Callable[[Any], None]:
    """Makes the check of a field that holds a record, or a list of records."""

    def check(value: Any) -> None:
        for record in value if isinstance(value, list) else [value] if value else []:
            check_record(record, types)

    return check


def check_training(value: Any) -> None:
    """Checks the field `training` of a configuration, whose arguments a model card prints as code."""
    holds(TRAINING)(value)
    value = value or {}
    for name in [value.get("base_model"), *(value.get("datasets") or [])]:
        check_repository(name)
    if strange := [name for name in value.get("arguments", ()) if not name.isidentifier()]:
        raise ValueError(f"expected names of arguments, got {strange[0]!r}")


def check_label_groups(value: Any) -> None:
    """Checks the field `label_groups` of a configuration: groups of different names and labels."""
    if value is None:
        return
    are_groups = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    entries = [(entry.get("name"), entry.get("labels")) for entry in value] if are_groups else []
    if not are_groups or not all(isinstance(name, str) and isinstance(ids, list) for name, ids in entries):
        raise ValueError(f"expected a list of groups, each with a name and labels, got {repr(value)[:200]}")
    for _, ids in entries:
        check_label_ids(ids)
    members = [label for _, ids in entries for label in ids or ()]
    if len({name for name, _ in entries}) < len(entries) or len(set(members)) < len(members):
        raise ValueError(f"expected groups of different names and labels, got {repr(value)[:200]}")


def check_label_ids(value: Any) -> None:
    """Checks a list of label ids: at least one, all different."""
    if value is None:
        return
    are_ids = isinstance(value, list) and all(type(label) is int and 0 <= label < LARGEST_COUNT for label in value)
    if not are_ids or not value or len(set(value)) < len(value):
        raise ValueError(f"expected different label ids from 0 on, got {repr(value)[:200]}")


def check_names(value: Any) -> None:
    """Checks label names by id, which in a file is a string."""
    if value is None:
        return
    are_names = isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
    if not are_names or {str(key) for key in value} != {str(index) for index in range(len(value))}:
        raise ValueError(f"expected a name for each label from 0 on, got {repr(value)[:200]}")


def check_ids_by_name(value: Any) -> None:
    """Checks label ids by name."""
    if value is not None and not (isinstance(value, dict) and all(type(index) is int for index in value.values())):
        raise ValueError(f"expected an id for each label name, got {repr(value)[:200]}")


def check_repository(value: Any) -> None:
    """Checks a field that holds the name of a Hub repository, or `None`."""
    if value is not None and not is_repository(value):
        raise ValueError(f"expected the name of a Hub repository, got {str(value)[:200]!r}")


def within(low: float, high: float) -> Callable[[Any], None]:
    """Makes the check of a field that holds a number from `low` to `high`, or `None`."""

    def check(value: Any) -> None:
        if value is not None and not low <= value <= high:
            raise ValueError(f"expected a number from {low} to {high}, got {value}")

    return check


def is_companion(name: str) -> bool:
    """Tells whether a name can be that of a processor's file: no path, weights, code, or file of the model."""
    return bool(COMPANION_NAME.fullmatch(name)) and not NO_COMPANION.fullmatch(name.lower())


def check_companions(value: Any) -> None:
    """Checks the field `processor_files` of a configuration."""
    names = {name.lower() for name in value or ()}
    if value and (len(value) > MOST_COMPANIONS or len(names) < len(value) or not all(map(is_companion, value))):
        raise ValueError(f"expected at most {MOST_COMPANIONS} different names of a processor's files, got {value}")


def check_companion_files(sizes: Mapping[str, int], source: str) -> None:
    """Checks how many bytes the processor's files have, alone and together."""
    named = {repr(name): size for name, size in sizes.items()}
    for name, size in {**named, "files of the processor": sum(sizes.values())}.items():
        if size > LARGEST_COMPANION:
            got = f"{name} of {size} bytes in {source}"
            raise OSError(f"Got {got}; expected at most {LARGEST_COMPANION}. Save the processor again.")
