"""Model cards of parents, modules and composed models, rendered from plain data."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nemo_hf.models.privacy import clean, is_repository

from .markdown import ENVIRONMENT, Markdown, call_arguments, code_blocks, one_line

LIBRARY_NAME = "nemo-hf"
KEPT_BELOW = "<!-- nemo-hf writes all above this line anew; text below it stays -->"  # by the repository's owner
MEASURED_NAMES = {
    "module": Markdown("this module"),
    "parent": Markdown("its parent, answering with the same labels only"),
    "random": Markdown("control: as many random neurons"),
    "other": Markdown("control: the neurons of as many other label groups"),
    "empty": Markdown("control: no neurons"),
}
FORMAT_NAMES = {
    "module": Markdown("this module"),
    "parent": Markdown("the parent without masks"),
    "plain": Markdown("this module as a plain model (`save_plain`)"),
    "onnx": Markdown("this module in onnxruntime (`export_onnx`)"),
}
TASKS = {  # Auto class and an example of an input
    "image-classification": ("AutoModelForImageClassification", "picture.png"),
    "text-classification": ("AutoModelForSequenceClassification", "What does it say?"),
    "audio-classification": ("AutoModelForAudioClassification", "sound.wav"),
    "token-classification": ("AutoModelForTokenClassification", "Who said it, and where?"),
    "image-segmentation": ("AutoModelForSemanticSegmentation", "picture.png"),
    "object-detection": ("AutoModelForObjectDetection", "picture.png"),
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
    needs_samples: bool = False  # parent: whether its modules are left to reconstruction
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
    extraction: Mapping[str, Any] | None = None  # module: how it was cut on calibration samples
    rejection: Mapping[str, Any] | None = None  # module: what `calibrate_rejection` found
    rejected_label: str | None = None  # module: name of the output that stands for none of its labels
    is_tuned: bool = False  # module: whether it was trained further since it was cut
    report: Mapping[str, Any] | None = None  # module: of `ModuleReport.to_dict`; otherwise `metrics` by name
    training: Mapping[str, Any] | None = None  # of `provenance.training_record`
    nemo_config: Mapping[str, Any] = field(default_factory=dict)  # options that are not the defaults
    versions: Mapping[str, str] = field(default_factory=dict)  # by package, where the card was written
    picture: str | None = None  # name of the file in the repository
    page: str | None = None  # likewise, of the page of `nemo-hf report`


def render_model_card(facts: CardFacts) -> str:
    """Renders a card: Markdown with a YAML header, whose last line is `KEPT_BELOW`; paths and tokens are replaced."""
    facts = CardFacts(**{name: clean(value, name, name == "nemo_config") for name, value in vars(facts).items()})
    report = facts.report or {}
    accuracies = {"module": report.get("accuracy"), "parent": report.get("parent_restricted_accuracy")}
    accuracies |= report.get("controls") or {}
    latency = _latency(report)
    blocks = _code(facts)
    rendered = ENVIRONMENT.get_template("model_card.md.jinja").render(
        card=facts,
        count=f"{len(facts.labels)} label{'' if len(facts.labels) == 1 else 's'}",
        report=report,
        metadata=Markdown(_metadata(facts).to_yaml()),
        metrics=_metrics(report),
        parent_metrics=_metrics({"metrics": report.get("parent_metrics")}),
        accuracies={title: accuracies[n] for n, title in MEASURED_NAMES.items() if accuracies.get(n) is not None},
        latency=latency,
        rule=Markdown("---|" * len(latency["sizes"])),
        input_shape=Markdown([int(size) for size in report.get("input_shape") or ()]),
        **dict(zip(blocks, code_blocks(blocks.values()), strict=True)),
        kept_below=Markdown(KEPT_BELOW),
    )
    return re.sub(r"\n{3,}", "\n\n", rendered).rstrip("\n") + "\n"


def own_text(card: str) -> str:
    """Returns what an owner wrote: all below the line that says so, or the whole text of a card that lacks it."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if found := re.search(rf"^{re.escape(KEPT_BELOW)}$", card, re.MULTILINE):
        return card[found.end() :].strip("\n")
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip("\n")


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
    done = facts.extraction
    words = ["nemo-hf", "cut", facts.parent or ("MODEL" if done else "PARENT"), "--labels", *labels]
    words += _sample_options(done, facts.datasets) if done else []
    words += [] if facts.threshold is None else ["--threshold", str(facts.threshold)]
    words += [] if facts.round_to is None else ["--round-to", str(facts.round_to)]
    return shlex.join([*words, "--output-dir", facts.repo_id.split("/")[-1]])


