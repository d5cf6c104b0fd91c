"""The public surface: names, signatures and docstrings change on purpose only."""

import importlib
import inspect
import pkgutil
import re

import pytest
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as AutoModelForTexts

import nemo_hf

MASKED = ["static_masks", "static_samples", "output_neuron_masks", "return_dict", "kwargs"]
SIGNATURES = {
    "calibrate_rejection": ["module", "batches", "accepted", "show_progress"],
    "compose": ["modules", "labels", "batches"],
    "compute_relevance": ["parent", "batches", "accelerator", "show_progress"],
    "evaluate_module": [
        *["parent", "labels", "batches", "module", "threshold", "round_to", "seed", "show_progress"],
    ],
    "make_parent": ["model", "nemo_config", "label_groups", "inputs"],
    "nemo_loss": [
        *["logits", "labels", "neuron_masks", "groups", "contrastive_weight", "sparsity_weight", "temperature"],
    ],
    "NeMoConfig": [
        *["targets", "generator_rank", "objective", "contrastive_weight", "coupling_weight", "temperature"],
        *[
            "gather_across_devices",
            "sparsity_weight",
            "retention_target",
            "hard_masks",
            "static_evaluation",
            "detach_pooled",
            "mask_learning_rate",
            "warmup_ratio",
        ],
        *[
            "rehearsal_probability",
            "specificity_weight",
            "relevance_threshold",
            "label_groups",
            "group_column",
            "sites",
        ],
    ],
    "propose_sites": ["model", "inputs"],
    "NeMoConfig.from_dict": ["data"],
    "NeMoConfig.from_json_file": ["path"],
    "NeMoConfig.to_dict": ["self"],
    "NeMoConfig.to_json_file": ["self", "path"],
    "NeMoForAudioClassification": ["config", "base_model"],
    "NeMoForAudioClassification.forward": ["self", "input_values", "input_features", "labels", *MASKED],
    "NeMoForImageClassification": ["config", "base_model"],
    "NeMoForImageClassification.attach_processor": ["self", "processor"],
    "NeMoForImageClassification.detach_masks": ["self"],
    "NeMoForImageClassification.export_onnx": ["self", "directory", "inputs"],
    "NeMoForImageClassification.extract_module": ["self", "labels", "threshold", "round_to", "inputs"],
    "NeMoForImageClassification.forward": ["self", "pixel_values", "labels", *MASKED],
    "NeMoForImageClassification.from_pretrained": [
        *["pretrained_model_name_or_path", "model_args", "labels", "threshold", "round_to", "verify", "kwargs"],
    ],
    "NeMoForImageClassification.save_plain": ["self", "directory", "inputs"],
    "NeMoForImageClassification.save_pretrained": ["self", "save_directory", "with_code", "kwargs"],
    "NeMoForSequenceClassification": ["config", "base_model"],
    "NeMoForSequenceClassification.forward": [
        *["self", "input_ids", "attention_mask", "token_type_ids", "bbox", "labels"],
        *MASKED,
    ],
    "NeMoTrainer": [
        *["model", "args", "data_collator", "train_dataset", "trainer_args", "nemo_config", "relevance_dataset"],
        "trainer_kwargs",
    ],
    "NeMoTrainer.calibrate_rejection": ["self", "module", "eval_dataset", "accepted"],
    "NeMoTrainer.evaluate_modularity": ["self", "eval_dataset"],
    "NeMoTrainer.evaluate_module": ["self", "labels", "eval_dataset", "kwargs"],
    "NeMoTrainer.extract_module": ["self", "labels", "kwargs"],
    "NeMoTrainer.update_relevance": ["self"],
}
FIELDS = {
    "ModuleReport": [
        *["labels", "groups", "accuracy", "parent_restricted_accuracy", "controls", "samples", "parameters"],
        *["parent_parameters", "megabytes", "parent_megabytes", "macs", "parent_macs", "neuron_retention_rate"],
        *["weight_retention_rate", "latency_ms", "parent_latency_ms", "device", "input_shape", "threshold", "seed"],
        "rejection",
    ],
    "NeMoModelConfig": [
        *["base_config", "base_class", "role", "nemo_config", "label_groups", "label_ids", "sites"],
        *[
            "relevance_source",
            "parent",
            "relevance_threshold",
            "round_to",
            "retained_neurons",
            "equivalence",
            "rejection",
        ],
        *["is_tuned", "training", "processor_files"],
    ],
}
ROOMS = [
    importlib.import_module(f"nemo_hf.{room.name}")
    for room in pkgutil.iter_modules(nemo_hf.__path__)
    if room.name != "__main__"
]


