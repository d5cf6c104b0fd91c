"""One self-contained page about a parent, module or plain model: what it is worth, how it is built, and what to cut."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike
from nemo_hf.evaluation.controls import cut_beside_controls, measure_answers
from nemo_hf.evaluation.report import evaluate_module, may_come_from
from nemo_hf.models.atomic_writes import write_text
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.composed_model import NeMoComposedModel
from nemo_hf.models.privacy import clean

from .markdown import one_line
from .page_charts import accuracy_chart, rejection_chart
from .page_facts import Measured, chosen_labels, page_facts, shown_source
from .page_texts import (
    KINDS,
    curve_rows,
    headline,
    key_figures,
    latency_rows,
    measured_on,
    rejection_rows,
    size_text,
    unknown,
)
from .provenance import versions

PAGE_NAME = "report.html"
RETENTIONS = (0.4, 0.2, 0.1)
CUT_SAMPLES = 500  # most samples of the labels that the page's modules and controls are cut on
LONGEST_NAME = 80  # letters of a name that are shown


def write_report_page(
    model: PreTrainedModel,
    path: str | Path,
    *,
    origin: PreTrainedModel | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    calibration: Any = None,
    labels: LabelLike | Sequence[LabelLike] | None = None,
    retentions: float | Sequence[float] | None = None,
    processing_class: Any = None,
    seed: int = 0,
    show_progress: bool = True,
    words: Mapping[str, Any] | None = None,
) -> None:
    """Writes a self-contained HTML page about a parent, a module or a plain classifier.

    It shows neurons by layer and label group, their overlap, accuracy over size beside controls, mistakes, errors of
    reconstruction, rejection and latency, as far as the model holds them or `batches` measure them, and lets a reader
    choose labels: it then says how large a module of them is, and the command that cuts it. It needs no network.

    Args:
        model: A parent, a module, or a plain classifier of `transformers`.
        path: File to write, whole or not at all.
        origin: Of a module: the parent or plain model that it was cut from.
        batches: Batches of model inputs with `labels`, label ids of the model that modules are cut from, of held-out
            data, which can be run through more than once. A module carries the measured report from then on.
        calibration: Samples to cut modules on at several sizes, as in `extract_module`, beside controls.
        labels: Labels or groups of these modules; `None` takes the first group of several labels, or the first labels:
            a tenth of them, from 5 to 16. Modules beside a module always have its labels.
        retentions: Shares of the weights that these modules keep, or one of them; `None` means 0.4, 0.2 and 0.1.
        processing_class: As in `extract_module`.
        seed: Of the controls.
        show_progress: Whether to show a progress bar.
        words: How commands on the page name things: `model` and `origin` (directory or Hub repository), `title`,
            `cut`, a list of words for `nemo-hf cut`, by which it finds samples, and the data's `dataset` and `split`.

    Raises:
        TypeError: If `model` is joined from modules, or no model, or data can be read only once.
        ValueError: If something doesn't fit: labels or data without them, samples without a model to cut, a module of
            another model, or labels or retentions where nothing is cut for them.
        IsADirectoryError: If `path` is a directory.
    """
    check_page(model, path, origin, calibration, batches, labels, retentions)
    module = model if isinstance(model, NeMoPreTrainedModel) and not model.is_parent else None
    source = model if module is None else origin
    about = {"batches": batches, "calibration": calibration, "labels": labels, "retentions": retentions}
    given = {"dataset": None, "split": None, **(words or {})}
    given["dataset"] = given["dataset"] and shown_source(str(given["dataset"]))[0]
    measured = measure_page(
        module, source, **about, processing_class=processing_class, seed=seed,
        show_progress=show_progress,
        about={"dataset": given["dataset"], "split": given["split"], "seed": seed if batches is not None else None},
    )  # fmt: skip
    write_page(page_facts(model, source, measured, page_words(model, source, given)), path)


def write_page(facts: Mapping[str, Any], path: str | Path) -> None:
    """Writes the page of some facts, whole or not at all."""
    check_file(path)
    write_text(path, render_page(facts))


def check_file(path: str | Path) -> None:
    """Refuses a directory in place of the page's file."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"Got {str(path)!r}, which is a directory; expected a file. Name one.")