def _sample_options(done: Mapping[str, Any], datasets: Sequence[str]) -> list[str]:
    """Options of `nemo-hf cut` that cut on samples as a module was cut."""
    vocabulary = done.get("vocabulary") or {}
    share = done.get("retention") or done.get("weights") or 0.2  # the latter where a loss was asked for
    options = {"dataset": next(iter(datasets), "DATA"), "retention": f"{share:.4g}", "scores": str(done.get("scores"))}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    words += [] if "distance" in done else ["--no-reconstruct"]
    words += ["--drop-parts", str(len(done["dropped"]))] if done.get("dropped") else []
    words += ["--stream", f"{done['stream']['share']:.4g}"] if done.get("stream") else []
    kind = "shared" if "token_rows" in vocabulary else "calibration"
    words += ["--vocabulary", kind] if "tokens" in vocabulary else []
    words += ["--max-positions", str(vocabulary["positions"])] if "positions" in vocabulary else []
    return words + (["--refine-epochs", str(done["refine_epochs"])] if done.get("refine_epochs") else [])


def _code(facts: CardFacts) -> dict[str, tuple[str, str]]:
    """Languages and lines of the blocks of code, by the template's names."""
    (auto_class, sample), repo = TASKS[facts.task], repr(facts.repo_id)
    also = f"{auto_class}, " if facts.role == "parent" else ""
    lines = ["import nemo_hf  # registers the classes", f"from transformers import {also}pipeline", ""]
    lines += [f"classify = pipeline({facts.task!r}, model={repo})", f"print(classify({sample!r}))"]
    if facts.role == "parent":
        lines += ["", f"labels = {list(facts.labels)[:2]!r}  # cut a module while loading"]
        lines += ["samples = [...]  # some hundred inputs with these labels"] if facts.needs_samples else []
        given = "labels=labels, calibration=samples" if facts.needs_samples else "labels=labels"
        lines += [f"module = {auto_class}.from_pretrained({repo}, {given})"]
    blocks = {"use": ("python", "\n".join(lines))}
    if command := extraction_command(facts):
        blocks["command"] = ("bash", command)
    if facts.training:
        base = repr(facts.base_model) if facts.base_model else "..."
        lines = ["NeMoTrainer(", f"    model={auto_class}.from_pretrained({base}, ...),"]
        lines += [f'    args=TrainingArguments("out", {call_arguments(facts.training["arguments"])}),']
        lines += [f"    nemo_config=NeMoConfig({call_arguments(facts.nemo_config)}), ...)"]
        blocks["training_code"] = ("python", "\n".join(lines))
        if typed := one_line(facts.training.get("command") or "").replace(KEPT_BELOW, ""):
            blocks["training_command"] = ("bash", typed)
    return blocks


def _metadata(facts: CardFacts) -> ModelCardData:
    report, results = facts.report or {}, None
    accuracy = report.get("accuracy", _metrics(report).get("eval_accuracy"))
    if facts.measured_on and accuracy is not None:
        name = "accuracy" if facts.is_tuned or facts.role != "module" else "accuracy without fine-tuning"
        about: dict[str, Any] = {"metric_name": name, "dataset_split": facts.split and one_line(facts.split)}
        results = [EvalResult(facts.task, facts.measured_on, facts.measured_on, "accuracy", accuracy, **about)]
    origins = {"module": [facts.parent], "parent": [facts.base_model], "composed": [p["parent"] for p in facts.parts]}
    bases = _repositories(origins[facts.role])
    return ModelCardData(
        library_name=LIBRARY_NAME,
        tags=list(dict.fromkeys([LIBRARY_NAME, facts.role, *map(one_line, facts.tags)])),
        pipeline_tag=facts.task,
        base_model=(bases if facts.role == "composed" else next(iter(bases), None)) or None,
        license=facts.license and one_line(facts.license),
        datasets=_repositories(facts.datasets) or None,
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results,
    )


def _repositories(names: Iterable[str | None]) -> list[str]:
    """Names that can be those of repositories, each once: the Hub refuses headers with others."""
    return [name for name in dict.fromkeys(names) if name and is_repository(name)]


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
