"""Model cards, rendered from what is handed in: no number is looked up or made up here."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

LIBRARY_NAME = "nemo-hf"
CONTROL_NAMES = {
    "random": "control: random neurons, as many",
    "other": "control: another group's neurons",
    "empty": "control: no neurons",
}


def render_model_card(
    repo_id: str,
    task: str,
    role: str,
    labels: Sequence[str],
    base_class: str,
    parameters: int,
    report: Mapping[str, Any] | None = None,
    parent: str | None = None,
) -> str:
    """Renders the card of a parent or a module.

    Args:
        repo_id: Repository that the card is for, as the usage snippet names it.
        task: Task of a pipeline, such as `"image-classification"`.
        role: `"parent"` or `"module"`.
        labels: Label names in the order of the outputs.
        base_class: Class of the plain model inside.
        parameters: Number of parameters, without mask generators.
        report: A module's report as `ModuleReport.to_dict` gives it, or `None`.
        parent: Repository of the parent, or `None`.

    Returns:
        Markdown with a YAML header. Label names may hold any characters.
    """
    metadata: dict[str, Any] = {"library_name": LIBRARY_NAME, "tags": [LIBRARY_NAME, role], "pipeline_tag": task}
    if parent:
        metadata["base_model"] = parent
    facts = [("Plain model inside", f"`{base_class}`"), ("Labels", len(labels)), ("Parameters", f"{parameters:,}")]
    results: list[tuple[str, str]] = []
    if report:
        facts += [
            ("Megabytes", f"{report['megabytes']:.2f} (parent: {report['parent_megabytes']:.2f})"),
            ("Neurons kept", f"{report['neuron_retention_rate']:.1%}"),
            ("Weights kept", f"{report['weight_retention_rate']:.1%}"),
            ("Milliseconds by batch size", f"{_times(report['latency_ms'])} on {report['device']}"),
            ("Milliseconds of the parent", f"{_times(report['parent_latency_ms'])} on {report['device']}"),
        ]
        results = [
            ("this module", f"{report['accuracy']:.4f}"),
            ("its parent, restricted to the labels", f"{report['parent_restricted_accuracy']:.4f}"),
            *(
                (name, f"{report['controls'][key]:.4f}")
                for key, name in CONTROL_NAMES.items()
                if report["controls"].get(key) is not None
            ),
        ]
    summary = (
        f"A stand-alone classifier of {len(labels)} labels, cut out of a modular parent without retraining."
        if role == "module"
        else f"A classifier of {len(labels)} labels whose neurons are masked by label: it comes apart into modules."
    )
    template = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=False).from_string(  # noqa: S701
        files("nemo_hf").joinpath("templates/model_card.md.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        metadata=ModelCardData(**metadata).to_yaml(),
        title=_escaped(repo_id),
        summary=summary,
        facts=facts,
        labels=[_escaped(label) for label in labels],
        results=results,
        samples=report["samples"] if report else 0,
        task=task,
        repo_id=repo_id,
    )


def _times(latency: Mapping[str, float]) -> str:
    return ", ".join(f"{size}: {milliseconds:.1f}" for size, milliseconds in latency.items())


def _escaped(text: str) -> str:
    """Keeps a label of any characters on one line and out of Markdown's syntax."""
    line = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>()#+-.!|~" else character for character in line)
