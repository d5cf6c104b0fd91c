"""A parent and modules of it as repositories of the Hub, tied in a collection."""

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
Module = Sequence[LabelLike]


def repository_name(labels: Sequence[str]) -> str:
    """Makes the name of a module's repository.

    Args:
        labels: Label or group names, of any characters.

    Returns:
        The names joined by dashes, in letters, digits and dashes; what can't be written so, or is too long, becomes a
        short hash.
    """
    parts = []
    for label in labels:
        plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
        part = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")
        parts.append(part or _hash(label))
    name = "-".join(parts)
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH].rstrip('-')}-{_hash(*labels)}"


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def module_repositories(namespace: str, parent: str, modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Names the repositories of modules.

    Args:
        namespace: User or organization.
        parent: Name of the parent's repository, without the namespace.
        modules: Label names by what the user calls the module.

    Returns:
        Repository by what the user calls the module.

    Raises:
        ValueError: If two of them would have one name.
    """
    names = {key: repository_name(labels) for key, labels in modules.items()}
    taken: dict[str, str] = {parent: "the parent"}
    for key, name in names.items():
        if name in taken:
            raise ValueError(
                f"Got the modules {taken[name]!r} and {key!r}, whose repositories would both be {namespace}/{name}; "
                "expected different ones. Push one of them by itself, with a name of your own: "
                "module.push_to_hub(...)."
            )
        taken[name] = key
    return {key: f"{namespace}/{name}" for key, name in names.items()}


def push_modules(
    parent: NeMoPreTrainedModel,
    modules: Mapping[str, Module],
    namespace: str,
    name: str,
    batches: Iterable[Mapping[str, Any]] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    options: CardOptions | None = None,
    threshold: float | None = None,
    round_to: int | None = None,
    compares_formats: bool = False,
    **push_options: Any,
) -> dict[str, str]:
    """Pushes a parent and modules of it, one repository each, and ties them in a collection.

    What is on the Hub already and has not changed stays as it is, so that a call that died half-way can be repeated.

    Args:
        parent: The parent.
        modules: Labels or groups by what the caller calls the module.
        namespace: User or organization.
        name: Name of the parent's repository, and title of the collection.
        batches: Batches of inputs with `labels`, of data that chose nothing: each module is measured on them, and its
            report goes into its repository and card. They are gone through once a module.
        calibration: Batches of validation data: each module's rejection score is calibrated on them.
        options: What the cards say that the models don't know; `parent` is filled in.
        threshold: As in `extract_module`.
        round_to: As in `extract_module`.
        compares_formats: With `batches`: whether each module is also timed as a plain model and as ONNX, which takes
            a while, for its card.
        **push_options: `private`, `token` and others of `push_to_hub`.

    Returns:
        Repository by what the caller calls the module, the `"parent"`'s first, and the `"collection"`'s address last.

    Raises:
        ValueError: If labels are unknown, or two modules would have one repository.
    """
    names = parent.config.names
    plans = {key: make_plan(parent, labels, threshold, round_to) for key, labels in modules.items()}
    repositories = module_repositories(
        namespace, name, {key: [names[i] for i in plan.label_ids] for key, plan in plans.items()}
    )
    options = options or CardOptions()
    done = {"parent": f"{namespace}/{name}"}
    push_model(parent, done["parent"], options, **push_options)
    for key, labels in modules.items():
        module = extract_module(parent, labels, threshold, round_to)
        if calibration is not None:
            calibrate_rejection(module, calibration, show_progress=False)
        if batches is not None:
            evaluate_module(parent, labels, batches, module, threshold, round_to, show_progress=False)
            if compares_formats:
                module.report = {**(module.report or {}), "formats": compare_latency(module, parent)}
        push_model(module, repositories[key], replace(options, parent=done["parent"]), **push_options)
        done[key] = repositories[key]
    access = {name: push_options.get(name) for name in ("token", "private")}
    done["collection"] = push_collection(name, namespace, list(done.values()), **access)
    return done


def push_collection(
    title: str,
    namespace: str,
    repositories: Sequence[str],
    token: bool | str | None = None,
    private: bool | None = None,
) -> str:
    """Ties repositories in a collection; what is in it already stays as it is.

    Args:
        title: Its title; an existing collection of this title in the namespace is used.
        namespace: User or organization.
        repositories: Repositories of models.
        token: Token, as in `huggingface_hub`.
        private: Whether a new collection is private.

    Returns:
        The address of the collection.
    """
    api = HfApi(token=token)
    with clear_errors(title):
        same = (found for found in api.list_collections(owner=namespace) if found.title == title)
        collection = next(same, None) or api.create_collection(
            title, namespace=namespace, private=bool(private), exists_ok=True
        )
        present = {item.item_id for item in api.get_collection(collection.slug).items}
        for repository in repositories:
            if repository not in present:
                api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    return str(collection.url)
