"""Model cards of parents, modules and composed models, rendered from plain data."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

LIBRARY_NAME = "nemo-hf"
KEPT_BELOW = "<!-- nemo-hf writes all above this line anew; text below it stays -->"  # by the repository's owner
PARENT_NAME = "its parent, answering with the same labels only"
CONTROL_NAMES = {
    "random": "control: as many random neurons",
    "other": "control: the neurons of as many other label groups",
    "empty": "control: no neurons",
}
FORMAT_NAMES = {
    "module": "this module",
    "parent": "the parent without masks",
    "plain": "this module as a plain model (`save_plain`)",
    "onnx": "this module in onnxruntime (`export_onnx`)",
}
TASKS = {  # Auto class and an example of an input
    "image-classification": ("AutoModelForImageClassification", "picture.png"),
    "text-classification": ("AutoModelForSequenceClassification", "What does it say?"),
    "audio-classification": ("AutoModelForAudioClassification", "sound.wav"),
}
UNSHOWN_METRICS = re.compile("epoch|.*(runtime|per_second).*")


@dataclass(frozen=True)
class CardFacts:
    """What a card says, as plain data for JSON. Names of labels and repositories may have any characters."""

    repo_id: str
    task: str  # of a pipeline, such as "image-classification"
    role: str  # "parent", "module" or "composed"
    base_class: str  # of the plain model inside; of a composed model those of its modules, joined by commas
    labels: Sequence[str]  # names in the order of the outputs
    parameters: int  # without mask generators
    megabytes: float  # of these parameters, in 10^6 bytes
    label_ids: Sequence[int] = ()  # module: the parent's id of each label
    generator_parameters: int = 0
    groups: Sequence[Mapping[str, Any]] = ()  # parent: `name` and `labels` (names); empty if each label is its own
    parts: Sequence[Mapping[str, Any]] = ()  # composed: the facts of each module, with `scale` and `bias`
    several_labels: bool = False  # whether a sample may have several labels
    parent: str | None = None  # module: repository of its parent
    base_model: str | None = None  # parent: repository of the model that its training started from
    license: str | None = None
    datasets: Sequence[str] = ()  # Hub data sets that it was trained and measured on
    measured_on: str | None = None  # Hub data set of the report
    split: str | None = None  # of `measured_on`
    tags: Sequence[str] = ()
    retained_neurons: float | None = None  # module: kept share of the parent's neurons
    threshold: float | None = None  # module: relevance threshold that it was cut with
    round_to: int | None = None  # module: widths were filled up to multiples of it
    equivalence: Mapping[str, Any] | None = None  # result of the equivalence check
    rejection: Mapping[str, Any] | None = None  # module: what `calibrate_rejection` found
    is_tuned: bool = False  # module: whether it was trained further since it was cut
    report: Mapping[str, Any] | None = None  # module: of `ModuleReport.to_dict`; otherwise `metrics` by name
    training: Mapping[str, Any] | None = None  # of `provenance.training_record`
    nemo_config: Mapping[str, Any] = field(default_factory=dict)  # options that are not the defaults
    versions: Mapping[str, str] = field(default_factory=dict)  # by package, where the card was written
    picture: str | None = None  # name of the file in the repository


def render_model_card(facts: CardFacts) -> str:
    """Renders a card: Markdown with a YAML header, whose last line is `KEPT_BELOW`."""
    report = facts.report or {}
    accuracies = {"this module": report.get("accuracy"), PARENT_NAME: report.get("parent_restricted_accuracy")}
    accuracies |= {title: (report.get("controls") or {}).get(name) for name, title in CONTROL_NAMES.items()}
    rendered = ENVIRONMENT.get_template("model_card.md.jinja").render(
        card=facts,
        report=report,
        metadata=_metadata(facts).to_yaml(),
        metrics=_metrics(report),
        parent_metrics=_metrics({"metrics": report.get("parent_metrics")}),
        accuracies={name: value for name, value in accuracies.items() if value is not None},
        latency=_latency(report),
        task=TASKS[facts.task],
        command=extraction_command(facts),
        fence=_fence(facts),
        kept_below=KEPT_BELOW,
    )
    return re.sub(r"\n{3,}", "\n\n", rendered).rstrip("\n") + "\n"


def own_text(card: str) -> str:
    """Returns what an owner wrote: all below the line that says so, or the whole text of a card that lacks it."""
    if KEPT_BELOW in card:
        return card.partition(KEPT_BELOW)[2].strip("\n")
    return re.sub(r"\A---\n.*?\n---\n", "", card.replace("\r\n", "\n"), flags=re.DOTALL).strip("\n")


def license_of(card: str) -> str | None:
    """Returns the license that a card's header names, if any."""
    try:
        found = ModelCard(card).data.get("license")
    except Exception:  # a header that is no YAML names none
        return None
    return found if isinstance(found, str) else None


