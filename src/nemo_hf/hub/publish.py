"""Pushes models to the Hub: one repository each with its card and picture, tied in a collection."""

import hashlib
import json
import re
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.evaluation.report import evaluate_module
from nemo_hf.export.plain_model import compare_latency
from nemo_hf.models.atomic_writes import STALE_WEIGHTS, replaced_directory, scratch_directory
from nemo_hf.models.base import NeMoPreTrainedModel, base_parameters
from nemo_hf.models.composed_model import NeMoComposedModel
from nemo_hf.models.extraction import extract_module, make_plan
from nemo_hf.models.files import REPORT_NAME
from nemo_hf.models.privacy import clean, is_repository
from nemo_hf.models.rejection_calibration import calibrate_rejection
from nemo_hf.models.save_identity import bare_report, write_report
from nemo_hf.models.weight_files import size_in_bytes

from .model_card import CardFacts, license_of, own_text, render_model_card
from .page_facts import Measured, page_facts
from .pictures import draw_neurons
from .provenance import versions
from .report_page import PAGE_NAME, page_words, write_page

CARD_NAME = "README.md"
PICTURE_NAME = "neurons.png"
NAME_LENGTH = 60  # of a module's repository
STALE = [*STALE_WEIGHTS, "training_args.bin", REPORT_NAME, PICTURE_NAME, PAGE_NAME, "modeling_nemo_module.py"]
"""Files of an older push that are deleted unless they are pushed again; the last is code that version 0.1.0 wrote."""
TIMED = {"latency_ms", "parent_latency_ms", "latency_note", "device", "formats"}  # of a measurement
TAKEN_OVER = ("role", "base_class", "retained_neurons", "round_to", "equivalence", "extraction", "rejection",
              "is_tuned", "training")  # fmt: skip
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
    report_page: str | Path | bool = False  # a page that `write_report_page` wrote; `True` writes one of what is known


def card_facts(model: Publishable, repo_id: str, options: CardOptions, picture: str | None) -> CardFacts:
    """Collects what the card of a model says."""
    own = _composed_facts(model) if isinstance(model, NeMoComposedModel) else _single_facts(model, options)
    trained_on = list((own.get("training") or {}).get("datasets") or [])
    # What a trainer recorded is also what it evaluated the parent on; a module is measured by whoever pushes it.
    known = options.datasets or (trained_on if own["role"] == "parent" else [])
    measured_on = options.measured_on or next(iter(known), None)
    datasets = list(dict.fromkeys([*(options.datasets or trained_on), *([measured_on] if measured_on else [])]))
    if paths := [name for name in datasets if not is_repository(name)]:
        raise ValueError(f"Got the data sets {paths}; expected names of Hub repositories. Leave paths out of the card.")
    given: dict[str, Any] = {"license": options.license, "split": options.split, "tags": list(options.tags)}
    given |= {"datasets": datasets, "measured_on": measured_on, "report": model.report, "picture": picture}
    return CardFacts(repo_id, model.task, versions=versions(), **given, **own)


def _single_facts(model: NeMoPreTrainedModel, options: CardOptions) -> dict[str, Any]:
    config, names = model.config, model.config.names
    owned = config.groups if model.is_parent else {}  # a module's groups name labels by the parent's ids
    groups = [{"name": name, "labels": [names[i] for i in ids]} for name, ids in owned.items()]
    given, defaults = model.nemo_config.to_dict(), NeMoConfig().to_dict()
    origin = config.base_model if config.extraction else None  # a plain model that the module was cut from
    return {
        **{name: getattr(config, name) for name in TAKEN_OVER},
        "rejected_label": config.rejected_label if config.shows_rejected else None,
        "labels": list(names.values()),
        "label_ids": list(config.label_ids or ()),
        "parameters": base_parameters(model),
        "megabytes": size_in_bytes(model.model.parameters()) / 1e6,
        "generator_parameters": sum(p.numel() for p in model.masks.parameters()) if model.masks is not None else 0,
        "groups": groups if any(len(group["labels"]) > 1 for group in groups) else [],
        "needs_samples": model.is_parent and not model.nemo_config.trains_modules,
        "several_labels": config.has_several_labels,
        "parent": None if model.is_parent else options.parent or config.parent or origin,
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
        "parameters": int(model.num_parameters()),
        "megabytes": size_in_bytes(model.parameters()) / 1e6,
        "parts": [{**part, "scale": scale, "bias": bias} for part, scale, bias in calibrated],
    }


def write_companions(
    model: Publishable, directory: str | Path, repo_id: str, options: CardOptions, card_before: str | None,
    report: dict[str, Any] | None = None,
) -> CardFacts:  # fmt: skip
    """Writes the card, with `report` or else the model's, and the picture into a directory; returns the card's facts.

    A page (see `write_report_page`) is written if the options ask for it, and linked also if one is there. The owner's
    text of `card_before` stays, and so does its license where the options name none.
    """
    if options.license is None and card_before:
        options = replace(options, license=license_of(card_before))
    with replaced_directory(directory, stale=(PICTURE_NAME,)) as temporary:
        has_picture = isinstance(model, NeMoPreTrainedModel) and draw_neurons(model, temporary / PICTURE_NAME)
        facts = card_facts(model, repo_id, options, PICTURE_NAME if has_picture else None)
        facts = replace(facts, report=report or model.report)
        if _write_page(model, temporary / PAGE_NAME, facts, options) or Path(directory, PAGE_NAME).is_file():
            facts = replace(facts, page=PAGE_NAME)
        kept = own_text(card_before or "")
        text = render_model_card(facts) + (f"\n{kept}\n" if kept else "")
        (temporary / CARD_NAME).write_text(text, encoding="utf-8")
    return facts


