"""Parents and modules as `transformers` models: one class per task, registered with the Auto classes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.generic import ModelOutput

from nemo_hf.config import SHAPING_OPTIONS, NeMoConfig
from nemo_hf.neurons.generators import MaskGenerator
from nemo_hf.neurons.masks import NeuronMasks, build_masks, untied_parameters
from nemo_hf.neurons.patterns import find_heads
from nemo_hf.neurons.sites import NeuronSite, with_pruning_modes
from nemo_hf.neurons.user_sites import model_sites, user_site_entries
from nemo_hf.pruning.layer_cuts import ScatterLinear, close_attention, resize, resize_head
from nemo_hf.pruning.plan import module_masks

from .configuration import NeMoModelConfig, task_of
from .labels import check_label_shape
from .rejection import energy, rejection_scores
from .saved_model import SavedModel


@dataclass
class NeMoOutput(ModelOutput):
    """Output of a parent or a module.

    Args:
        loss: Task loss, if labels were given.
        logits: Shape (batch, labels).
        hidden_states: As the plain model returns them on request. `attentions` likewise.
        neuron_masks: Parents in training, or on request: site key to soft masks of shape
            (batch, calls, neurons), float32.
        rejection_scores: Modules that `calibrate_rejection` prepared: chance that the input has none of the
            module's labels, shape (batch,), float32; to be rejected over `config.rejection["threshold"]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    neuron_masks: dict[str, Tensor] | None = None
    rejection_scores: Tensor | None = None