def check_page(
    model: Any, path: str | Path, origin: Any = None, calibration: Any = None, batches: Any = None, labels: Any = None,
    retentions: Any = None,
) -> None:  # fmt: skip
    """Refuses what there can be no page of, before anything is measured."""
    if isinstance(model, NeMoComposedModel) or not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Got a {type(model).__name__}; expected a parent, a module or a plain classifier. Write a page for each "
            "of its modules."
        )
    check_file(path)
    module = model if isinstance(model, NeMoPreTrainedModel) and not model.is_parent else None
    if origin is not None:
        _check_origin(module, origin)
    if labels is not None and module is not None:
        raise ValueError("Got labels for the page of a module; expected none: it is about its own. Leave them out.")
    if (labels is not None or retentions is not None) and calibration is None:
        got = "retentions" if labels is None else "labels"
        raise ValueError(f"Got {got} without samples to cut on; expected both. Pass calibration=, or leave {got} out.")
    _check_data(module is not None, origin, calibration, batches)


def _check_origin(module: NeMoPreTrainedModel | None, origin: Any) -> None:
    if module is None:
        raise ValueError("Got an origin of a model that is no module; expected none. Leave it out.")
    if not isinstance(origin, PreTrainedModel) or not may_come_from(module, origin):
        raise ValueError(
            f"Got an origin of another class or other labels than the module, a {module.config.base_class} with "
            f"{list(module.config.names.values())}; expected the model that it was cut from. Pass that one."
        )


def _check_data(is_module: bool, origin: Any, calibration: Any, batches: Any) -> None:
    for name, data in (("calibration", calibration), ("batches", batches)):
        if isinstance(data, Iterator):
            raise TypeError(
                f"Got {name} that can be read only once, a {type(data).__name__}; expected data to run through several "
                f"times. Pass a DataLoader or a list, such as list({name})."
            )
    if calibration is not None and is_module and origin is None:
        raise ValueError(
            "Got samples to cut on and a module without origin; expected the model that it was cut from. Pass origin=."
        )
    if (calibration is not None and batches is None) or (batches is not None and calibration is None and not is_module):
        got = "samples to cut on without labelled batches" if batches is None else "labelled batches and no module"
        raise ValueError(f"Got {got}; expected both calibration and batches, or none of them. Pass the other, too.")


