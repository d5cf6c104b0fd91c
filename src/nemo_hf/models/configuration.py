"""Configuration of parents and modules: all that is needed to build their shapes, as data."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import transformers
from huggingface_hub.dataclasses import strict, validated_field
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from nemo_hf.config import NeMoConfig
from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.pruning.plan import LARGEST_MULTIPLE

from . import config_checks as checks
from .label_options import check_label_options, check_rejected_label
from .privacy import LOADERS, ORIGINS, clean

# For each task, what names of its classes have in them, and the classes that its Auto class knows.
TASKS = {
    "image-classification": ("ForImageClassification", transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    "text-classification": ("ForSequenceClassification", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "audio-classification": ("ForAudioClassification", transformers.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING),
    "token-classification": ("ForTokenClassification", transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    "image-segmentation": ("ForSemanticSegmentation", transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING),
    "object-detection": ("ForObjectDetection", transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING),
}
PLACE_TASKS = ("token-classification", "image-segmentation", "object-detection")
"""Tasks whose models answer at many places of a sample: tokens, pixels, queries."""
SEVERAL_LABELS = "multi_label_classification"  # the problem_type of multi-label models
# Of from_pretrained, not for the configuration; and what `extract_module` takes besides.
MODEL_OPTIONS = {"labels", "threshold", "round_to", "verify", "calibration", "retention", "max_loss"}
CUT_OPTIONS = {"processing_class", "validation", "label_groups", "nemo_config", "scores", "cost", "drop_parts",
               "stream", "reconstruct", "vocabulary", "refine_epochs", "max_positions", "rejection", "max_samples",
               "batch_size", "show_progress"}  # fmt: skip
LOADING_OPTIONS = MODEL_OPTIONS | CUT_OPTIONS | {"verify_files"}
NAMED_LABELS = ("id2label", "label2id")
# Attributes of any configuration that the plain model's alone holds, with their defaults.
BASE_ATTRIBUTES = {"output_hidden_states": False, "_output_attentions": False, "chunk_size_feed_forward": 0,
                   "is_encoder_decoder": False}  # fmt: skip


class SavedConfig(PreTrainedConfig):
    """Base of both configurations of this library: checks what a file says before anything is built from it."""

    describes: ClassVar[str] = "a parent or module"
    repository: ClassVar[str | None] = None  # of the Hub, that this was loaded from: set on objects, and not saved

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain data, as it is saved: without paths of this machine and tokens."""
        return clean(super().to_dict(), is_config=True)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration from what a file says, as in `transformers`; a wrong entry is a `ValueError`.

        The Auto classes pass all arguments of a model's `from_pretrained` through here. Those for the model itself are
        returned as unused, and so are the names of our own fields: these describe the saved weights. Where nobody asks
        for what is unused, they are refused, except beside `labels`, which a pipeline passes here as well.
        """
        own = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        chosen = {n: kwargs.pop(n) for n in ("rejected_label",) if n in kwargs and n in own}
        passed = {name: kwargs.pop(name) for name in (own - {"base_config"}) | LOADING_OPTIONS if name in kwargs}
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        if not wants_unused and (refused := sorted(passed.keys() - (LOADING_OPTIONS if "labels" in passed else set()))):
            raise ValueError(
                f"Got {refused} for a saved configuration; expected no fields of {cls.__name__}, which describe the "
                "weights. Leave them out; set what may change on the configuration that is returned."
            )
        said = config_dict
        checks.check_config(config_dict, cls)
        cls._check(config_dict)
        names = config_dict.get("id2label")
        if isinstance(names, dict):
            role = config_dict.get("role")
            check_label_options(kwargs, len(names), role if isinstance(role, str) else cls.describes)
        if isinstance(given := kwargs.get("id2label"), dict) and "label2id" not in kwargs:
            kwargs["label2id"] = {name: int(index) for index, name in given.items()}
        config_dict = _without(LOADERS + ORIGINS, said)  # no code is loaded
        is_base_read = False
        try:
            base = config_dict.get("base_config")
            if isinstance(base, dict) and "model_type" in base:  # its own from_dict: timm's names labels in another way
                config_dict["base_config"] = CONFIG_MAPPING[base["model_type"]].from_dict(base)
            is_base_read = True
            config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        except Exception as error:  # of whatever kind the plain model's own checks raise
            if isinstance(error, (ImportError, OSError)) or (is_base_read and isinstance(error, ValueError)):
                raise  # a ValueError then is about an argument
            if kwargs:
                cls.from_dict(said)  # raises what is wrong with the file itself
                raise
            got = f"a config.json that makes no configuration ({type(error).__name__}: {str(error)[:500]})"
            raise checks.damaged(got, f"that of {cls.describes}") from error
        if chosen:
            config.set_rejected_label(chosen["rejected_label"])
        given = chosen | {name: value for name, value in kwargs.items() if name not in unused}
        config._as_read = (_text(said), given, _text(config.to_dict()))
        return (config, {**unused, **passed}) if wants_unused else config

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("_as_read", None)

    @classmethod
    def _check(cls, config_dict: Mapping[str, Any]) -> None:
        """Checks what the fields can't check one by one."""


