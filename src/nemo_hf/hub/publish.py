"""Repositories of parents, modules and composed models: the saved files with card and picture, pushed to the Hub."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from nemo_hf.config import NeMoConfig
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.composed_model import NeMoComposedModel
from nemo_hf.models.files import REPORT_NAME, hub_name, write_json, write_text

from .model_card import CardFacts, license_of, own_text, render_model_card
from .pictures import draw_neurons
from .provenance import versions

CARD_NAME = "README.md"
PICTURE_NAME = "neurons.png"
STALE = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "training_args.bin",
         REPORT_NAME, PICTURE_NAME, "modeling_nemo_module.py"]  # fmt: skip
"""Files of an older push that go, unless they are pushed anew."""
TIMED = {"latency_ms", "parent_latency_ms", "latency_note", "device", "formats"}  # of a measurement
TAKEN_OVER = ("role", "base_class", "retained_neurons", "round_to", "equivalence", "rejection", "is_tuned", "training")
"""Entries of a configuration that are facts of the card by the same name."""

Publishable = NeMoPreTrainedModel | NeMoComposedModel


@dataclass(frozen=True)
class CardOptions:
    """What a card says that the model doesn't know."""

    parent: str | None = None  # repository of a module's parent; `None` takes the one it was cut from, if on the Hub
    license: str | None = None
    datasets: Sequence[str] = ()  # Hub data sets that it was trained and measured on
    tags: Sequence[str] = ()
    measured_on: str | None = None  # Hub data set that the report is of; `None` takes the first of `datasets`
    split: str | None = None  # of `measured_on`


def card_facts(model: Publishable, repo_id: str, options: CardOptions, picture: str | None) -> CardFacts:
    """Collects what the card of a model says; every number is of the model, or was measured or recorded before."""
    own = _composed_facts(model) if isinstance(model, NeMoComposedModel) else _single_facts(model, options)
    trained_on = list((own.get("training") or {}).get("datasets") or [])
    # What a trainer recorded is also what it evaluated the parent on; a module is measured by whoever pushes it.
    known = list(options.datasets) or (trained_on if own["role"] == "parent" else [])
    measured_on = options.measured_on or (known[0] if known else None)
    return CardFacts(
        repo_id=repo_id,
        task=model.task,
        license=options.license,
        datasets=list(dict.fromkeys([*(options.datasets or trained_on), *([measured_on] if measured_on else [])])),
        measured_on=measured_on,
        split=options.split,
        tags=list(options.tags),
        report=model.report,
        versions=versions(),
        picture=picture,
        **own,
    )


def _single_facts(model: NeMoPreTrainedModel, options: CardOptions) -> dict[str, Any]:
    """Facts of a parent or module."""
    config, names = model.config, model.config.names
    owned = config.groups if model.is_parent else {}  # a module's groups name labels by the parent's ids
    groups = [{"name": name, "labels": [names[i] for i in ids]} for name, ids in owned.items()]
    given, defaults = model.nemo_config.to_dict(), NeMoConfig().to_dict()
    return {
        **{name: getattr(config, name) for name in TAKEN_OVER},
        "labels": list(names.values()),
        "label_ids": list(config.label_ids or ()),
        "parameters": base_parameters(model),
        "megabytes": sum(p.numel() * p.element_size() for p in model.model.parameters()) / 1e6,
        "generator_parameters": sum(p.numel() for p in model.masks.parameters()) if model.masks is not None else 0,
        "groups": groups if any(len(group["labels"]) > 1 for group in groups) else [],
        "several_labels": config.has_several_labels,
        "parent": None if model.is_parent else options.parent or hub_name(config.parent),
        "base_model": (config.training or {}).get("base_model"),
        "threshold": config.relevance_threshold,
        "nemo_config": {name: value for name, value in given.items() if value != defaults[name]},
    }


def _composed_facts(model: NeMoComposedModel) -> dict[str, Any]:
    config, parts = model.config, [_single_facts(part, CardOptions()) for part in model.parts]
    names = [name for part in parts for name in part["labels"]]
    calibrated = zip(parts, config.scales or [], config.biases or [], strict=True)
    return {
        "role": "composed",
        "base_class": ", ".join(dict.fromkeys(part["base_class"] for part in parts)),
        "labels": [names[place] for place in config.label_order or []],
        "parameters": sum(part["parameters"] for part in parts),
        "megabytes": sum(part["megabytes"] for part in parts),
        "parts": [{**part, "scale": scale, "bias": bias} for part, scale, bias in calibrated],
    }


def write_companions(
    model: Publishable,
    directory: str | Path,
    repo_id: str,
    options: CardOptions | None = None,
    card_before: str | None = None,
    report: dict[str, Any] | None = None,
) -> CardFacts:
    """Writes the card, with `report` or else the model's, and the picture into a directory; returns the card's facts.

    The owner's text of `card_before` stays, and so does its license where the options name none.
    """
    directory, options = Path(directory), options or CardOptions()
    has_picture = isinstance(model, NeMoPreTrainedModel) and draw_neurons(model, directory / PICTURE_NAME)
    if options.license is None and card_before:
        options = replace(options, license=license_of(card_before))
    facts = card_facts(model, repo_id, options, PICTURE_NAME if has_picture else None)
    facts = replace(facts, report=report or model.report)
    kept = own_text(card_before) if card_before else ""
    write_text(directory / CARD_NAME, render_model_card(facts) + (f"\n{kept}\n" if kept else ""))
    return facts


def push_model(
    model: Publishable,
    repo_id: str,
    options: CardOptions | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "50GB",
    **upload_options: Any,
) -> CommitInfo:
    """Pushes a model with its processor, report, card and picture in one commit; see its `push_to_hub`."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, clear_errors(repo_id):
        directory = Path(name, "repository")
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        report = settled_report(model.report, fetch_text(repo_id, REPORT_NAME, revision, token))
        if report is not model.report:
            write_json(directory / REPORT_NAME, report)
        card = fetch_text(repo_id, CARD_NAME, revision, token)
        facts = write_companions(model, directory, repo_id, options, card, report)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message or f"Upload {facts.role}{' model' if facts.role == 'composed' else ''}",
            revision=revision,
            delete_patterns=STALE,
            **upload_options,
        )
    return commit


def settled_report(report: dict[str, Any] | None, before: str | None) -> dict[str, Any] | None:
    """Returns the report pushed `before` if the new one differs in times only, so that a second push has no commit."""
    try:
        old = json.loads(before) if before else None
    except ValueError:
        old = None
    if report is None or not isinstance(old, dict) or set(old) != set(report):
        return report
    new = json.loads(json.dumps(report))
    return old if all(new[name] == old[name] for name in set(new) - TIMED) else report


@contextmanager
def clear_errors(repo_id: str) -> Iterator[None]:
    """Turns what the client raises when an upload or a connection breaks into an error that says what to do."""
    try:
        yield
    except Exception as error:
        # The client lets errors of its HTTP library through.
        if type(error) is not RuntimeError and not type(error).__module__.startswith("httpx"):
            raise
        raise OSError(
            f"The push to {repo_id!r} failed because the connection broke ({error}). "
            "Push again: files that have arrived are not sent twice."
        ) from error


def fetch_text(repo_id: str, name: str, revision: str | None, token: bool | str | None) -> str | None:
    """Reads a text file of a repository, past the cache; `None` if there is none, `OSError` if the Hub is silent."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = hf_hub_download(repo_id, name, revision=revision, token=token, local_dir=directory)
            return Path(path).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