def page_words(model: PreTrainedModel, origin: PreTrainedModel | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What commands and the title call things; folders of this machine are left out."""
    own = str(given.get("model") or getattr(model, "name_or_path", "") or "MODEL")
    asked = [own, own if origin in (None, model) else str(given.get("origin") or "SOURCE")]
    asked += list(given.get("cut") or ["--dataset", "DATA"])
    (place, source, *cut), are_short = zip(*map(shown_source, asked), strict=True)
    parts = ["Folders above are left out of paths: run it where these names lie."] if any(are_short) else []
    return {"title": given.get("title") or place, "origin": source, "cut": cut, "note": " ".join(parts)}


def measure_page(
    module: NeMoPreTrainedModel | None,
    origin: PreTrainedModel | None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    calibration: Any = None,
    labels: LabelLike | Sequence[LabelLike] | None = None,
    retentions: float | Sequence[float] | None = None,
    processing_class: Any = None,
    seed: int = 0,
    show_progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Measured:
    """Cuts modules if there are samples, and measures them, or the given one, if there are labelled batches."""
    if batches is None:
        return Measured(module)
    cuts: list[dict[str, NeMoPreTrainedModel]] = []
    if origin is not None and calibration is not None:
        ids = list(module.config.label_ids or ()) if module is not None else chosen_labels(origin, labels)
        options = {"processing_class": processing_class, "max_samples": CUT_SAMPLES, "show_progress": show_progress}
        asked = RETENTIONS if retentions is None else retentions
        shares = sorted(asked, reverse=True) if isinstance(asked, Iterable) else [asked]
        cuts = cut_beside_controls(origin, ids, calibration, shares, seed, **options)
        samples = [(each.config.extraction or {})["samples"] for found in cuts for each in found.values()]
        own = {"cut_samples": sorted({min(samples), max(samples)}), "is_example": module is None and labels is None}
        about = {**(about or {}), **own}
    kept_at = None
    if module is None and cuts:
        kept_at = len(cuts) // 2
        module = cuts[kept_at]["accuracy"]
    if module is None:
        return Measured()
    if origin is not None:
        evaluate_module(origin, list(module.config.label_ids or ()), batches, module, show_progress=show_progress)
    others = {f"{place} {kind}": each.model for place, found in enumerate(cuts) for kind, each in found.items()}
    answers = measure_answers(module, others, tqdm(batches, desc="Answers", leave=False, disable=not show_progress))
    restricted = (module.report or {}).get("parent_restricted_accuracy")
    points = [_point(place, found, answers.accuracies, restricted) for place, found in enumerate(cuts)]
    return Measured(module, answers, points, kept_at, about or {}, is_reported=origin is not None)


def _point(
    place: int, found: Mapping[str, NeMoPreTrainedModel], accuracies: Mapping[str, float], restricted: float | None
) -> dict[str, Any]:
    done = found["accuracy"].config.extraction or {}
    by_kind = {kind: accuracies[f"{place} {kind}"] for kind in found}
    return {"retention": done["retention"], "megabytes": done["bytes"] / 1e6, "restricted": restricted, **by_kind}


def render_page(facts: Mapping[str, Any]) -> str:
    """Renders a page; paths and tokens are replaced, and what is no markup of the template is escaped."""
    picker, rest = facts["picker"], {name: value for name, value in facts.items() if name != "picker"}
    own: dict[str, Any] = clean(rest)
    style, script = (_source(f"report.{kind}.jinja") for kind in ("css", "js"))
    curve = curve_rows(own)
    found: dict[str, Any] = {
        "facts": own,
        "picker": picker,
        "data": Markup(embedded(picker)) if picker else None,  # noqa: S704 - escaped for a script element
        "kinds": KINDS,
        "shown_kinds": [kind for kind in KINDS if any(row.get(kind) is not None for row in curve)],
        "headline": headline(own),
        "figures": key_figures(own),
        "unknown": unknown(own, picker is not None),
        "curve": curve,
        "samples": own["samples"] or measured_on(own),
        "accuracy": accuracy_chart(curve, KINDS),
        "rejection": rejection_chart(own["rejection"]) if own["rejection"] else None,
        "rejection_rows": rejection_rows(own["rejection"]) if own["rejection"] else None,
        "latency": latency_rows(own["report"]),
    }
    given = {"style": style, "script": script, "style_hash": _digest(style), "script_hash": _digest(script)}
    found["sections"] = _sections(found)
    return _ENVIRONMENT.get_template("report.html.jinja").render(**found, **given, versions=versions())


def _sections(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ids and titles of the sections that the page has."""
    facts = found["facts"]
    has = {
        ("accuracy", "Accuracy"): found["curve"],
        ("picker", "Choose labels"): found["picker"],
        ("neurons", "Neurons"): facts["neurons"],
        ("overlap", "Overlap"): facts["overlap"],
        ("mistakes", "Mistakes"): facts["confusion"],
        ("rejection", "Other inputs"): facts["rejection"],
        ("errors", "Reconstruction"): facts["module"] and facts["module"]["layers"],
        ("latency", "Latency"): found["latency"],
        ("unknown", "Not measured"): found["unknown"],
    }
    return [section for section, value in has.items() if value]


def embedded(data: Any) -> str:
    """JSON that stays data inside of a script element, whatever its texts are."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _source(name: str) -> Markup:
    """A template's text as it is: style or script."""
    return Markup(_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0].strip())  # type: ignore[union-attr]  # noqa: S704


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printed(value: Any) -> Any:
    """Texts on one line, without characters that don't print or turn the direction of what follows."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _short(text: Any) -> str:
    line = one_line(text) or "(no name)"
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


def _coded(text: str) -> Markup:
    """Marks the options of commands in a sentence of this file as code."""
    return Markup(re.sub(r"--[a-z-]+( [A-Z]+)?|nemo-hf \w+", r"<code>\g<0></code>", str(escape(text))))  # noqa: S704


def _breakable(name: str) -> Markup:
    """A name or a path of layers, which may end a line behind each point, dash, slash and underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/-])(?=.)", one_line(name)))


def _percent(share: Any) -> str:
    return "-" if share is None else f"{share:.1%}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("nemo_hf.hub"), undefined=StrictUndefined, autoescape=True, finalize=_printed,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_ENVIRONMENT.filters |= {
    "percent": _percent,
    "number": lambda value: f"{value:,}",
    "digits": lambda value, form: "-" if value is None else format(value, form),
    "short": _short,
    "size": size_text,
    "breakable": _breakable,
    "coded": _coded,
    "largest": lambda row: max(row[1:]),
    "level": lambda share: round(10 * min(1.0, max(0.0, share))),
}