class NeMoPreTrainedModel(SavedModel):
    """A plain classification model with neuron masks (parent), or with sliced layers (module)."""

    config: NeMoModelConfig
    config_class = NeMoModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over samples; without this flag the Trainer would not divide it by the number of
    # accumulation steps, since forward takes **kwargs (transformers 5.23, Trainer.compute_loss).
    accepts_loss_kwargs = False
    # A mask near 0 must not flip when the model is loaded in half precision.
    _keep_in_fp32_modules_strict = {"generator"}
    task = ""
    _report: dict[str, Any] | None = None
    _weight_versions: list[int] | None = None
    _weight_hashes: list[Any] | None = None

    def __init__(
        self,
        config: NeMoModelConfig,
        base_model: PreTrainedModel | None = None,
        sites: Sequence[NeuronSite] | None = None,
    ) -> None:
        super().__init__(config)
        task = task_of(config.plain_class)
        if self.task and task != self.task:
            raise ValueError(
                f"Got a {config.base_class} to load as {type(self).__name__}; expected a model for {self.task}. "
                f"Load it with the Auto class for {task}."
            )
        is_from_config = base_model is None
        self.model: PreTrainedModel = config.build_plain() if base_model is None else base_model
        self.processor_files = {}
        self.changed_attributes: list[tuple[Any, str, Any]] = []
        """Attributes of the plain model that are changed while it has masks: owner, name and value before."""
        self.main_input_name = self.model.main_input_name
        self.nemo_config = NeMoConfig.from_dict(config.nemo_config or {})
        self.sites = list(configured_sites(self.model, config) if sites is None else sites)
        self.heads = find_heads(self.model, self.model.config.num_labels or 0)
        self.masks: NeuronMasks | None = None
        if config.role == "module":
            self._resize()
        else:
            parameters = untied_parameters(self.model)
            self.masks = build_masks(self.sites, self.nemo_config, parameters, len(config.groups))
            self.masks.attach(self.model)
        with nullcontext() if is_from_config else no_init_weights():
            self.post_init()

    @property
    def report(self) -> dict[str, Any] | None:
        """What was measured of these weights, saved beside them; `None` once they have changed."""
        self.drop_stale_results()
        return self._report

    @report.setter
    def report(self, report: dict[str, Any] | None) -> None:
        self.drop_stale_results()
        self._report = report

    def drop_stale_results(self) -> None:
        """Drops what was checked, calibrated or measured if the weights were changed since then.

        In-place changes show in the version counters of tensors, except those of fused optimizers: after a forward
        pass in training mode, hashes taken before it are compared too. Conversions to another device or precision
        don't count as changes. A module whose weights were changed counts as tuned.
        """
        tensors = [tensor for tensor in self.state_dict(keep_vars=True).values() if not tensor.is_inference()]
        versions = [tensor._version for tensor in tensors]
        is_changed = self._weight_versions not in (None, versions)
        if not is_changed and self._weight_hashes is not None:
            is_changed = self._weight_hashes != _hashes(tensors)
        if is_changed:
            self._report = self.config.rejection = None
            if not self.is_parent:
                self.config.equivalence, self.config.is_tuned = None, True
        self._weight_versions, self._weight_hashes = versions, None

    def _watch_weights(self) -> None:
        """Keeps results and weights together in a forward pass: looks for changes, or prepares to see them."""
        has_results = self._report or self.config.rejection or not (self.is_parent or self.config.is_tuned)
        if not has_results or torch.compiler.is_compiling():
            return
        if not (self.training and torch.is_grad_enabled()):
            if self.config.rejection:
                self.drop_stale_results()
        elif self._weight_hashes is None:
            self.drop_stale_results()
            self._weight_hashes = _hashes(self.state_dict(keep_vars=True).values())

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the version counters out: those of a copy's tensors start anew."""
        self.drop_stale_results()
        return {**self.__dict__, "_weight_versions": None, "_weight_hashes": None}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Activates checkpointing as `transformers` does; parents refuse `use_reentrant=True` with a `ValueError`."""
        if self.is_parent and (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "Got use_reentrant=True; expected the other kind of activation checkpointing, since the reentrant one "
                "runs the forward pass without gradients and would train no masks. Pass use_reentrant=False."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def _resize(self) -> None:
        entries = {entry["key"]: entry for entry in self.config.sites or []}
        for site in self.sites:
            resize(self.model, site, entries[site.key].get("widths", {}))
            kept = entries[site.key].get("kept")
            is_empty = site.kind == "attention" and isinstance(kept, list) and kept[-1:] == [0]
            if is_empty and not self.config.is_tuned:
                close_attention(self.model, site)
        for head in self.heads:
            resize_head(self.model, head, self.config.num_labels or 0)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MaskGenerator):
            module.reset_parameters()
        elif not isinstance(module, ScatterLinear):
            super()._init_weights(module)

    @property
    def is_parent(self) -> bool:
        """Whether modules can be cut from this model."""
        return self.masks is not None

    @property
    def kinds(self) -> set[str]:
        """Kinds of neurons that have masks."""
        return {site.kind for site in self.sites}

    def set_sites(self, sites: Sequence[NeuronSite]) -> None:
        """Sets the sites of a parent to the same ones with other pruning modes, here and in its configuration."""
        self.sites = list(sites)
        masks = self.parent_masks()
        for mask, site in zip(masks.site_masks(), sites, strict=True):
            mask.site = site
        masks.detach()
        masks.attach(self.model)  # a pruning mode says which layers the masks reach
        self.config.sites = [site.entry for site in sites]

    def set_nemo_config(self, nemo_config: NeMoConfig) -> None:
        """Sets the options of a parent for further training; those that shape its masks can't change (`ValueError`)."""
        for name in SHAPING_OPTIONS:
            before, given = getattr(self.nemo_config, name), getattr(nemo_config, name)
            if name == "targets":  # kinds of neurons that the model has not make no difference
                before, given = ([kind for kind in kinds if kind in self.kinds] for kinds in (before, given))
            if before != given:
                raise ValueError(
                    f"Got {name}={given!r} for a parent trained with {before!r}; expected the same, since the masks "
                    "have that shape. Leave nemo_config out, or start from the plain model."
                )
        self.nemo_config = nemo_config
        self.config.nemo_config = nemo_config.to_dict()
        self.parent_masks().state.detaches_pooled = nemo_config.detach_pooled

    def detach_masks(self) -> PreTrainedModel:
        """Removes the masks of a parent and returns the plain model, with the weights that it has now."""
        self.parent_masks().detach()
        self.masks = None
        for owner, name, value in self.changed_attributes:
            setattr(owner, name, value)
        plain: PreTrainedModel = self.model
        return plain

    def _evaluation_masks(self) -> dict[str, Tensor] | None:
        """Static masks of the module of all labels, or `None` where each input opens its own neurons."""
        config = self.nemo_config
        if not (config.static_evaluation and config.hard_masks and config.has_generators):
            return None
        return module_masks(self.parent_masks(), slice(None), config.relevance_threshold)

    def parent_masks(self) -> NeuronMasks:
        """Returns the masks of a parent; a module has none (`ValueError`)."""
        if self.masks is None:
            raise ValueError("Got a module; expected a parent, which has masks. Load the parent that it was cut from.")
        return self.masks

    def _run(
        self,
        inputs: Mapping[str, Tensor | None],
        labels: Tensor | None,
        static_masks: Mapping[str, Tensor] | None,
        static_samples: Tensor | None,
        output_neuron_masks: bool | None,
        return_dict: bool | None,
        kwargs: Mapping[str, Any],
    ) -> NeMoOutput | tuple[Any, ...]:
        if getattr(self, "_is_replica", False):  # what nn.DataParallel makes; they would share one state
            raise ValueError(
                "Got a parent or module in nn.DataParallel; expected one process a GPU. "
                "Launch with: accelerate launch --num_processes 2 your_script.py, with the number of GPUs."
            )
        self._watch_weights()
        given = {name: value for name, value in inputs.items() if value is not None}
        collected: dict[str, list[Tensor]] = {}
        if self.masks is None:
            if static_masks is not None:
                self.parent_masks()
            outputs = self.model(**given, **kwargs, return_dict=True)
        else:
            attention_mask = given.get("attention_mask", kwargs.get("attention_mask"))
            patches = kwargs.get("pixel_attention_mask")  # of images cut into patches beforehand (SigLIP 2)
            if attention_mask is None and isinstance(patches, Tensor) and patches.ndim == 2:
                attention_mask = patches
            tensors = [value for value in (*given.values(), *kwargs.values()) if isinstance(value, Tensor)]
            if not tensors:
                raise ValueError(f"Got no model inputs; expected {self.main_input_name}.")
            if static_masks is None and not self.training and not output_neuron_masks:
                static_masks = self._evaluation_masks()
            frames = getattr(self.model, "_get_feature_vector_attention_mask", None)
            with self.masks.call(len(tensors[0]), attention_mask, static_masks, static_samples, frames) as collected:
                outputs = self.model(**given, **kwargs, return_dict=True)
        wanted = self.training if output_neuron_masks is None else output_neuron_masks
        result = NeMoOutput(
            loss=None if labels is None else self._task_loss(outputs.logits, labels),
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            neuron_masks={key: torch.stack(calls, 1) for key, calls in collected.items()}
            if wanted and collected
            else None,
            rejection_scores=rejection_scores(energy(outputs.logits, self.config.has_several_labels), rejection)
            if (rejection := self.config.rejection)
            else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.num_labels == 1 and not self.config.has_several_labels:
            raise ValueError(
                "Got labels for a model of one label; expected at least 2, since a single output can't be trained "
                "to choose. Cut a module for more labels."
            )
        check_label_shape(labels, self.config.has_several_labels)
        if self.config.has_several_labels:
            labels = labels.float()
        loss: Tensor = self.loss_function(labels, logits, self.config)
        return loss

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Saves weights, configuration, processor and report.

        A new directory appears whole or not at all. In one that is there already the files are replaced one
        by one when all are written, the configuration last.

        Args:
            save_directory: Where to.
            **kwargs: As in `transformers`; with `push_to_hub=True` the main process uploads the model too, with the
                options of that method. `save_original_format` defaults to `False`, because `Trainer` resumes and
                loads its best model by the names that the weights have in memory.
        """
        self.drop_stale_results()
        base_config = self.config.base_config
        assert isinstance(base_config, PreTrainedConfig)
        base_config.dtype = self.dtype
        super().save_pretrained(save_directory, **kwargs)


def _hashes(tensors: Iterable[Tensor]) -> list[Any]:
    """Hashes of tensors' values; of a sharded tensor, of the part that this process holds."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return [torch.hash_tensor(tensor.detach()).item() for tensor in local if not tensor.is_meta]


def configured_sites(plain: PreTrainedModel, config: NeMoModelConfig) -> list[NeuronSite]:
    """Finds the neuron sites that a configuration names in a plain model, with their pruning modes.

    Raises:
        ValueError: If the model has no such sites.
    """
    entries = config.sites or []
    is_list = all(isinstance(entry, dict) and {"key", "pruning_mode"} <= set(entry) for entry in entries)
    pruning_modes = {entry["key"]: entry["pruning_mode"] for entry in entries} if is_list else {}
    found = model_sites(plain, NeMoConfig.from_dict(config.nemo_config or {}), user_site_entries(entries))
    if not entries or len(pruning_modes) < len(entries) or not set(pruning_modes) <= {site.key for site in found}:
        got = sorted(pruning_modes) if len(pruning_modes) == len(entries) else entries
        raise ValueError(
            f"Got a config.json with the sites {got!r}; expected some of {[site.key for site in found]}, each once "
            "with its pruning mode. It belongs to another base model or version: save the model again."
        )
    return with_pruning_modes([site for site in found if site.key in pruning_modes], pruning_modes)


def base_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters of a parent without generators, or of a module."""
    return int(model.model.num_parameters() if isinstance(model, NeMoPreTrainedModel) else model.num_parameters())