def extraction_command(facts: CardFacts) -> str | None:
    """The command line that cuts a module; labels that a shell can't take are given by id."""
    if facts.role != "module":
        return None
    labels = [
        name if name.isprintable() and name.strip() and not name.startswith("-") else str(place)
        for name, place in zip(facts.labels, facts.label_ids or facts.labels, strict=True)
    ]
    words = ["nemo-hf", "extract", "--parent", facts.parent or "PARENT", "--labels", *labels]
    words += [] if facts.threshold is None else ["--threshold", str(facts.threshold)]
    words += [] if facts.round_to is None else ["--round-to", str(facts.round_to)]
    return shlex.join([*words, "--output-dir", facts.repo_id.split("/")[-1]])


def _fence(facts: CardFacts) -> str:
    """Backticks around code: more than there are in any name."""
    runs = re.findall("`+", "\0".join([*facts.labels, facts.repo_id, str(facts.training)]))
    return "`" * max([3, *(len(run) + 1 for run in runs)])


def _metadata(facts: CardFacts) -> ModelCardData:
    report, results = facts.report or {}, None
    accuracy = report.get("accuracy", _metrics(report).get("eval_accuracy"))
    if facts.measured_on and accuracy is not None:
        name = "accuracy" if facts.is_tuned or facts.role != "module" else "accuracy without fine-tuning"
        about: dict[str, Any] = {"metric_name": name, "dataset_split": facts.split}
        results = [EvalResult(facts.task, facts.measured_on, facts.measured_on, "accuracy", accuracy, **about)]
    parents = list(dict.fromkeys(part["parent"] for part in facts.parts if part["parent"])) or None
    return ModelCardData(
        library_name=LIBRARY_NAME,
        tags=list(dict.fromkeys([LIBRARY_NAME, facts.role, *facts.tags])),
        pipeline_tag=facts.task,
        base_model={"module": facts.parent, "parent": facts.base_model, "composed": parents}[facts.role],
        license=facts.license,
        datasets=list(facts.datasets) or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results,
    )


def _metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Numbers among the metrics of a report, without those of speed."""
    found = report.get("metrics") or {}
    return {n: v for n, v in found.items() if isinstance(v, (int, float)) and not UNSHOWN_METRICS.fullmatch(n)}


def _latency(report: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds by what was timed and batch size, of the comparison of formats if there is one, and a note."""
    own = {"module": report.get("latency_ms"), "parent": report.get("parent_latency_ms")}
    found = [{"latency_ms": {}, **(report.get("formats") or {})}, {"device": "", **report, "latency_ms": own}]
    chosen = next((each for each in found if any(each["latency_ms"].values())), found[1])
    rows = {title: chosen["latency_ms"][n] for n, title in FORMAT_NAMES.items() if chosen["latency_ms"].get(n)}
    sizes = sorted({size for by_size in rows.values() for size in by_size}, key=lambda size: (len(size), size))
    return {"device": chosen["device"], "sizes": sizes, "rows": rows, "note": chosen.get("latency_note")}


def _escaped(text: str) -> str:
    """Keeps a label of any characters on one line and out of Markdown's syntax."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty name)"
    return re.sub(r"(?<![A-Za-z0-9])[-+.]|[-+.](?![A-Za-z0-9])|[\\`*_{}\[\]<>()#!|~&:]", r"\\\g<0>", line)


ENVIRONMENT = Environment(
    loader=PackageLoader("nemo_hf.hub"),
    undefined=StrictUndefined,
    autoescape=False,  # noqa: S701 - Markdown, with `_escaped` around names
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"escaped": _escaped, "repr": repr}
