"""Configuration of parents and modules: all that is needed to build their shapes, as data."""

import inspect
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from nemo_hf.neurons.sites import UnsupportedArchitectureError

from .config_checks import REMEDY, check_config, leaves

MAPPINGS = {
    "image-classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "text-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "audio-classification": MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
}

SEVERAL_LABELS = "multi_label_classification"
"""Value of `problem_type` under which each label is a yes or no of its own."""


class NeMoModelConfig(PreTrainedConfig):
    """Configuration of a parent or a module.

    Args:
        base_config: Configuration of the plain model inside, at full width.
        base_class: Name of the plain model's class in `transformers`.
        role: `"parent"` (masks attached) or `"module"` (layers sliced).
        nemo_config: The options of `NeMoConfig` that the parent was trained with.
        label_groups: One entry a group: `name` and `labels` (ids). Parent: a partition. Module: those that it
            was cut for. A list, since JSON files of `transformers` sort the keys of a mapping and the order
            is that of the relevance's rows.
        label_ids: Module: the parent's id of each label, in the order of the outputs.
        sites: One entry a site: `key`, `pruning_mode`, and for a module the `widths` of its layers and, under `kept`,
            how many neurons each of its groups uses and how many it keeps in all.
        relevance_source: Parent: `"initial"`, `"running"` or `"exact"`.
        parent: Module: Hub repository that it was cut from, or `None`.
        relevance_threshold: Module: the threshold of its plan. `round_to`: what its widths were filled up to.
            `retained_neurons`: its neuron retention rate.
        equivalence: Result of the last equivalence check, or `None`.
        rejection: Module: what `calibrate_rejection` found, or `None`.
        is_tuned: Module: whether it was trained further since it was cut.
        training: What the trainer recorded of the training (see `provenance.training_record`), or `None`.
        processor_files: Names of the processor's files beside the weights; `None` looks for the usual ones.
    """

    model_type = "nemo_hf"
    keys_to_ignore_at_inference = ["past_key_values", "rejection_scores"]
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    base_config: PreTrainedConfig | dict | None = None  # type: ignore[type-arg]
    base_class: str = "ViTForImageClassification"
    role: str = "parent"
    nemo_config: dict | None = None  # type: ignore[type-arg]
    label_groups: list | None = None  # type: ignore[type-arg]
    label_ids: list | None = None  # type: ignore[type-arg]
    sites: list | None = None  # type: ignore[type-arg]
    relevance_source: str = "initial"
    parent: str | None = None
    relevance_threshold: float | None = None
    round_to: int | None = None
    retained_neurons: float | None = None
    equivalence: dict | None = None  # type: ignore[type-arg]
    rejection: dict | None = None  # type: ignore[type-arg]
    is_tuned: bool = False
    training: dict | None = None  # type: ignore[type-arg]
    processor_files: list | None = None  # type: ignore[type-arg]

    @property
    def names(self) -> dict[int, str]:
        """Label names by id."""
        return {int(index): str(name) for index, name in (self.id2label or {}).items()}

    @property
    def groups(self) -> dict[str, list[int]]:
        """Label ids by group name, in the order of the relevance's rows."""
        return {entry["name"]: list(entry["labels"]) for entry in self.label_groups or []}

    @property
    def has_several_labels(self) -> bool:
        """Whether a sample may have several labels, or none, each a yes or no of its own."""
        return self.problem_type == SEVERAL_LABELS

    @property
    def plain_class(self) -> type[PreTrainedModel]:
        """Class of the plain model inside."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return find_base_class(self.base_class, self.base_config)

    def build_plain(self) -> PreTrainedModel:
        """Builds the plain model inside, at full width."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.plain_class(self.base_config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration from what a file says; as in `transformers`.

        Raises:
            UnsupportedArchitectureError: If the plain model's configuration is of an unknown kind.
            ValueError: If an entry has the wrong type or is out of range.
        """
        check_config(config_dict)
        check_keys(config_dict)
        base = config_dict.get("base_config") or {}
        known = not isinstance(base, dict) or "model_type" not in base or base["model_type"] in CONFIG_MAPPING
        if not known:
            raise UnsupportedArchitectureError(
                f"Got a {config_dict.get('role')} of a {config_dict.get('base_class')!r} of model type "
                f"{base['model_type']!r}, which transformers {transformers.__version__} does not know; expected one "
                "that it knows or that is registered. Import the package that defines it and run before: "
                f"AutoConfig.register({base['model_type']!r}, ...) and the register of its Auto class, such as "
                "AutoModelForImageClassification.register(...)."
            )
        # Code beside the weights is for loading without nemo_hf; a copy of the model saved anew may have none.
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        try:
            if isinstance(base, dict) and "model_type" in base:  # its own from_dict: timm's names labels in another way
                config_dict["base_config"] = CONFIG_MAPPING[base["model_type"]].from_dict(base)
            return super().from_dict(config_dict, **kwargs)
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:  # of whatever kind the plain model's own checks raise
            raise ValueError(
                f"Got a config.json that makes no configuration ({type(error).__name__}: {error}); expected that of a "
                f"parent or module. {REMEDY}"
            ) from error

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the plain model's configuration of text, so that special tokens are set where they count."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


def check_keys(config_dict: dict[str, Any]) -> None:
    """Refuses entries that would take the place of a method: unknown ones become attributes of a configuration.

    Args:
        config_dict: What a config.json holds.

    Raises:
        ValueError: If an entry has the name of a method.
    """
    for path, _ in leaves(config_dict):
        is_attribute = path and not {"label2id", "nemo_config", "training"} & set(path[:-1])
        if is_attribute and (path[-1].startswith("__") or callable(getattr(PreTrainedConfig, path[-1], None))):
            raise ValueError(
                f"Got {'.'.join(path)} in config.json, the name of a method; expected options of models. {REMEDY}"
            )


def find_base_class(name: str, base_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Finds the class of a plain model.

    Args:
        name: Name of the class.
        base_config: Configuration of the plain model.

    Returns:
        The class, of `transformers` or registered with its Auto classes for this configuration.

    Raises:
        UnsupportedArchitectureError: If there is none.
    """
    for mapping in MAPPINGS.values():
        for candidate in _registered(mapping, type(base_config)):
            if candidate.__name__ == name:
                return candidate
    found = getattr(transformers, name, None)
    if inspect.isclass(found) and issubclass(found, PreTrainedModel):
        return found
    kind = type(base_config).__name__
    raise UnsupportedArchitectureError(
        f"Got the model class {name!r}; expected one of transformers {transformers.__version__} or one that is "
        f"registered. Update transformers, or run before: AutoConfig.register({base_config.model_type!r}, {kind}) and "
        f"AutoModelForImageClassification.register({kind}, {name}), with the Auto class of its task."
    )


