"""Model cards, rendered from what is handed in: no number is looked up or made up here."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

LIBRARY_NAME = "nemo-hf"
KEPT_BELOW = "<!-- nemo-hf writes all above this line anew; text below it stays -->"
"""Line of a card under which a repository's owner can write."""
CONTROL_NAMES = {
    "random": "control: random neurons, as many",
    "other": "control: the neurons of as many other groups",
    "empty": "control: no neurons",
}
FORMAT_NAMES = {
    "module": "this module",
    "parent": "the plain model in its parent",
    "plain": "this module as a plain model (`save_plain`)",
    "onnx": "this module in onnxruntime (`export_onnx`)",
}
AUTO_NAMES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
EXAMPLE_INPUTS = {
    "image-classification": "picture.png",
    "text-classification": "What does it say?",
    "audio-classification": "sound.wav",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says; everything is plain data, for JSON.

    Args:
        repo_id: Repository that the card is for.
        task: Task of a pipeline, such as `"image-classification"`.
        role: `"parent"` or `"module"`.
        base_class: Class of the plain model inside.
        labels: Label names in the order of the outputs, of any characters.
        label_ids: Module: the parent's id of each label.
        parameters: Number of parameters, without mask generators.
        megabytes: 10^6 bytes of these.
        generator_parameters: Number of the mask generators' parameters, 0 for a module.
        groups: Parent: one entry a label group, `name` and `labels` (names), or none if each label is its own.
        several_labels: Whether a sample may have several labels.
        parent: Module: repository or directory of the parent, or `None`.
        base_model: Parent: repository of the model that its training started from, or `None`.
        license: Identifier of the license, or `None`.
        datasets: Hub data sets that it was trained and measured on.
        measured_on: Hub data set that the report is of, or `None`. `split`: its split.
        tags: Further tags.
        retained_neurons: Module: kept share of the parent's neurons.
        threshold: Module: relevance threshold of its plan.
        round_to: Module: what widths were filled up to, or `None`.
        equivalence: Result of the equivalence check's check, or `None`.
        rejection: Module: what `calibrate_rejection` found, or `None`.
        is_tuned: Module: whether it was trained further since it was cut.
        report: Module: what `ModuleReport.to_dict` gives; parent: `metrics` by name; or `None`.
        training: What the trainer recorded of the training: see `provenance.training_record`; or `None`.
        nemo_config: Options of `NeMoConfig` that are not the defaults.
        versions: Version by package, where the card was written.
        picture: Name of the picture file in the repository, or `None`.
    """

    repo_id: str
    task: str
    role: str
    base_class: str
    labels: Sequence[str]
    parameters: int
    megabytes: float
    label_ids: Sequence[int] = ()
    generator_parameters: int = 0
    groups: Sequence[Mapping[str, Any]] = ()
    several_labels: bool = False
    parent: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    measured_on: str | None = None
    split: str | None = None
    tags: Sequence[str] = ()
    retained_neurons: float | None = None
    threshold: float | None = None
    round_to: int | None = None
    equivalence: Mapping[str, Any] | None = None
    rejection: Mapping[str, Any] | None = None
    is_tuned: bool = False
    report: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    nemo_config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    picture: str | None = None


def render_model_card(facts: CardFacts) -> str:
    """Renders the card of a parent or a module.

    Args:
        facts: What it says.

    Returns:
        Markdown with a YAML header. Its last line is `KEPT_BELOW`.
    """
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(  # noqa: S701
        files("nemo_hf.hub").joinpath("templates/model_card.md.jinja").read_text(encoding="utf-8")
    )
    rendered = template.render(
        card=facts,
        metadata=_metadata(facts).to_yaml(),
        rows=_size_rows(facts),
        results=_result_rows(facts),
        latency=_latency_rows(facts),
        training=_training_code(facts),
        auto_class=AUTO_NAMES[facts.task],
        example=EXAMPLE_INPUTS[facts.task],
        command=extraction_command(facts),
        fence=_fence(facts),
        source=_source(facts),
        versions=_versions(facts),
        kept_below=KEPT_BELOW,
        escaped=_escaped,
        repr=repr,
    )
    return re.sub(r"\n{3,}", "\n\n", rendered).rstrip("\n") + "\n"


def own_text(card: str) -> str:
    """Returns what an owner wrote: all below the line that says so, or the whole text of a card that lacks it."""
    if KEPT_BELOW in card:
        return card.partition(KEPT_BELOW)[2].strip("\n")
    return re.sub(r"\A---\n.*?\n---\n", "", card.replace("\r\n", "\n"), flags=re.DOTALL).strip("\n")


def license_of(card: str) -> str | None:
    """Returns the license that a card's header names, or `None`."""
    try:
        found = ModelCard(card).data.get("license")
    except Exception:  # a header that is no YAML names none
        return None
    return found if isinstance(found, str) else None


def extraction_command(facts: CardFacts) -> str | None:
    """The command line that cuts a module, or `None` for a parent; labels that a shell can't take go by id."""
    if facts.role != "module":
        return None
    ids: list[int | None] = [*facts.label_ids] or [None] * len(facts.labels)
    labels = [name if _is_word(name) or i is None else str(i) for name, i in zip(facts.labels, ids, strict=True)]
    words = ["nemo-hf", "extract", "--parent", facts.parent or "PARENT", "--labels", *labels]
    words += [] if facts.threshold is None else ["--threshold", str(facts.threshold)]
    words += [] if facts.round_to is None else ["--round_to", str(facts.round_to)]
    return shlex.join([*words, "--output_dir", facts.repo_id.split("/")[-1]])


def _is_word(name: str) -> bool:
    return name.isprintable() and bool(name.strip()) and not name.startswith("-")


def _fence(facts: CardFacts) -> str:
    """Backticks around code: more than there are in any name."""
    runs = re.findall("`+", "\0".join([*facts.labels, facts.repo_id, str((facts.training or {}).get("command"))]))
    return "`" * max([3, *(len(run) + 1 for run in runs)])


def _metadata(facts: CardFacts) -> ModelCardData:
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.measured_on,
            dataset_name=facts.measured_on,
            dataset_split=facts.split,
            metric_type="accuracy",
            metric_name=name,
            metric_value=value,
        )
        for name, value in _metrics(facts).items()
        if facts.measured_on
    ]
    return ModelCardData(
        library_name=LIBRARY_NAME,
        tags=list(dict.fromkeys([LIBRARY_NAME, facts.role, *facts.tags])),
        pipeline_tag=facts.task,
        base_model=facts.parent if facts.role == "module" else facts.base_model,
        license=facts.license,
        datasets=list(facts.datasets) or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _metrics(facts: CardFacts) -> dict[str, float]:
    """Accuracies for the model index."""
    report = facts.report or {}
    if facts.role == "module":
        name = "accuracy" if facts.is_tuned else "accuracy without fine-tuning"
        return {name: report["accuracy"]} if "accuracy" in report else {}
    accuracy = (report.get("metrics") or {}).get("eval_accuracy")
    return {} if accuracy is None else {"accuracy": accuracy}


def _size_rows(facts: CardFacts) -> list[tuple[str, str]]:
    generators = f" and {facts.generator_parameters:,} of mask generators" if facts.generator_parameters else ""
    rows = [
        ("Plain model inside", f"`{facts.base_class}`"),
        ("Labels", str(len(facts.labels))),
        ("Parameters", f"{facts.parameters:,}{generators}"),
    ]
    report = facts.report if facts.role == "module" and facts.report else {}
    whole = f" (parent: {report['parent_megabytes']:.2f})" if report else ""
    rows.append(("Megabytes of parameters", f"{facts.megabytes:.2f}{whole}"))
    if facts.retained_neurons is not None:
        rows.append(("Neurons kept", f"{facts.retained_neurons:.1%}"))
    if report:
        rows.append(("Weights kept", f"{report['weight_retention_rate']:.1%}"))
        rows.append(("Multiply-accumulates a sample", f"{report['macs']:,} (parent: {report['parent_macs']:,})"))
    if facts.equivalence:
        rows.append(("Same logits as the parent under the module's mask", _equivalence_text(facts.equivalence)))
    return rows


def _equivalence_text(check: Mapping[str, Any]) -> str:
    made = ", checked on another cut of the parent" if check.get("source") == "parent" else ""
    return f"{check['status']}: largest difference {check['difference']:.1e}, allowed {check['tolerance']:.1e}{made}"


def _result_rows(facts: CardFacts) -> list[tuple[str, str]]:
    report = facts.report
    if not report:
        return []
    if facts.role == "parent":
        kinds = (int, float)
        shown = {name: value for name, value in (report.get("metrics") or {}).items() if isinstance(value, kinds)}
        return [(f"`{name}`", f"{value:.4f}") for name, value in shown.items() if "runtime" not in name]
    rows = [
        ("this module", f"{report['accuracy']:.4f}"),
        ("its parent, restricted to the labels", f"{report['parent_restricted_accuracy']:.4f}"),
    ]
    controls = report["controls"]
    return rows + [(CONTROL_NAMES[n], f"{controls[n]:.4f}") for n in CONTROL_NAMES if controls.get(n) is not None]


def _latency_rows(facts: CardFacts) -> tuple[str, list[str], list[tuple[str, list[str]]]]:
    """Where it was timed, batch sizes, and milliseconds by what was timed."""
    report = facts.report if facts.role == "module" and facts.report else {}
    if not report:
        return "", [], []
    formats = report.get("formats")
    place = formats["device"] if formats else report["device"]
    timed = (
        formats["latency_ms"] if formats else {"module": report["latency_ms"], "parent": report["parent_latency_ms"]}
    )
    named = [(title, timed[name]) for name, title in FORMAT_NAMES.items() if name in timed]
    sizes = list(named[0][1])
    return _escaped(place), sizes, [(title, [f"{by_size[size]:.1f}" for size in sizes]) for title, by_size in named]


def _source(facts: CardFacts) -> str:
    """Where the samples of the report come from, if that is known."""
    if not facts.measured_on:
        return ""
    return f" of {_escaped(facts.measured_on)}" + (f" ({_escaped(facts.split)})" if facts.split else "")


def _versions(facts: CardFacts) -> list[tuple[str, Mapping[str, str]]]:
    trained = (facts.training or {}).get("versions")
    found = [("Trained", trained), ("Written and tried", facts.versions)]
    return [(what, by_package) for what, by_package in found if by_package]


def _training_code(facts: CardFacts) -> str | None:
    """The training as code, from what was recorded of it."""
    if not facts.training:
        return None
    start = repr(facts.base_model) if facts.base_model else "..."
    arguments = ", ".join(f"{name}={value!r}" for name, value in facts.training.get("arguments", {}).items())
    options = ", ".join(f"{name}={value!r}" for name, value in facts.nemo_config.items())
    return (
        f"NeMoTrainer(\n    model={AUTO_NAMES[facts.task]}.from_pretrained({start}, ...),\n"
        f'    args=TrainingArguments("out", {arguments}),\n    nemo_config=NeMoConfig({options}), ...)'
    )


def _escaped(text: str) -> str:
    """Keeps a label of any characters on one line and out of Markdown's syntax."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty name)"
    return re.sub(r"(?<![A-Za-z0-9])[-+.]|[-+.](?![A-Za-z0-9])|[\\`*_{}\[\]<>()#!|~&:]", r"\\\g<0>", line)
