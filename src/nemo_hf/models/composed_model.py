"""Several modules as one model with joint logits: its configuration, and what its classes for each task share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict, validated_field
from torch import Tensor, nn

from .base import NeMoPreTrainedModel
from .config_checks import REMEDY, check_companions, holds
from .configuration import NeMoModelConfig, SavedConfig, model_class
from .head_outputs import NeMoOutput
from .labels import task_loss
from .saved_model import SavedModel
from .shared_tensors import check_shared, share_equal, shared_names

MOST_PARTS = 1000
SIZES = dict.fromkeys(("parameters", "joint_parameters", "source_parameters", "repeated_rows"), int)


@strict
class NeMoComposedConfig(SavedConfig):
    """Configuration of several modules with different labels that form one classifier."""

    model_type = "nemo_hf_composed"
    describes = "modules that were joined"

    parts: list[Any] | None = None  # one `NeMoModelConfig` a module, as data
    label_order: list[Any] | None = None  # for each joint label, its place among the labels of all modules in a row
    scales: list[Any] | None = None  # factor of each module's logits, above 0
    biases: list[Any] | None = None  # what is added then to the logits of each module
    shared_tensors: dict[str, str] | None = None  # of each that is not stored, the name of the equal one that is
    sizes: dict[str, Any] | None = validated_field(holds(SIZES), default=None)  # as `joint_sizes` found them
    processor_files: list[str] | None = validated_field(check_companions, default=None)
    save_identity: dict[str, Any] | None = None  # as in `NeMoModelConfig`

    @classmethod
    def _check(cls, config_dict: Mapping[str, Any]) -> None:
        parts, order, scales, biases = (config_dict.get(n) for n in ("parts", "label_order", "scales", "biases"))
        count = len(parts) if isinstance(parts, list) and all(isinstance(part, dict) for part in parts) else 0
        names = [part.get("id2label") for part in parts or []] if count else []
        labels = sum(len(own) for own in names if isinstance(own, dict))
        if (
            not 0 < count <= MOST_PARTS
            or not all(_are_numbers(values, count) for values in (scales, biases))
            or min(scales or [0]) <= 0
            or not _are_numbers(order, labels)
            or sorted(order or []) != list(range(labels))
            or not isinstance(joint := config_dict.get("id2label"), dict)
            or {str(key) for key in joint} != {str(index) for index in range(labels)}
            or config_dict.get("problem_type") not in (None, "single_label_classification")
        ):
            raise ValueError(
                f"Got a config.json of {count} modules with {labels} labels, label_order={str(order)[:120]} and "
                f"scales={str(scales)[:120]}; expected 1 to {MOST_PARTS} modules of single labels, each with a scale "
                f"above 0 and a bias, and a place for each label. {REMEDY}"
            )


def _are_numbers(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(type(entry) in (int, float) and math.isfinite(entry) for entry in value)


class NeMoComposedModel(SavedModel):
    """Modules that form one classifier: a logit is `scale * logit of the module + bias`, one of each per module.

    Attributes set on `config` that configurations of the modules have, such as `pad_token_id`, hold for all of them.
    There is no common `base_model`: each of `parts` has its own. Parameters of the same name and values in several
    parts are one, in memory and in the file, and so stay the same when they are trained.
    """

    config: NeMoComposedConfig
    config_class = NeMoComposedConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False
    task = ""

    def __init__(self, config: NeMoComposedConfig, modules: Sequence[NeMoPreTrainedModel] | None = None) -> None:
        wanted = config._attn_implementation_internal  # before it is filled in below
        super().__init__(config)
        for index, part in enumerate(self._built(wanted) if modules is None else modules):
            # Children of the model itself: from these it takes over tied weights and what stays in float32.
            self.add_module(f"part_{index}", part)
        self.processor_files = {}
        self.report = None
        self._check()
        if modules is None:
            check_shared(self.parts, config.shared_tensors or {})
        else:
            share_equal(self.parts)
            config.shared_tensors = shared_names(self.parts)
        self._tied_weights_keys = config.shared_tensors or {}  # by which transformers stores them once
        self.post_init()

    def _built(self, attention: str | None) -> Iterator[NeMoPreTrainedModel]:
        for part in self.config.parts or []:
            config = NeMoModelConfig.from_dict(dict(part))
            if attention is not None:
                config._attn_implementation = attention
            yield model_class(self.task, NeMoModelConfig)(config)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Names of tensors that are others too: those that modules share, and with `all_submodels` those within."""
        if all_submodels:
            tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=True)
            return tied
        return dict(self.config.shared_tensors or {})

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: Any) -> None:
        """Leaves biases alone: transformers would fit them to the rows of a weight, which are inputs in a `Conv1D`."""

    @property
    def parts(self) -> list[NeMoPreTrainedModel]:
        """The modules."""
        return [part for part in self.children() if isinstance(part, NeMoPreTrainedModel)]

    def _check(self) -> None:
        names = [name for part in self.parts for name in part.config.names.values()]
        joint = {int(index): str(name) for index, name in (self.config.id2label or {}).items()}
        order = self.config.label_order or []
        named = [joint.get(index) for index in range(len(order))]
        if sorted(order) != list(range(len(names))) or named != [names[place] for place in order]:
            raise ValueError(
                f"Got a config.json with the labels {named[:12]} of modules with {names[:12]}; expected each label of "
                f"a module once. {REMEDY}"
            )
        if any(part.is_parent for part in self.parts):
            raise ValueError(f"Got a config.json of a parent among the modules; expected modules. {REMEDY}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Modules draw their weights themselves."""

    def part_logits(self, **inputs: Any) -> Tensor:
        """Returns the modules' own logits one after another, as they are: shape (batch, labels)."""
        return torch.cat([part.own_logits(**inputs) for part in self.parts], -1)

    def join(self, logits: Tensor) -> Tensor:
        """Scales and orders what `part_logits` returned, in float32."""
        scales, biases = self.config.scales or [], self.config.biases or []
        sizes = [len(part.config.names) for part in self.parts]
        joined = zip(logits.split(sizes, -1), scales, biases, strict=True)
        return torch.cat([scale * own.float() + bias for own, scale, bias in joined], -1)[:, self.config.label_order]

    def _run(
        self, inputs: Mapping[str, Any], labels: Tensor | None, return_dict: bool | None, kwargs: Mapping[str, Any]
    ) -> NeMoOutput | tuple[Any, ...]:
        self._hand_on()
        given = {name: value for name, value in {**inputs, **kwargs}.items() if value is not None}
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name, getattr(self.config, name)):
                raise ValueError(f"Got {name} for several modules; expected none. Ask each of model.parts for its own.")
        logits = self.join(self.part_logits(**given))
        loss = None if labels is None else task_loss(self, logits, labels)
        output = NeMoOutput(loss=loss, logits=logits)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _hand_on(self) -> None:
        """Sets attributes of the plain models' configurations that were set on the joint one."""
        added = {name: value for name, value in vars(self.config).items() if not hasattr(type(self.config), name)}
        for part in self.parts:
            for name, value in added.items():
                if name[0] != "_" and getattr(part.config, name, value) != value:
                    setattr(part.config, name, value)

    def _settle_labels(self) -> None:
        """Hands changed names of labels on to the modules."""
        names = {int(index): str(name) for index, name in (self.config.id2label or {}).items()}
        order = self.config.label_order or []
        if sorted(names) != list(range(len(order))):
            raise ValueError(
                f"Got labels with the ids {sorted(names)[:12]}; expected 0 to {len(order) - 1}, one for each output. "
                "Set config.id2label to a name for each."
            )
        self.config.id2label, self.config.label2id = names, {name: index for index, name in names.items()}
        given = iter(sorted(names, key=order.__getitem__))  # joint labels in the order of the modules' own
        for part in self.parts:
            own = {index: names[next(given)] for index in range(part.num_labels)}
            part.config.id2label, part.config.label2id = own, {name: index for index, name in own.items()}

    def _prepare_to_save(self) -> None:
        self._hand_on()
        self._settle_labels()
        for part in self.parts:
            part.drop_stale_results()
            part.config.save_identity = None  # its tensors are saved with the others
        self.config.shared_tensors = self._tied_weights_keys = shared_names(self.parts)  # as they are now
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.config.parts = [part.config.to_dict() for part in self.parts]  # as they are now