def _registered(mapping: Any, config_class: type[PreTrainedConfig] | None) -> tuple[type[PreTrainedModel], ...]:
    """Model classes that an Auto class knows for a configuration."""
    found = mapping.get(config_class, ()) if config_class is not None else ()
    return found if isinstance(found, tuple) else (found,)


def model_class(task: str, config_class: type[PreTrainedConfig]) -> Any:
    """Finds the class of this library that is registered with the Auto class of a task for a configuration."""
    return _registered(MAPPINGS[task], config_class)[0]


def task_of(base_class: type[PreTrainedModel]) -> str:
    """Tells the task of a plain model's class.

    Args:
        base_class: A class of `transformers`, or one that is registered with its Auto classes.

    Returns:
        `"image-classification"`, `"text-classification"` or `"audio-classification"`.

    Raises:
        TypeError: If the class is for another task.
    """
    name = base_class.__name__
    if name in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values() or "ForAudioClassification" in name:
        return "audio-classification"
    if "ForImageClassification" in name:
        return "image-classification"
    if "ForSequenceClassification" in name:
        return "text-classification"
    for task, mapping in MAPPINGS.items():
        if base_class in _registered(mapping, base_class.config_class):
            return task
    raise TypeError(
        f"Got a {name}; expected a class for image, sequence or audio classification: a mask is of a whole sample, and "
        "so must be its labels. Load the model with AutoModelForImageClassification or "
        "AutoModelForSequenceClassification."
    )
