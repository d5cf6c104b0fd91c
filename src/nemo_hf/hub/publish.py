"""The repository of a parent or module: its files with card and picture, pushed to the Hub."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from nemo_hf.config import NeMoConfig
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.files import REPORT_NAME, write_json, write_text
from nemo_hf.models.remote_files import hub_name

from .model_card import CardFacts, license_of, own_text, render_model_card
from .pictures import draw_neurons
from .provenance import versions

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
PICTURE_NAME = "neurons.png"
STALE = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    REPORT_NAME,
    "modeling_nemo_module.py",
    PICTURE_NAME,
    "training_args.bin",
]
"""Files of an older push that go, unless they are pushed anew."""
TIMED = ("latency_ms", "parent_latency_ms", "latency_note", "device", "formats")
"""What differs between two measurements of the same module."""


@dataclass(frozen=True)
class CardOptions:
    """What a card says that the model doesn't know.

    Args:
        parent: Repository of a module's parent; `None` takes the one that it was cut from, if that is on the Hub.
        license: Identifier of the license.
        datasets: Hub data sets that it was trained and measured on.
        tags: Further tags.
        measured_on: Hub data set that the report is of; `None` takes the first of `datasets`.
        split: Its split.
    """

    parent: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = field(default_factory=tuple)
    measured_on: str | None = None
    split: str | None = None


def card_facts(
    model: NeMoPreTrainedModel,
    repo_id: str,
    options: CardOptions | None = None,
    picture: str | None = None,
) -> CardFacts:
    """Collects what the card of a parent or module says.

    Args:
        model: The model.
        repo_id: Repository that the card is for.
        options: What the model doesn't know.
        picture: Name of the picture file, if there is one.

    Returns:
        The facts; every number is of the model, or was measured or recorded before.
    """
    options, config = options or CardOptions(), model.config
    is_module = not model.is_parent
    names = config.names
    owned = config.groups if model.is_parent else {}  # a module's groups name labels by the parent's ids
    groups = [{"name": name, "labels": [names[i] for i in ids]} for name, ids in owned.items()]
    is_grouped = any(len(group["labels"]) > 1 for group in groups)
    training = config.training or {}
    given, defaults = model.nemo_config.to_dict(), NeMoConfig().to_dict()
    trained_on = list(training.get("datasets") or [])
    # What a trainer recorded is also what it evaluated the parent on; a module is measured by whoever pushes it.
    known = list(options.datasets) or (trained_on if model.is_parent else [])
    measured_on = options.measured_on or (known[0] if known else None)
    tensors = list(model.model.parameters())
    return CardFacts(
        repo_id=repo_id,
        task=model.task,
        role=config.role,
        base_class=config.base_class,
        labels=list(names.values()),
        label_ids=list(config.label_ids or ()),
        parameters=base_parameters(model),
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        generator_parameters=sum(p.numel() for p in model.masks.parameters()) if model.masks is not None else 0,
        groups=groups if is_grouped else [],
        several_labels=config.has_several_labels,
        parent=(options.parent or hub_name(config.parent)) if is_module else None,
        base_model=training.get("base_model"),
        license=options.license,
        datasets=list(dict.fromkeys([*(options.datasets or trained_on), *([measured_on] if measured_on else [])])),
        measured_on=measured_on,
        split=options.split,
        tags=list(options.tags),
        retained_neurons=config.retained_neurons if is_module else None,
        threshold=config.relevance_threshold if is_module else None,
        round_to=config.round_to,
        equivalence=config.equivalence,
        rejection=config.rejection,
        is_tuned=config.is_tuned,
        report=model.report,
        training=config.training,
        nemo_config={name: value for name, value in given.items() if value != defaults[name]},
        versions=versions(),
        picture=picture,
    )


def write_companions(
    model: NeMoPreTrainedModel,
    directory: str | Path,
    repo_id: str,
    options: CardOptions | None = None,
    card_before: str | None = None,
) -> CardFacts:
    """Writes the card and the picture of a model beside its files.

    Args:
        model: The model.
        directory: An existing directory.
        repo_id: Repository that the card is for.
        options: What the model doesn't know.
        card_before: A card that is replaced, whose owner's text stays.

    Returns:
        What the card says.
    """
    directory = Path(directory)
    try:
        has_picture = draw_neurons(model, directory / PICTURE_NAME)
    except ImportError as error:
        logger.warning("The repository gets no picture of its neurons. %s", error)
        has_picture = False
    options = options or CardOptions()
    if options.license is None and card_before:
        options = replace(options, license=license_of(card_before))
    facts = card_facts(model, repo_id, options, PICTURE_NAME if has_picture else None)
    kept = own_text(card_before) if card_before else ""
    write_text(directory / CARD_NAME, render_model_card(facts) + (f"\n{kept}\n" if kept else ""))
    return facts


def push_model(
    model: NeMoPreTrainedModel,
    repo_id: str,
    options: CardOptions | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
) -> CommitInfo:
    """Does what `NeMoPreTrainedModel.push_to_hub` says, as a function of the model."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, clear_errors(repo_id):
        directory = Path(name, "repository")
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = fetch_text(repo_id, REPORT_NAME, revision, token)
        settled = settled_report(model.report, before)
        if settled is not model.report:
            model.report = settled
            write_json(directory / REPORT_NAME, settled)
        card = fetch_text(repo_id, CARD_NAME, revision, token)
        write_companions(model, directory, repo_id, options, card)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message or f"Upload {model.config.role}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=STALE,
        )
    return commit


def settled_report(report: dict[str, Any] | None, before: str | None) -> dict[str, Any] | None:
    """Keeps a report that is pushed already if a new one differs in times only, which no two measurements share.

    Args:
        report: The new report, or `None`.
        before: The text of the old one, or `None`.

    Returns:
        The old report if all but its times are equal, else the new one.
    """
    try:
        old = json.loads(before) if before else None
    except ValueError:
        old = None
    if not isinstance(old, dict) or report is None or set(old) != set(report):
        return report
    same = json.loads(json.dumps(report))
    return old if all(same[name] == old[name] for name in same if name not in TIMED) else report


@contextmanager
def clear_errors(repo_id: str) -> Iterator[None]:
    """Turns what the client raises when an upload or a connection breaks into an error that says what to do."""
    try:
        yield
    except Exception as error:
        # The client lets errors of its HTTP library through.
        is_of_connection = type(error).__module__.startswith("httpx")
        if not is_of_connection and type(error) is not RuntimeError:
            raise
        raise OSError(
            f"Got no working connection to push {repo_id!r} ({error}); expected all files to arrive. "
            "Push again: what has arrived is not sent twice."
        ) from error


def fetch_text(repo_id: str, name: str, revision: str | None, token: bool | str | None) -> str | None:
    """Reads a text file of a repository, past the cache; `None` if there is none.

    Raises:
        OSError: If the Hub doesn't answer.
    """
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = hf_hub_download(repo_id, name, revision=revision, token=token, local_dir=directory)
            return Path(path).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
