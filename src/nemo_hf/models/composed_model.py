"""Several modules as one model with joint logits: its configuration, and one class per task."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .base import NeMoOutput, NeMoPreTrainedModel
from .config_checks import REMEDY, are_numbers, check_config, is_permutation
from .configuration import NeMoModelConfig, check_keys, model_class
from .file_mixin import FileMixin, pin_revision

MOST_PARTS = 1000
PUSH_OPTIONS = (
    "license",
    "datasets",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
)


class NeMoComposedConfig(PreTrainedConfig):
    """Configuration of several modules that answer together.

    Args:
        parts: One `NeMoModelConfig` a module, as data.
        label_order: For each joint label, its place among the labels of all modules one after another.
        scales: Factor of each module's logits. `biases`: what is added to them then.
        biases: One number a module.
        processor_files: As in `NeMoModelConfig`.
    """

    model_type = "nemo_hf_composed"

    parts: list | None = None  # type: ignore[type-arg]
    label_order: list | None = None  # type: ignore[type-arg]
    scales: list | None = None  # type: ignore[type-arg]
    biases: list | None = None  # type: ignore[type-arg]
    processor_files: list | None = None  # type: ignore[type-arg]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration from what a file says; as in `transformers`.

        Raises:
            ValueError: If an entry has the wrong type or is out of range.
        """
        check_config(config_dict)
        check_keys(config_dict)
        parts = config_dict.get("parts")
        count = len(parts) if isinstance(parts, list) and all(isinstance(part, dict) for part in parts) else 0
        names = [part.get("id2label") for part in parts or []] if count else []
        order, scales = config_dict.get("label_order"), config_dict.get("scales")
        labels = sum(len(own) for own in names if isinstance(own, dict))
        if (
            not 0 < count <= MOST_PARTS
            or not all(are_numbers(config_dict.get(name), count) for name in ("scales", "biases"))
            or min(scales or [0]) <= 0
            or not is_permutation(order)
            or not len(order or ()) == len(config_dict.get("id2label") or ()) == labels
            or config_dict.get("problem_type") not in (None, "single_label_classification")
        ):
            raise ValueError(
                f"Got a config.json of {count} modules with {labels} labels, the label order {str(order)[:120]} and "
                f"the scales {str(scales)[:120]}; expected at most {MOST_PARTS} modules of single labels, each with a "
                f"scale above 0 and a bias, and a place for each label. {REMEDY}"
            )
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        try:
            return super().from_dict(config_dict, **kwargs)
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:
            raise ValueError(
                f"Got a config.json that makes no configuration ({type(error).__name__}: {error}); expected that of "
                f"modules that were joined. {REMEDY}"
            ) from error

    def part_configs(self) -> Iterator[NeMoModelConfig]:
        """Builds the configurations of the modules, one after another."""
        for part in self.parts or []:
            yield NeMoModelConfig.from_dict(dict(part))


class NeMoComposedModel(FileMixin, PreTrainedModel):
    """Modules with different labels that answer together.

    A logit is `scale * logit of the module + bias`, with one scale and one bias a module.
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
        self.post_init()

    def _built(self, attention: str | None) -> Iterator[NeMoPreTrainedModel]:
        for config in self.config.part_configs():
            if attention is not None:
                config._attn_implementation = attention
            yield model_class(self.task, NeMoModelConfig)(config)

    @property
    def parts(self) -> list[NeMoPreTrainedModel]:
        """The modules."""
        return [part for part in self.children() if isinstance(part, NeMoPreTrainedModel)]

    def _check(self) -> None:
        config, own = self.config, self.parts
        names = [name for part in own for name in part.config.names.values()]
        joint = {int(index): str(name) for index, name in (config.id2label or {}).items()}
        order = config.label_order or []
        told = [joint.get(index) for index in range(len(order))]
        if sorted(order) != list(range(len(names))) or told != [names[place] for place in order]:
            raise ValueError(
                f"Got a config.json with the labels {told[:12]} of modules with {names[:12]}; expected each label of "
                f"a module once. {REMEDY}"
            )
        if any(part.is_parent for part in own):
            raise ValueError(f"Got a config.json of a parent among the modules; expected modules. {REMEDY}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Modules draw their weights themselves."""

    def part_logits(self, **inputs: Any) -> Tensor:
        """Returns the modules' own logits one after another, as they are: shape (batch, labels)."""
        return torch.cat([part(**inputs).logits for part in self.parts], -1)

    def join(self, logits: Tensor) -> Tensor:
        """Scales and orders what `part_logits` returned, in float32."""
        scales, biases = self.config.scales or [], self.config.biases or []
        sizes = [len(part.config.names) for part in self.parts]
        joined = zip(logits.split(sizes, -1), scales, biases, strict=True)
        return torch.cat([scale * own.float() + bias for own, scale, bias in joined], -1)[:, self.config.label_order]

    def _run(
        self, inputs: Mapping[str, Any], labels: Tensor | None, return_dict: bool | None, kwargs: Mapping[str, Any]
    ) -> NeMoOutput | tuple[Any, ...]:
        given = {name: value for name, value in {**inputs, **kwargs}.items() if value is not None}
        logits = self.join(self.part_logits(**given))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = NeMoOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Saves weights, configuration and processor, whole or not at all; as in `transformers`.

        Args:
            save_directory: Where to.
            **kwargs: As in `transformers`.
        """
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        pushed = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        pushed |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        kwargs.setdefault("save_original_format", False)
        self.config.parts = [part.config.to_dict() for part in self.parts]  # as they are now
        self._save_files(save_directory, **kwargs)
        if push and kwargs.get("is_main_process", True):
            self.push_to_hub(repo_id or Path(save_directory).name, **pushed)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads modules that were saved together.

        Args:
            pretrained_model_name_or_path: Directory or Hub repository.
            *model_args: As in `transformers`. `kwargs` likewise.
            **kwargs: As in `transformers`.

        Returns:
            The model in eval mode.

        Raises:
            OSError: If a file is missing or damaged.
            ValueError: If a tensor is missing or has another shape than the configuration says.
        """
        pin_revision(pretrained_model_name_or_path, kwargs)
        loaded: Self = cls._load_files(pretrained_model_name_or_path, model_args, kwargs)
        return loaded
