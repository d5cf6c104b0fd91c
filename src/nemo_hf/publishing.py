"""Repositories of parents and modules: the files with their card, pushed to the Hub, tied in a collection."""

import hashlib
import logging
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from .calibration import calibrate_rejection
from .config import LabelLike, NeMoConfig
from .evaluation import evaluate_module
from .exporting import compare_latency
from .extraction import make_plan
from .files import CODE_NAME, REPORT_NAME
from .model_card import CardFacts, own_text, render_model_card
from .modeling import NeMoPreTrainedModel, base_parameters
from .pictures import draw_neurons
from .provenance import hub_name, versions

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
PICTURE_NAME = "neurons.png"
STALE = [
    "model*.safetensors",
    "model.safetensors.index.json",
    REPORT_NAME,
    CODE_NAME,
    PICTURE_NAME,
    "training_args.bin",
]
"""Files of an older push that go, unless they are pushed anew."""
NAME_LENGTH = 60
Module = Sequence[LabelLike]


@dataclass(frozen=True)
class CardOptions:
    """What a card says that the model doesn't know.

    Args:
        parent: Repository of a module's parent; `None` takes the one that it was cut from, if that is on the Hub.
        license: Identifier of the license.
        datasets: Hub data sets that it was trained and measured on.
        tags: Further tags.
    """

    parent: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = field(default_factory=tuple)


def card_facts(
    model: NeMoPreTrainedModel,
    repo_id: str,
    options: CardOptions | None = None,
    picture: str | None = None,
    has_code: bool = False,
) -> CardFacts:
    """Collects what the card of a parent or module says.

    Args:
        model: The model.
        repo_id: Repository that the card is for.
        options: What the model doesn't know.
        picture: Name of the picture file, if there is one.
        has_code: Whether the repository loads without nemo_hf.

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
        datasets=list(options.datasets) or list(training.get("datasets") or []),
        tags=list(options.tags),
        retained_neurons=config.retained_neurons if is_module else None,
        threshold=config.relevance_threshold if is_module else None,
        round_to=config.round_to,
        law=config.law,
        rejection=config.rejection,
        report=model.report,
        training=config.training,
        nemo_config={name: value for name, value in given.items() if value != defaults[name]},
        versions=versions(),
        picture=picture,
        has_code=has_code,
    )


def write_companions(
    model: NeMoPreTrainedModel,
    directory: str | Path,
    repo_id: str,
    options: CardOptions | None = None,
    card_before: str | None = None,
    has_code: bool = False,
) -> CardFacts:
    """Writes the card and the picture of a model beside its files.

    Args:
        model: The model.
        directory: An existing directory.
        repo_id: Repository that the card is for.
        options: What the model doesn't know.
        card_before: A card that is replaced, whose owner's text stays.
        has_code: Whether the repository loads without nemo_hf.

    Returns:
        What the card says.
    """
    directory = Path(directory)
    try:
        has_picture = draw_neurons(model, directory / PICTURE_NAME)
    except ImportError as error:
        logger.warning("The repository gets no picture of its neurons. %s", error)
        has_picture = False
    facts = card_facts(model, repo_id, options, PICTURE_NAME if has_picture else None, has_code)
    kept = own_text(card_before) if card_before else ""
    card = render_model_card(facts) + (f"\n{kept}\n" if kept else "")
    temporary = directory / f".{CARD_NAME}.tmp"
    temporary.write_text(card, encoding="utf-8")
    temporary.replace(directory / CARD_NAME)
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
    with_code: bool = False,
) -> CommitInfo:
    """Does what `NeMoPreTrainedModel.push_to_hub` says, as a function of the model."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "repository")
        model.save_pretrained(directory, max_shard_size=max_shard_size, with_code=with_code)
        write_companions(model, directory, repo_id, options, _card_on_hub(repo_id, revision, token), with_code)
        with _clear_errors(repo_id):
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


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Turns what the client raises when an upload or a connection breaks into an error that says what to do."""
    try:
        yield
    except Exception as error:
        is_of_connection = type(error).__module__.startswith(
            "httpx"
        )  # the client lets its HTTP library's errors through
        if not is_of_connection and type(error) is not RuntimeError:
            raise
        raise OSError(
            f"Got a broken upload to {repo_id!r} ({error}); expected all files to arrive. "
            "Push again: what has arrived is not sent twice."
        ) from error


def _card_on_hub(repo_id: str, revision: str | None, token: bool | str | None) -> str | None:
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token, local_dir=directory)
            return Path(path).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


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
        **push_options: `private`, `token`, `with_code` and others of `push_to_hub`.

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
    push_model(parent, done["parent"], options, **{**push_options, "with_code": False})
    for key, labels in modules.items():
        module = parent.extract_module(labels, threshold, round_to)
        if calibration is not None:
            calibrate_rejection(module, calibration, show_progress=False)
        if batches is not None:
            evaluate_module(parent, labels, batches, module, threshold, round_to, show_progress=False)
            if compares_formats:
                module.report = {**(module.report or {}), "formats": compare_latency(module, parent)}
        push_model(module, repositories[key], replace(options, parent=done["parent"]), **push_options)
        done[key] = repositories[key]
    token = push_options.get("token")
    done["collection"] = push_collection(name, namespace, list(done.values()), token)
    return done


def push_collection(title: str, namespace: str, repositories: Sequence[str], token: bool | str | None = None) -> str:
    """Ties repositories in a collection; what is in it already stays as it is.

    Args:
        title: Its title; an existing collection of this title in the namespace is used.
        namespace: User or organization.
        repositories: Repositories of models.
        token: Token, as in `huggingface_hub`.

    Returns:
        The address of the collection.
    """
    api = HfApi(token=token)
    collection = next(
        (found for found in api.list_collections(owner=namespace) if found.title == title), None
    ) or api.create_collection(title, namespace=namespace, exists_ok=True)
    present = {item.item_id for item in api.get_collection(collection.slug).items}
    for repository in repositories:
        if repository not in present:
            api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    return str(collection.url)