def _without(names: Sequence[str], data: Any) -> Any:
    """A copy of nested JSON without entries of these names."""
    if isinstance(data, Mapping):
        return {key: _without(names, value) for key, value in data.items() if key not in names}
    return [_without(names, value) for value in data] if isinstance(data, list) else data


@strict
class NeMoModelConfig(SavedConfig):
    """Configuration of a parent or a module.

    Attributes of the plain model's configuration, such as `pad_token_id`, `hidden_size` or `output_hidden_states`, are
    read and written through to `base_config`, which the plain model inside shares. Only `return_dict` stays here: many
    plain models fail inside when their own configuration says `False`. Of a module whose residual stream was narrowed,
    `hidden_size`, and what the family calls it, is `stream_width`. Other widths may differ from layer to layer in a
    module: `sites` has them, and `intermediate_size` remains that of the whole model.

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
        relevance_source: Parent: `"initial"`, `"running"`, `"exact"`, or `"assigned"`.
        unseen_labels: Parent: ids of the labels of which the data of its relevance had no sample, or `None`.
        base_model: Hub repository that the plain model inside was loaded from, or `None`.
        parent: Module: Hub repository that it was cut from, or `None`.
        relevance_threshold: Module: the threshold of its plan.
        round_to: Module: what its widths were filled up to.
        retained_neurons: Module: its neuron retention rate.
        equivalence: Result of the last equivalence check, or `None`.
        id2label: Label names by id; `label2id` and `problem_type` likewise as in `transformers`.
        extraction: Module: how `extract_module` cut it on calibration samples: `scores`, `samples`, the `retention`
            that was asked for, shares of `weights` (of attention, feed-forward layers, convolutions), of their
            `operations` and of `neurons` kept; by path of its `layers` the error of the hidden states behind each,
            relative to their variance, before and after reconstruction with a `ridge`; mean squared differences of the
            answers from the source's on samples held out (`cut_distance`, `distance`), and why reconstruction was
            `refused`; the parts that were `dropped` with their scores, `distances` by the number of parts tried, and
            what narrowing the `stream` did; `bytes`, `source_bytes`, `seconds`, and what `vocabulary`, `refine_epochs`
            and `validation` gave.
        rejection: Module: what `calibrate_rejection` found, or `None`.
        rejected_label: Module: once it is calibrated, the name of a last label, for inputs that it rejects, which
            `id2label` and `label2id` then show after its own; `None` for no such label.
        is_tuned: Module: whether it was trained further since it was cut.
        token_rows: Module: how many rows its tokens share (see `share_tokens`), or `None`.
        stream_width: Module: width of its residual stream where that was narrowed, or `None`; `hidden_size` then too.
        training: What the trainer recorded of the training (see `provenance.training_record`), or `None`.
        processor_files: Names of the processor's files beside the weights; `None` looks for the usual ones.
        save_identity: Of the save that it was read from: `id`, which all files of the save hold, and their `digests`.
    """

    model_type = "nemo_hf"
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    base_config: PreTrainedConfig | dict | None = None  # type: ignore[type-arg]
    base_class: str = "ViTForImageClassification"
    role: Literal["parent", "module"] = "parent"
    nemo_config: dict[str, Any] | None = None
    # Lists and mappings of labels may be long: their checks are quicker than those of a declared type.
    label_groups: Any = validated_field(checks.check_label_groups, default=None)  # list[dict[str, Any]] | None
    label_ids: Any = validated_field(checks.check_label_ids, default=None)  # list[int] | None
    sites: list[dict[str, Any]] | None = validated_field(checks.holds(checks.SITE), default=None)
    id2label: Any = validated_field(checks.check_names, default=None)  # dict[int, str] | dict[str, str] | None
    label2id: Any = validated_field(checks.check_ids_by_name, default=None)  # dict[str, int] | None
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = None
    relevance_source: Literal["initial", "running", "exact", "assigned"] = "initial"
    unseen_labels: Any = validated_field(checks.check_label_ids, default=None)  # list[int] | None
    base_model: str | None = validated_field(checks.check_repository, default=None)
    parent: str | None = validated_field(checks.check_repository, default=None)
    relevance_threshold: float | int | None = validated_field(checks.within(0, 1), default=None)
    round_to: int | None = validated_field(checks.within(1, LARGEST_MULTIPLE), default=None)
    retained_neurons: float | int | None = validated_field(checks.within(0, 1), default=None)
    equivalence: dict[str, Any] | None = validated_field(checks.holds(checks.EQUIVALENCE), default=None)
    extraction: dict[str, Any] | None = validated_field(checks.holds(checks.EXTRACTION), default=None)
    rejection: dict[str, Any] | None = validated_field(checks.holds(checks.REJECTION), default=None)
    rejected_label: str | None = None
    is_tuned: bool = False
    token_rows: int | None = validated_field(checks.within(1, checks.LARGEST_NUMBER), default=None)
    stream_width: int | None = validated_field(checks.within(1, checks.LARGEST_NUMBER), default=None)
    training: dict[str, Any] | None = validated_field(checks.check_training, default=None)
    processor_files: list[str] | None = validated_field(checks.check_companions, default=None)
    save_identity: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, default in BASE_ATTRIBUTES.items():
            if (value := self.__dict__.pop(name, default)) != default:
                setattr(self.base_config, name, value)
        for name in [name for name in self.__dict__ if name[0] != "_" and not hasattr(type(self), name)]:
            setattr(self, name, self.__dict__.pop(name))  # there or here

    def __getattribute__(self, name: str) -> Any:
        if name in BASE_ATTRIBUTES and (base := super().__getattribute__("_base_with")(name)) is not None:
            return getattr(base, name)
        value = super().__getattribute__(name)
        if name in NAMED_LABELS and value and self.shows_rejected:
            added = (len(value), self.rejected_label)
            return {**value, **dict([added if name == "id2label" else added[::-1]])}
        return value

    def __getattr__(self, name: str) -> Any:
        if (base := self._base_with(name)) is not None:
            return self.stream_width if self._is_narrowed(base, name) else getattr(base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMED_LABELS and value and self.shows_rejected:
            value = self._without_rejected(name, value)
        if (base := self._base_with(name)) is None:
            super().__setattr__(name, value)
        elif not self._is_narrowed(base, name):
            setattr(base, name, value)
        elif value != self.stream_width:
            raise ValueError(
                f"Got {name}={value!r} for a module whose residual stream is {self.stream_width} wide; expected that "
                "width. Leave it as it is, or cut another module with stream=."
            )

    def _base_with(self, name: str) -> PreTrainedConfig | None:
        """Returns the plain model's configuration if an attribute is to be found there, once both are built."""
        base = self.__dict__.get("base_config") if "_post_init_done" in self.__dict__ else None
        if name in BASE_ATTRIBUTES:
            return base
        # What chooses code or weights to load is nothing that a file hands on.
        is_own = name in self.__dict__ or hasattr(type(self), name) or name in ("auto_map", *checks.LOADING_KEYS)
        return None if base is None or is_own or name.startswith("_") or not hasattr(base, name) else base

    def _is_narrowed(self, base: PreTrainedConfig, name: str) -> bool:
        """Whether an attribute of the plain model's configuration is the width of a stream that was narrowed since."""
        names = base.attribute_map
        return self.stream_width is not None and names.get(name, name) == names.get("hidden_size", "hidden_size")

    @property
    def shows_rejected(self) -> bool:
        """Whether `id2label` has a last name, for inputs that the module rejects."""
        own = self.__dict__
        return own.get("rejected_label") is not None and bool(own.get("rejection")) and "_post_init_done" in own

    def _without_rejected(self, name: str, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """Takes the last label out of names and ids like those that are shown; `id2label` may rename it."""
        last = str(len(self.names))
        if len(value) == len(self.names) + 1 and name == "id2label":
            self.rejected_label = next((str(label) for index, label in value.items() if str(index) == last), None)
        places = {key: str(key if name == "id2label" else entry) for key, entry in value.items()}
        return {key: entry for key, entry in value.items() if places[key] != last}

    def set_rejected_label(self, label: str | None) -> None:
        """Names the answer to inputs that a calibrated module rejects; `None` for no such label."""
        if label is not None and not self.rejection:
            raise ValueError(
                f"Got rejected_label={label!r} for a {self.role} without calibrated rejection; expected a "
                "calibrated module. Call nemo_hf.calibrate_rejection(module, batches) with validation data first."
            )
        check_rejected_label(label, self.names.values())
        self.rejected_label = label

    def validate_architecture(self) -> None:
        """Checks nothing: the plain model's configuration, whose attributes are read here, checks itself."""

    def validate_layer_type(self) -> None:
        """Checks nothing, like `validate_architecture`."""

    def validate_rope(self) -> None:
        """Checks nothing, like `validate_architecture`."""

    def _get_generation_parameters(self) -> dict[str, Any]:
        base = self.base_config  # whose own fields may have such names (Whisper's do)
        return base._get_generation_parameters() if isinstance(base, PreTrainedConfig) else {}

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Outputs that `Trainer` leaves out of predictions: those of the plain model, and rejection scores."""
        return [*getattr(self.base_config, "keys_to_ignore_at_inference", ["cache"]), "rejection_scores"]

    @property
    def names(self) -> dict[int, str]:
        """Label names by id, without the `rejected_label`."""
        names = {int(index): str(name) for index, name in (self.__dict__.get("id2label") or {}).items()}
        return dict(sorted(names.items()))  # a file may sort ids as texts: 0, 1, 10, 2

    @property
    def groups(self) -> dict[str, list[int]]:
        """Label ids by group name, in the order of the relevance's rows."""
        return {entry["name"]: list(entry["labels"]) for entry in self.label_groups or []}

    @property
    def has_several_labels(self) -> bool:
        """Whether a sample may have several labels or none, as in multi-label classification."""
        return self.problem_type == SEVERAL_LABELS

    @property
    def plain_class(self) -> type[PreTrainedModel]:
        """Class of the plain model inside."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return find_base_class(self.base_class, self.base_config)

    @classmethod
    def _check(cls, config_dict: Mapping[str, Any]) -> None:
        base = config_dict.get("base_config")
        if isinstance(base, dict) and base.get("model_type", "vit") not in CONFIG_MAPPING:
            raise UnsupportedArchitectureError(
                f"Got a {config_dict.get('role')} of a {config_dict.get('base_class')!r} of model type "
                f"{base['model_type']!r}; expected one that transformers {transformers.__version__} knows or that is "
                f"registered. Run before: AutoConfig.register({base['model_type']!r}, ...) and the register of its "
                "Auto class, such as AutoModelForImageClassification.register(...)."
            )
        names = config_dict.get("id2label")
        check_rejected_label(config_dict.get("rejected_label"), list(names.values()) if isinstance(names, dict) else [])
        options = config_dict.get("nemo_config")
        try:
            NeMoConfig.from_dict(options if isinstance(options, Mapping) else {})
        except (TypeError, ValueError) as error:
            raise checks.damaged(f"a wrong nemo_config ({str(error)[:500]})", "options of NeMoConfig") from error

    def build_plain(self) -> PreTrainedModel:
        """Builds the plain model inside, at full width."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.plain_class(self.base_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the plain model's configuration of text, so that special tokens are set where they count."""
        assert isinstance(self.base_config, PreTrainedConfig)
        asked = {name: value for name, value in (("decoder", decoder), ("encoder", encoder)) if value is not None}
        return self.base_config.get_text_config(**asked)  # some have one of both only


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, default=str)


def read_again(config: SavedConfig, data: dict[str, Any]) -> Any:
    """Reads a config.json like a configuration read from it before, unless its owner made or changed that one."""
    _, given, entries = getattr(config, "_as_read", ("", {}, None))
    return config if entries != _text(config.to_dict()) else type(config).from_dict(data, **given)


def is_as_read(config: SavedConfig, data: Mapping[str, Any]) -> bool:
    """Whether a configuration says what this content of a config.json says, and no more."""
    said, given, entries = getattr(config, "_as_read", ("", {}, None))
    return given.keys() <= {"name_or_path"} and said == _text(data) and entries == _text(config.to_dict())


def find_base_class(name: str, base_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Finds a plain model's class by its name, in `transformers` or among those registered for its configuration."""
    known = [found for _, mapping in TASKS.values() for found in registered_classes(mapping, type(base_config))]
    found = next((each for each in known if each.__name__ == name), getattr(transformers, name, None))
    if inspect.isclass(found) and issubclass(found, PreTrainedModel):
        return found
    kind = type(base_config).__name__
    raise UnsupportedArchitectureError(
        f"Got the model class {name!r}; expected one of transformers {transformers.__version__} or one that is "
        f"registered. Update transformers, or run before: AutoConfig.register({base_config.model_type!r}, {kind}) and "
        f"AutoModelForImageClassification.register({kind}, {name}), with the Auto class of its task."
    )


def registered_classes(mapping: Any, config_class: Any) -> tuple[type[PreTrainedModel], ...]:
    """Model classes that an Auto class knows for a configuration."""
    found = mapping.get(config_class, ()) if config_class else ()
    return found if isinstance(found, tuple) else (found,)


def model_class(task: str, config_class: type[PreTrainedConfig]) -> Any:
    """Finds the class of this library that is registered with the Auto class of a task for a configuration."""
    return registered_classes(TASKS[task][1], config_class)[0]


def task_of(base_class: type[PreTrainedModel]) -> str:
    """Returns the task of a plain model's class, a key of `TASKS`; a class of another one is a `TypeError`."""
    for task, (_, mapping) in TASKS.items():  # before the names: Wav2Vec2ForSequenceClassification is for audio
        if base_class in registered_classes(mapping, base_class.config_class):
            return task
    for task, (name, _) in TASKS.items():
        if name in base_class.__name__:
            return task
    raise TypeError(
        f"Got a {base_class.__name__}; expected a class for one of the tasks {list(TASKS)}, whose head has labels. "
        "Load the model with the Auto class for its task."
    )
