"""The public names, their signatures and the description of every argument."""

import inspect
import re

import pytest
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as AutoModelForTexts

import nemo_hf

MASKED = "labels static_masks static_samples output_neuron_masks return_dict kwargs"
SIGNATURES = {
    "calibrate_rejection": "module batches accepted show_progress rejected_label",
    "compose": "modules labels batches",
    "compute_relevance": "parent batches accelerator show_progress",
    "extract_module": "model labels calibration retention processing_class max_loss validation label_groups nemo_config"
    " scores cost drop_parts stream reconstruct refine_epochs vocabulary max_positions rejection max_samples batch_size"
    " show_progress",
    "evaluate_module": "parent labels batches module threshold round_to seed show_progress metrics quick",
    "make_parent": "model nemo_config label_groups inputs",
    "nemo_loss": "logits labels neuron_masks groups contrastive_weight sparsity_weight temperature",
    "propose_sites": "model inputs",
    "write_report_page": "model path origin batches calibration labels retentions processing_class seed show_progress"
    " words",
    "NeMoConfig": "targets masks core_share plain_ratio generator_rank objective contrastive_weight coupling_weight"
    " temperature gather_across_devices sparsity_weight retention_target hard_masks static_evaluation detach_pooled"
    " mask_learning_rate warmup_ratio rehearsal_probability specificity_weight relevance_threshold label_groups"
    " group_column sites",
    "NeMoConfig.from_dict": "data",
    "NeMoConfig.from_json_file": "path",
    "NeMoConfig.to_dict": "self",
    "NeMoConfig.to_json_file": "self path",
    "NeMoForAudioClassification": "config base_model sites",
    "NeMoForAudioClassification.forward": f"self input_values input_features {MASKED}",
    "NeMoForImageClassification": "config base_model sites",
    "NeMoForImageClassification.attach_processor": "self processor",
    "NeMoForImageClassification.detach_masks": "self",
    "NeMoForImageClassification.export_onnx": "module directory inputs quantize calibration min_agreement",
    "NeMoForImageClassification.export_openvino": "module directory inputs quantize calibration min_agreement",
    "NeMoForImageClassification.extract_module": "self labels calibration retention threshold round_to inputs options",
    "NeMoForImageClassification.forward": f"self pixel_values {MASKED}",
    "NeMoForImageClassification.from_pretrained": "pretrained_model_name_or_path model_args labels threshold round_to"
    " verify calibration retention max_loss kwargs",
    "NeMoForImageClassification.push_to_hub": "self repo_id parent license datasets tags commit_message"
    " commit_description private token revision create_pr max_shard_size",
    "NeMoForImageClassification.save_plain": "module directory inputs",
    "NeMoForImageClassification.save_pretrained": "self save_directory kwargs",
    "NeMoForObjectDetection": "config base_model sites",
    "NeMoForObjectDetection.forward": f"self pixel_values {MASKED}",
    "NeMoForSemanticSegmentation": "config base_model sites",
    "NeMoForSemanticSegmentation.forward": f"self pixel_values {MASKED}",
    "NeMoForSequenceClassification": "config base_model sites",
    "NeMoForSequenceClassification.forward": f"self input_ids attention_mask token_type_ids bbox {MASKED}",
    "NeMoForTokenClassification": "config base_model sites",
    "NeMoForTokenClassification.forward": f"self input_ids attention_mask token_type_ids bbox {MASKED}",
    "NeMoTrainer": "model args data_collator train_dataset trainer_args nemo_config relevance_dataset trainer_kwargs",
    "NeMoTrainer.calibrate_rejection": "self module eval_dataset accepted rejected_label",
    "NeMoTrainer.evaluate_modularity": "self eval_dataset",
    "NeMoTrainer.evaluate_module": "self labels eval_dataset kwargs",
    "NeMoTrainer.extract_module": "self labels calibration retention kwargs",
    "NeMoTrainer.update_relevance": "self dataset",
}
FIELDS = {
    "ModuleReport": "labels groups accuracy parent_restricted_accuracy controls samples parameters parent_parameters"
    " megabytes parent_megabytes macs parent_macs neuron_retention_rate weight_retention_rate latency_ms"
    " parent_latency_ms device input_shape threshold seed rejection latency_note metrics parent_metrics",
    "NeMoModelConfig": "base_config base_class role nemo_config label_groups label_ids sites id2label label2id"
    " problem_type relevance_source unseen_labels base_model parent relevance_threshold round_to retained_neurons"
    " equivalence extraction rejection rejected_label is_tuned token_rows stream_width training"
    " processor_files save_identity",
}
ERRORS = {"EquivalenceError": RuntimeError, "UnsupportedArchitectureError": ValueError}


def find(name):
    found = nemo_hf
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_public_names_are_these():
    named = {name.partition(".")[0] for name in (*SIGNATURES, *FIELDS, *ERRORS)}
    assert nemo_hf.__all__ == sorted(named, key=lambda name: (not name[0].isupper(), name))
    for name, kind in ERRORS.items():
        assert issubclass(find(name), kind)


def test_signatures_and_fields_are_these():
    assert {name: " ".join(inspect.signature(find(name)).parameters) for name in SIGNATURES} == SIGNATURES
    fields = {name: [each for each in find(name).__annotations__ if not each.startswith("_")] for name in FIELDS}
    assert {name: " ".join(found) for name, found in fields.items()} == FIELDS


@pytest.mark.parametrize("name", ["NeMoTrainer", "NeMoForImageClassification"])
def test_public_methods_take_over_all_arguments_of_what_they_override(name):
    base = next(parent for parent in find(name).__mro__ if parent.__module__.startswith("transformers"))
    for method, function in vars(find(name)).items():
        if method.startswith("_") or not inspect.isfunction(function) or not hasattr(base, method):
            continue
        ours = inspect.signature(function).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())
        assert takes_any or set(inspect.signature(getattr(base, method)).parameters) <= set(ours), method


@pytest.mark.parametrize("name", [name for name in (*SIGNATURES, *FIELDS) if "." not in name])
def test_every_argument_is_described(name):
    if "base_model" in SIGNATURES.get(name, ""):
        name = f"{name}.forward"
    described = inspect.getdoc(find(name))
    arguments = (SIGNATURES.get(name) or FIELDS[name]).split()
    assert [a for a in arguments if a != "self" and not re.search(rf"(^\s*\**|`){a}(`|:)", described, re.M)] == []


def test_importing_registers_with_the_auto_classes():
    classes = {"Image": AutoModelForImageClassification, "Sequence": AutoModelForTexts}
    for name, auto in {**classes, "Audio": AutoModelForAudioClassification}.items():
        expected = find(f"NeMoFor{name}Classification")
        assert auto._model_mapping[nemo_hf.NeMoModelConfig] is expected
        assert expected.accepts_loss_kwargs is False