def _write_page(model: Publishable, path: Path, facts: CardFacts, options: CardOptions) -> bool:
    """Writes the page that the options ask for; returns whether there is one."""
    if not options.report_page:
        return False
    if not isinstance(options.report_page, bool):
        path.write_bytes(Path(options.report_page).read_bytes())
        return True
    if not isinstance(model, NeMoPreTrainedModel):
        return False
    words = page_words(model, None, {"model": facts.repo_id})
    found = page_facts(model, model if model.is_parent else None, Measured(), words)
    write_page({**found, "report": facts.report if found["module"] else None}, path)
    return True


def push_model(
    model: Publishable, repo_id: str, options: CardOptions | None = None, commit_message: str | None = None,
    private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
    max_shard_size: int | str = "50GB", **upload_options: Any,
) -> CommitInfo:  # fmt: skip
    """Pushes a model with its processor, report, card and picture in one commit; see its `push_to_hub`."""
    api = HfApi(token=token)
    with scratch_directory() as scratch, clear_errors(repo_id):
        directory = scratch / "repository"
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        own = clean(model.report)
        report = settled_report(own, fetch_text(repo_id, REPORT_NAME, revision, token))
        if report is not None and report is not own:
            write_report(directory, report, (model.config.save_identity or {}).get("id"))
        card = fetch_text(repo_id, CARD_NAME, revision, token)
        facts = write_companions(model, directory, repo_id, options or CardOptions(), card, report)
        message = commit_message or f"Upload {facts.role}{' model' if facts.role == 'composed' else ''}"
        about = {"commit_message": message, "revision": revision, "delete_patterns": STALE, **upload_options}
        commit: CommitInfo = api.upload_folder(repo_id=repo_id, folder_path=directory, **about)
    return commit


def settled_report(report: dict[str, Any] | None, before: str | None) -> dict[str, Any] | None:
    """Returns the report pushed `before` if the new one differs in times only, so that a second push has no commit."""
    try:
        old = bare_report(json.loads(before)) if before else None
    except (AttributeError, ValueError):
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
        # The client lets errors of its HTTP library through, and raises a bare RuntimeError of its own.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_clients = type(error) is RuntimeError and frame.f_globals["__name__"].startswith("huggingface_hub.")
        if not is_clients and not type(error).__module__.startswith("httpx"):
            raise
        message = f"The push to {repo_id!r} failed because the connection broke ({error}). Push again to resume it."
        raise OSError(message) from error


def fetch_text(repo_id: str, name: str, revision: str | None, token: bool | str | None) -> str | None:
    """Reads a text file of a repository, past the cache; `None` if there is none, `OSError` if the Hub is down."""
    try:
        with scratch_directory() as directory:
            path = hf_hub_download(repo_id, name, revision=revision, token=token, local_dir=directory)
            return Path(path).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def repository_name(labels: Sequence[str]) -> str:
    """Joins label names into ASCII letters, digits and dashes; labels without these and long names get a hash."""
    plain = [unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode() for label in labels]
    parts = [re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") for text in plain]
    name = "-".join(part or _hash(label) for part, label in zip(parts, labels, strict=True))
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH].rstrip('-')}-{_hash(*labels)}"


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def module_repositories(namespace: str, parent: str, modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Names the repositories of modules by their label names; two equal ones, or one like the parent's, are refused."""
    names = {key: repository_name(labels) for key, labels in modules.items()}
    for (one, name), (other, taken) in combinations([("the parent", parent), *names.items()], 2):
        if name == taken:
            raise ValueError(
                f"Got the modules {one!r} and {other!r}, whose repositories would both be {namespace}/{name}; "
                "expected different ones. Push one by itself with another name: module.push_to_hub(...)."
            )
    return {key: f"{namespace}/{name}" for key, name in names.items()}


def push_modules(
    parent: NeMoPreTrainedModel, modules: Mapping[str, Sequence[LabelLike]], namespace: str, name: str,
    batches: Iterable[Mapping[str, Any]] | None = None, calibration: Iterable[Mapping[str, Any]] | None = None,
    options: CardOptions | None = None, threshold: float | None = None, round_to: int | None = None,
    compares_formats: bool = False, private: bool | None = None,
    cut: Callable[[Sequence[LabelLike]], NeMoPreTrainedModel] | None = None, **push_options: Any,
) -> dict[str, str]:  # fmt: skip
    """Pushes a parent and modules of it, one repository each, and ties them in a collection.

    `modules` maps the caller's name of each to labels or groups. They are cut by relevance, or as `cut` does, measured
    on `batches` of held-out data, and their rejection is calibrated on `calibration`, validation data. A call that
    failed half-way can be repeated.
    Returns the repository of the `"parent"` and of each module by name, and the address of the `"collection"`.
    """
    names = parent.config.names
    label_ids = {key: make_plan(parent, labels, threshold, round_to).label_ids for key, labels in modules.items()}
    repositories = module_repositories(namespace, name, {k: [names[i] for i in ids] for k, ids in label_ids.items()})
    options = options or CardOptions()
    done = {"parent": f"{namespace}/{name}"}
    push_model(parent, done["parent"], options, private=private, **push_options)
    for key, labels in modules.items():
        module = cut(labels) if cut else extract_module(parent, labels, threshold, round_to)
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
        found = [each for each in api.list_collections(owner=namespace) if each.title == title]
        collection = found[0] if found else api.create_collection(title, **options)  # type: ignore[arg-type]
        present = {item.item_id for item in api.get_collection(collection.slug).items}
        for repository in repositories:
            if repository not in present:
                api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    return str(collection.url)
