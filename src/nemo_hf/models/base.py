"""Base class of parents and modules: the forward pass with masks, and when measured results no longer hold."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from nemo_hf.config import SHAPING_OPTIONS, NeMoConfig
from nemo_hf.neurons.mask_hooks import MaskGenerator
from nemo_hf.neurons.masks import NeuronMasks, build_masks, untied_parameters
from nemo_hf.neurons.patterns import find_heads
from nemo_hf.neurons.sites import NeuronSite, with_pruning_modes
from nemo_hf.neurons.user_sites import model_sites, user_site_entries
from nemo_hf.pruning.plan import module_masks
from nemo_hf.pruning.resize import ScatterLinear, close_attention, resize, resize_layer
from nemo_hf.pruning.shared_rows import share_rows, token_table
from nemo_hf.pruning.stream import resize_stream

from .config_checks import damaged
from .configuration import PLACE_TASKS, NeMoModelConfig, task_of
from .head_outputs import NeMoOutput
from .labels import place_labels, settle_labels, task_loss
from .positions import check_length
from .rejection import add_rejection
from .saved_model import SavedModel

_RESULTS = threading.RLock()  # held while results are compared with the weights that they belong to


class NeMoPreTrainedModel(SavedModel):
    """A plain classification model with neuron masks (parent), or with sliced layers (module).

    What `transformers` documents for any model answers as on the plain model, which is `model`. So `base_model` is its
    backbone, without the head, and without the mask generators of a parent, which belong to neither.
    """

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
                f"Got a {config.base_class} for {type(self).__name__}; expected a model for {self.task}. Load it with "
                f"the Auto class for {task}."
            )
        self.model: PreTrainedModel = config.build_plain() if base_model is None else base_model
        config.base_config = self.model.config  # the same object, so that changes of attributes reach the plain model
        self.processor_files = {}
        # Attributes of the plain model that are changed while it has masks: owner, name and value before.
        self.changed_attributes: list[tuple[Any, str, Any]] = []
        for name in ("main_input_name", "input_modalities", "supports_gradient_checkpointing"):
            setattr(self, name, getattr(self.model, name))
        self.nemo_config = NeMoConfig.from_dict(config.nemo_config or {})
        self.sites = list(configured_sites(self.model, config) if sites is None else sites)
        self.heads = find_heads(self.model, self.model.config.num_labels or 0)
        self.masks: NeuronMasks | None = None
        if config.role == "module":
            self._resize()
        else:
            self.masks = build_masks(self.sites, self.nemo_config, untied_parameters(self.model), len(config.groups))
        if base_model is not None:  # has its weights; transformers' own switch would act on all threads
            self.__dict__["init_weights"] = lambda: None
        self.post_init()
        self.__dict__.pop("init_weights", None)
        if self.masks is not None:
            self.masks.attach(self.model)

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
        with _RESULTS:
            tensors = [tensor for tensor in self.state_dict(keep_vars=True).values() if not tensor.is_inference()]
            versions = [tensor._version for tensor in tensors]
            is_changed = self._weight_versions not in (None, versions)
            if is_changed or (self._weight_hashes is not None and self._weight_hashes != _hashes(tensors)):
                self._report = self.config.rejection = None
                if not self.is_parent:
                    self.config.equivalence, self.config.is_tuned = None, True
            self._weight_versions, self._weight_hashes = versions, None

    def _watch_weights(self) -> None:
        """Keeps results and weights together in a forward pass: looks for changes, or prepares to see them."""
        has_results = self._report or self.config.rejection or not (self.is_parent or self.config.is_tuned)
        if not has_results or torch.compiler.is_compiling():
            return
        with _RESULTS:
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
                "Got use_reentrant=True, under which masks get no gradient; expected the other kind of activation "
                "checkpointing. Pass use_reentrant=False."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if self.masks is not None:
            gradient_checkpointing_func = partial(self.masks.calls.checkpointed, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    def _resize(self) -> None:
        entries = {entry["key"]: entry for entry in self.config.sites or []}
        for site in self.sites:
            resize(self.model, site, entries[site.key].get("widths", {}))
            kept = entries[site.key].get("kept")
            is_empty = isinstance(kept, list) and kept[-1:] == [0]
            if site.kind == "attention" and is_empty and not self.config.is_tuned:
                close_attention(self.model, site)
        for head, others in self.heads.items():
            resize_layer(self.model, head, outputs=self.num_labels + others)
        if self.config.token_rows:
            share_rows(self.model, token_table(self.model), self.config.token_rows)
        if self.config.stream_width:
            resize_stream(self.model, self.sites, self.config.stream_width)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MaskGenerator):
            module.reset_parameters()
        elif not isinstance(module, ScatterLinear):
            super()._init_weights(module)

    def __getattr__(self, name: str) -> Any:
        """Finds what the plain model's class adds: its parts by name, and methods such as `freeze_feature_encoder`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name[0] == "_" or "model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.model, name)

    @property
    def base_model(self) -> nn.Module:
        """Backbone of the plain model, without the head."""
        return self.model.base_model

    @property
    def num_labels(self) -> int:
        """Number of labels, without a `rejected_label`."""
        return len(self.config.names)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs for a trial run, as the plain model's."""
        return self.model.dummy_inputs

    def get_input_embeddings(self) -> nn.Module:
        """Returns the input embeddings of the plain model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets the input embeddings of the plain model."""
        self.model.set_input_embeddings(value)

    def get_position_embeddings(self) -> Any:
        """Returns the position embeddings of the plain model, where its class has them."""
        return self.model.get_position_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the token embeddings as `transformers` does; a parent refuses another size with a `ValueError`."""
        before: Any = self.get_input_embeddings().weight
        if new_num_tokens not in (None, len(before)) or pad_to_multiple_of:
            self._check_resizable()
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _check_resizable(self) -> None:
        if self.is_parent:
            raise ValueError(
                "Got a parent, whose mask generators have a share of the model's size; expected a plain model or a "
                "module. Resize the plain model before make_parent(...), or a module after the cut."
            )

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Resizes the position embeddings of the plain model, where its class can do so; a parent refuses."""
        self._check_resizable()
        self.model.resize_position_embeddings(new_num_position_embeddings)

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
                    f"Got {name}={given!r} for a parent trained with {before!r}; expected the same. Leave nemo_config "
                    "out, or start from the plain model."
                )
        self.nemo_config = nemo_config
        self.config.nemo_config = nemo_config.to_dict()
        self.parent_masks().detaches_pooled = nemo_config.detach_pooled

    def detach_masks(self) -> PreTrainedModel:
        """Removes the masks of a parent and returns the plain model, with the weights that it has now."""
        masks = self.parent_masks()
        settle_labels(self.config)
        masks.detach()
        self.masks = None
        for owner, name, value in self.changed_attributes:
            setattr(owner, name, value)
        return self.model

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
        if getattr(self, "_is_replica", False):  # what nn.DataParallel makes; they would share hooks
            raise ValueError(
                "Got a parent or module in nn.DataParallel; expected one process per GPU. Run: accelerate launch "
                "--num_processes 2 your_script.py, with the number of GPUs."
            )
        self._watch_weights()
        given = {name: value for name, value in inputs.items() if value is not None}
        check_length(self.model, self.config, {**given, **kwargs})
        labels = place_labels(self, labels) if labels is not None and self.task in PLACE_TASKS else labels
        if self.task == "image-segmentation":  # where the plain model enlarges its logits and weighs other heads
            kwargs = {**kwargs, "labels": labels}
        collected: dict[str, list[Tensor]] = {}
        if static_masks is not None or static_samples is not None or output_neuron_masks:
            self.parent_masks()  # a module has none
        if static_samples is not None and static_masks is None:
            raise ValueError("Got static_samples without static_masks; expected both. Pass static_masks, or neither.")
        if self.masks is None:
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
        result = self._output(outputs, labels, collected if wanted else {})
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _output(self, outputs: Any, labels: Tensor | None, collected: Mapping[str, list[Tensor]]) -> NeMoOutput:
        result = NeMoOutput(
            loss=None if labels is None else task_loss(self, outputs.logits, labels, outputs.get("loss")),
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        # Those of encoders and decoders, and of stages, have names of their own; post-processing needs boxes.
        is_detector = self.task == "object-detection"
        for name in [name for name in outputs if is_detector or name.endswith(("_hidden_states", "_attentions"))]:
            result[name] = outputs[name]
        result.neuron_masks = {key: torch.stack(calls, 1) for key, calls in collected.items()} or None
        add_rejection(result, self.config, not self.training)
        return result

    def own_logits(self, **inputs: Any) -> Tensor:
        """Logits of the model's own labels, without that of a `rejected_label`: (batch, labels)."""
        logits: Tensor = self(**{**inputs, "return_dict": True}).logits
        return logits[..., : self.num_labels]

    def _prepare_to_save(self) -> None:
        self.drop_stale_results()
        settle_labels(self.config)
        assert isinstance(self.config.base_config, PreTrainedConfig)
        self.config.base_config.dtype = self.dtype


def _hashes(tensors: Iterable[Tensor]) -> list[Any]:
    """Hashes of tensors' values; of a sharded tensor, of the part that this process holds."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return [torch.hash_tensor(tensor.detach()).item() for tensor in local if not tensor.is_meta and tensor.numel()]


def configured_sites(plain: PreTrainedModel, config: NeMoModelConfig) -> list[NeuronSite]:
    """Finds the neuron sites that a configuration names in a plain model, with their pruning modes."""
    entries = config.sites or []
    pruning_modes = {entry["key"]: entry["pruning_mode"] for entry in entries}
    found = model_sites(plain, NeMoConfig.from_dict(config.nemo_config or {}), user_site_entries(entries))
    if not entries or len(pruning_modes) < len(entries) or not set(pruning_modes) <= {site.key for site in found}:
        got = f"a config.json with the sites {sorted(entry['key'] for entry in entries)[:12]}"
        raise damaged(got, f"some of {[site.key for site in found][:40]}, each once")
    return with_pruning_modes([site for site in found if site.key in pruning_modes], pruning_modes)


def base_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters of a parent without generators, or of a module."""
    return int((model.model if isinstance(model, NeMoPreTrainedModel) else model).num_parameters())
