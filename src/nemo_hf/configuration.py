"""Configuration of parents and modules: all that is needed to build their shapes, as data."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES


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
        sites: One entry a site: `key`, `back_end`, and for a module the kept `widths`.
        relevance_source: Parent: `"initial"`, `"running"` or `"exact"`.
        relevance_threshold: Module: the threshold of its plan. `retained_neurons`: its neuron retention
            rate.
        law: Result of the last check of the extraction law, or `None`.
    """

    model_type = "nemo_hf"
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    base_config: PreTrainedConfig | dict | None = None  # type: ignore[type-arg]
    base_class: str = "ViTForImageClassification"
    role: str = "parent"
    nemo_config: dict | None = None  # type: ignore[type-arg]
    label_groups: list | None = None  # type: ignore[type-arg]
    label_ids: list | None = None  # type: ignore[type-arg]
    sites: list | None = None  # type: ignore[type-arg]
    relevance_source: str = "initial"
    relevance_threshold: float | None = None
    retained_neurons: float | None = None
    law: dict | None = None  # type: ignore[type-arg]

    @property
    def names(self) -> dict[int, str]:
        """Label names by id."""
        return {int(index): str(name) for index, name in (self.id2label or {}).items()}

    @property
    def groups(self) -> dict[str, list[int]]:
        """Label ids by group name, in the order of the relevance's rows."""
        return {entry["name"]: list(entry["labels"]) for entry in self.label_groups or []}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the plain model's configuration of text, so that special tokens are set where they count."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


def task_of(base_class: str) -> str:
    """Tells the task of a plain model's class, given by name.

    Args:
        base_class: Name of a class of `transformers`.

    Returns:
        `"image-classification"`, `"text-classification"` or `"audio-classification"`.

    Raises:
        TypeError: If the class is for another task.
    """
    names = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values()
    if base_class in names or "ForAudioClassification" in base_class:
        return "audio-classification"
    if "ForImageClassification" in base_class:
        return "image-classification"
    if "ForSequenceClassification" in base_class:
        return "text-classification"
    raise TypeError(
        f"Got a {base_class}; expected a class for image, sequence or audio classification. "
        "Load the model with AutoModelForImageClassification or AutoModelForSequenceClassification."
    )
