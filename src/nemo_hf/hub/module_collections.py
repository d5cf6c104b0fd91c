"""Pushes a parent and modules of it, one Hub repository each, and ties them in a collection."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import HfApi

from nemo_hf.config import LabelLike
from nemo_hf.evaluation.rejection import calibrate_rejection
from nemo_hf.evaluation.report import evaluate_module
from nemo_hf.export.plain_model import compare_latency
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.extraction import extract_module, make_plan

from .publish import CardOptions, clear_errors, push_model

NAME_LENGTH = 60


def repository_name(labels: Sequence[str]) -> str:
    """Joins label names into ASCII letters, digits and dashes; labels without these and long names get a hash."""
    parts = []
    for label in labels:
        plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
        parts.append(re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-") or _hash(label))
    name = "-".join(parts)
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH].rstrip('-')}-{_hash(*labels)}"


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def module_repositories(namespace: str, parent: str, modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Names the repositories of modules by their label names; two equal ones, or one like the parent's, are refused."""
    names = {key: repository_name(labels) for key, labels in modules.items()}
    for key, name in names.items():
        if same := [
            other for other, taken in {"the parent": parent, **names}.items() if taken == name and other != key
        ]:
            raise ValueError(
                f"Got the modules {same[0]!r} and {key!r}, whose repositories would both be {namespace}/{name}; "
                "expected different ones. Push one of them by itself: module.push_to_hub(...), with another name."
            )
    return {key: f"{namespace}/{name}" for key, name in names.items()}


def push_modules(
    parent: NeMoPreTrainedModel,
    modules: Mapping[str, Sequence[LabelLike]],
    namespace: str,
    name: str,
    batches: Iterable[Mapping[str, Any]] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    options: CardOptions | None = None,
    threshold: float | None = None,
    round_to: int | None = None,
    compares_formats: bool = False,
    private: bool | None = None,
    **push_options: Any,
) -> dict[str, str]:
    """Pushes a parent and modules of it, one repository each, and ties them in a collection.

    `modules` are labels or groups by what the caller calls each module. Modules are measured on `batches` of held-out
    data and their rejection calibrated on `calibration`, validation data. What has not changed since an earlier push
    stays as it is, so a call that failed half-way can be repeated. Returns the repository of the `"parent"` and of
    each module by name, and the address of the `"collection"`.
    """
    names = parent.config.names
    label_ids = {key: make_plan(parent, labels, threshold, round_to).label_ids for key, labels in modules.items()}
    repositories = module_repositories(namespace, name, {k: [names[i] for i in ids] for k, ids in label_ids.items()})
    options = options or CardOptions()
    done = {"parent": f"{namespace}/{name}"}
    push_model(parent, done["parent"], options, private=private, **push_options)
    for key, labels in modules.items():
        module = extract_module(parent, labels, threshold, round_to)
        if calibration is not None:
            calibrate_rejection(module, calibration, show_progress=False)
        if batches is not None:
            evaluate_module(parent, labels, batches, module, threshold, round_to, show_progress=False)
            if compares_formats:
                module.report = {**(module.report or {}), "formats": compare_latency(module, parent)}
        push_model(module, repositories[key], replace(options, parent=done["parent"]), private=private, **push_options)
        done[key] = repositories[key]
    done["collection"] = _collect(HfApi(token=push_options.get("token")), name, namespace, [*done.values()], private)
    return done


def _collect(api: HfApi, title: str, namespace: str, repositories: Sequence[str], private: bool | None) -> str:
    """Adds model repositories to the collection of this title, made if need be, and returns its address."""
    options = {"namespace": namespace, "private": bool(private), "exists_ok": True}
    with clear_errors(title):
        same = (found for found in api.list_collections(owner=namespace) if found.title == title)
        collection = next(same, None) or api.create_collection(title, **options)  # type: ignore[arg-type]
        present = {item.item_id for item in api.get_collection(collection.slug).items}
        for repository in repositories:
            if repository not in present:
                api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    return str(collection.url)
