"""The command `report`: a page about a parent, a module or a plain model."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from nemo_hf.hub.page_facts import chosen_labels
from nemo_hf.hub.report_page import check_file, check_page, write_report_page
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.calibration_inputs import input_kind
from nemo_hf.models.configuration import task_of
from nemo_hf.models.cut_saved import saved_processor

from .data import load_data, load_samples, spread_samples
from .models import known_names, labels_of, load_any, names_of

SAMPLES = 2000  # most that are measured on, unless --samples says otherwise
MEASURING = {"labels", "retention", "samples", "label_column", "input_column", "max_length", "calibration_split"}


def report(options: Namespace) -> None:
    """Writes a page about a model, and says where it is."""
    given = sorted(name for name in MEASURING if getattr(options, name) is not None)
    if given and not options.dataset:
        named = " ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"Got {named} without --dataset; expected data to measure with. Name some, or leave it out.")
    check_file(options.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = {"trust_remote_code": True} if options.trust_remote_code else {}
    model = load_any(options.model, **code).to(device)
    origin = load_any(options.parent, **code).to(device) if options.parent else None
    check_page(model, options.output, origin)
    is_module = isinstance(model, NeMoPreTrainedModel) and not model.is_parent
    measuring = _measuring(options, model, model if not is_module else origin) if options.dataset else {}
    words: dict[str, Any] = {"model": options.model, "origin": options.parent, **measuring.pop("words", {})}
    write_report_page(model, options.output, origin=origin, words=words, **measuring)
    print(f"{options.output}: {Path(options.output).stat().st_size / 1e3:.0f} kB, opens in any browser")


def _measuring(options: Namespace, model: Any, source: Any) -> dict[str, Any]:
    """The data that a page is measured on, and how commands name them."""
    is_source = source is not None
    if options.labels and model is not source:
        raise ValueError("Got --labels for a module; expected none: its page is about its own labels. Leave them out.")
    if options.retention and not is_source:
        raise ValueError("Got --retention for a module alone; expected its source as well: --parent SOURCE.")
    asked, word = (source, options.parent or options.model) if is_source else (model, options.model)
    config = model.config.base_config if not is_source else source.config
    names = list(names_of(config).values())
    labels = [label for each in options.labels or () for label in labels_of(each, known_names(config))] or None
    own = chosen_labels(source, labels) if model is source else list(model.config.label_ids or ())
    kind, columns = input_kind(asked), (options.label_column, options.input_column)
    split = options.calibration_split or "train"
    cut = ["--dataset", options.dataset]
    for name in ("label_column", "input_column"):
        cut += [f"--{name.replace('_', '-')}", getattr(options, name)] if getattr(options, name) else []
    cut += ["--split", split] if split != "train" else []
    found: dict[str, Any] = {
        "batches": _batches(options, asked, names, own),
        "words": {"cut": cut, "dataset": options.dataset, "split": options.split},
    }
    if is_source:
        found |= {
            "calibration": load_samples(options.dataset, split, kind, names, *columns),
            "labels": labels,
            "retentions": options.retention,
            "processing_class": saved_processor(source, word),
        }
    return found


def _batches(options: Namespace, model: Any, names: list[str], first: Sequence[int]) -> DataLoader[Any]:
    task = model.task if isinstance(model, NeMoPreTrainedModel) else task_of(type(model))
    own = {"names": names, "task": task, "max_length": options.max_length}
    columns = (options.label_column or "label", options.input_column)
    data = load_data(options.dataset, str(model.name_or_path), [options.split], *columns, **own)
    samples = spread_samples(data.splits[options.split], options.samples or SAMPLES, first)
    return DataLoader(samples, batch_size=options.batch_size, collate_fn=data.collator)