def find(name: str):
    found = nemo_hf
    for part in name.split("."):
        found = getattr(found, part)
    return found


def public_members(room):
    """Public functions and classes that a room defines, and the public members of its classes."""
    for name, value in vars(room).items():
        if name.startswith("_") or getattr(value, "__module__", None) != room.__name__:
            continue
        yield name, value
        if inspect.isclass(value):
            for member, found in vars(value).items():
                if not member.startswith("_") and (inspect.isroutine(found) or isinstance(found, property)):
                    yield f"{name}.{member}", getattr(value, member)


def test_the_public_names_are_these():
    assert nemo_hf.__all__ == [
        "EquivalenceError",
        "ModuleReport",
        "NeMoConfig",
        "NeMoForAudioClassification",
        "NeMoForImageClassification",
        "NeMoForSequenceClassification",
        "NeMoModelConfig",
        "NeMoTrainer",
        "UnsupportedArchitectureError",
        "calibrate_rejection",
        "compose",
        "compute_relevance",
        "evaluate_module",
        "make_parent",
        "nemo_loss",
        "propose_sites",
    ]
    assert [name for name in nemo_hf.__all__ if not hasattr(nemo_hf, name)] == []


def test_every_public_name_is_pinned():
    errors = {name for name in nemo_hf.__all__ if inspect.isclass(find(name)) and issubclass(find(name), Exception)}
    assert {name.partition(".")[0] for name in [*SIGNATURES, *FIELDS]} | errors == set(nemo_hf.__all__)


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures_are_these(name):
    parameters = list(inspect.signature(find(name)).parameters)
    assert parameters == SIGNATURES[name]


@pytest.mark.parametrize("name", list(FIELDS))
def test_fields_are_these(name):
    own = [field for field in find(name).__annotations__ if not field.startswith("_")]
    assert own == FIELDS[name]


@pytest.mark.parametrize("name", ["NeMoTrainer", "NeMoForImageClassification"])
def test_public_methods_take_over_all_arguments_of_what_they_override(name):
    base = next(parent for parent in find(name).__mro__ if parent.__module__.startswith("transformers"))
    for method, function in vars(find(name)).items():
        if method.startswith("_") or not inspect.isfunction(function) or not hasattr(base, method):
            continue
        ours = inspect.signature(function).parameters.values()
        names = {parameter.name for parameter in ours}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours)
        assert takes_any or set(inspect.signature(getattr(base, method)).parameters) <= names, method


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_everything_public_has_a_docstring(room):
    assert room.__doc__
    undocumented = [
        name
        for name, value in public_members(room)
        if not inspect.getdoc(value) or inspect.getdoc(value).startswith(f"{name}(")  # what dataclass makes up
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", [name for name in [*SIGNATURES, *FIELDS] if "." not in name])
def test_every_argument_is_described(name):
    if "base_model" in SIGNATURES.get(name, []):
        name = f"{name}.forward"
    arguments = SIGNATURES.get(name) or FIELDS[name]
    described = inspect.getdoc(find(name))
    assert [a for a in arguments if a != "self" and not re.search(rf"(^\s*\**|`){a}(`|:)", described, re.M)] == []


def test_errors_are_kinds_of_ordinary_ones():
    assert issubclass(nemo_hf.EquivalenceError, RuntimeError)
    assert issubclass(nemo_hf.UnsupportedArchitectureError, ValueError)


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModelForImageClassification, "NeMoForImageClassification"),
        (AutoModelForTexts, "NeMoForSequenceClassification"),
        (AutoModelForAudioClassification, "NeMoForAudioClassification"),
    ],
)
def test_importing_registers_with_the_auto_classes(auto, expected):
    assert auto._model_mapping[nemo_hf.NeMoModelConfig] is find(expected)
    assert nemo_hf.NeMoModelConfig.model_type == "nemo_hf"
    assert find(expected).accepts_loss_kwargs is False
