"""The masks of one site: where they come from, how they reach a plain model's layers, and the state of a call."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .generators import MaskGenerator
from .masked_products import ForwardHandle, can_be_masked, for_all, masked_linear, times
from .sites import NeuronSite, neuron_dim

Handle = torch.utils.hooks.RemovableHandle | ForwardHandle

FrameMask = Callable[[int, Tensor], Tensor]
"""Turns the attention mask of a recording's samples into one of the given number of frames."""


class CallState:
    """What the masks of one forward call depend on.

    It stays until the next call, because activation checkpointing replays layers in the backward pass.
    Only the collector is closed when the call returns, so that replays add nothing to it.
    """

    def __init__(self) -> None:
        self.is_enabled = True
        self.is_hard = True
        self.detaches_pooled = True
        self.batch_size = 0
        self.attention_mask: Tensor | None = None
        self.frame_mask: FrameMask | None = None
        self.static_masks: Mapping[str, Tensor] | None = None
        self.static_samples: Tensor | None = None
        self.collected: dict[str, list[Tensor]] | None = None
        self.current: dict[str, Tensor] = {}

    def check_is_open(self) -> None:
        """Refuses layers that run outside a call, where the state is that of an older one."""
        if self.collected is not None:
            return
        # The id of the running backward pass, as torch's own checkpointing asks for it; -1 if there is none.
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                "Got a call of the base model inside a parent; expected a call of the parent itself, which sets the "
                "masks. Call parent(...), or run parent.model within `parent.masks.disabled()`."
            )
        # A replay: drop its last mask when the backward pass ends, lest it keep a graph alive.
        torch.autograd.Variable._execution_engine.queue_callback(self._drop_current)

    def _drop_current(self) -> None:
        self.current = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallState":
        # A call's tensors belong to the graph of the model that made them, not to its copy.
        copied = CallState()
        copied.is_enabled, copied.is_hard = self.is_enabled, self.is_hard
        copied.detaches_pooled = self.detaches_pooled
        return copied


class SiteMask(nn.Module):
    """Relevance and hooks of one site.

    The hooks are methods of a layer and not closures, so that a deep copy of the model drives its own.

    Args:
        site: The site.
        groups: Number of label groups.
        keeps_mean: Whether mean mask values are kept for modules, as soft masks need.
    """

    relevance: Tensor
    mean_mask: Tensor | None

    def __init__(self, site: NeuronSite, groups: int, keeps_mean: bool) -> None:
        super().__init__()
        self.site = site
        self.state = CallState()
        # uint8, since a cast of the model to another dtype would change a float buffer
        self.register_buffer("relevance", torch.full((groups, site.neurons), 255, dtype=torch.uint8))
        self.register_buffer("mean_mask", torch.ones(groups, site.neurons) if keeps_mean else None)

    def attach(self, model: nn.Module) -> list[Handle]:
        """Registers the hooks on a model's layers and returns their handles."""
        handles: list[Handle] = []
        hooks = {"query": self.mask_query, "key": self.mask_key, "value": self.mask_value, "units": self.mask_units}
        gated = [
            (rows.layer, part) for rows, part in self.site.produced() if part == "query" or self.site.cut_by.is_gated
        ]
        for layer, part in dict.fromkeys(gated):
            handles.append(model.get_submodule(layer).register_forward_hook(hooks[part]))
        for reader in self.site.readers:
            reading = model.get_submodule(reader)
            if can_be_masked(reading):
                handles.append(ForwardHandle(reading, partial(self.read_masked, reading)))
            else:
                handles.append(reading.register_forward_pre_hook(self.mask_output_inputs))
        return handles

    def _pooled(self, hidden_states: Tensor) -> Tensor:
        """Mean over a sample's tokens: (batch, tokens, features), or windows of them, to (batch, features)."""
        batch, attention_mask = self.state.batch_size, self.state.attention_mask
        tokens = hidden_states.reshape(batch, -1, hidden_states.shape[-1])
        if attention_mask is None:
            return tokens.mean(1, dtype=torch.float32)
        admitted = self._fitted(attention_mask, tokens.shape[1]).float()
        with torch.autocast(tokens.device.type, enabled=False):  # a sum of many tokens needs float32
            total = (admitted[:, None] @ tokens.float()).squeeze(1)
        return total / admitted.sum(1, keepdim=True).clamp(min=1)

    def _fitted(self, attention_mask: Tensor, tokens: int) -> Tensor:
        """Turns an attention mask into one of another number of tokens: (batch, tokens)."""
        if attention_mask.ndim != 2:
            raise ValueError(
                f"Got an attention mask of shape {tuple(attention_mask.shape)}; expected (batch, tokens), since "
                "padding must not change the masks. Pass the tokenizer's own attention mask."
            )
        if attention_mask.shape[1] != tokens and self.state.frame_mask is not None:
            attention_mask = self.state.frame_mask(tokens, attention_mask)
        given = attention_mask.shape[1]
        if given < tokens:  # the model itself padded the sequence at its end, or put tokens there that are no text
            return F.pad(attention_mask, (0, tokens - given))
        # A sequence that the model shortened: each token stands for given / tokens of those before.
        places = torch.arange(tokens, device=attention_mask.device) * given // tokens
        return attention_mask if given == tokens else attention_mask.index_select(1, places)

    def _is_shared(self, hidden_states: Tensor) -> bool:
        """Whether a tensor belongs to no sample, as relative positions do, which a layer projects as well."""
        return hidden_states.shape[0] % self.state.batch_size != 0

    def _collect(self, mask: Tensor) -> None:
        if self.state.collected is not None:
            self.state.collected.setdefault(self.site.key, []).append(mask)

    def _current(self) -> Tensor:
        """The mask of the running call, (batch, neurons)."""
        raise NotImplementedError

    def mask_query(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Multiplies the rows of q: q.k over the open dimensions is the same as masking both."""
        return self._mask_produced("query", output)

    def mask_key(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Multiplies the rows of k, where something else than q reads them too."""
        return self._mask_produced("key", output)

    def mask_value(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Multiplies the rows of v, where attention is not all that lies between them and the output."""
        return self._mask_produced("value", output)

    def mask_units(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Multiplies units before the activation, where something between there and the output mixes them."""
        return self._mask_produced("units", output)

    def _mask_produced(self, part: str, output: Tensor) -> Tensor | None:
        if not self.state.is_enabled or self._is_shared(output):
            return None
        rows = [rows for rows, name in self.site.produced() if name == part]
        for own in rows:
            if own.layer == rows[0].layer:  # a fused layer, or one of several alike
                output = times(output, own.spread(self.site.part_mask(part, self._current())))
        return output

    def mask_output_inputs(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Multiplies what the output projection reads: values after attention, or activated units.

        Masks of v commute with attention; units are masked after the activation, so that a closed one
        is 0 for activations with act(0) != 0 as well.
        """
        if not self.state.is_enabled or self._is_shared(inputs[0]):
            return None
        return (times(inputs[0], self.site.read_mask(self._current()), neuron_dim(layer)), *inputs[1:])

    def read_masked(self, layer: nn.Linear, hidden_states: Tensor) -> Tensor:
        """Runs an output projection on masked inputs, as `mask_output_inputs` before it, with less memory."""
        if not self.state.is_enabled or self._is_shared(hidden_states):
            return F.linear(hidden_states, layer.weight, layer.bias)
        mask = for_all(hidden_states, self.site.read_mask(self._current()))
        return masked_linear(hidden_states, mask, layer.weight, layer.bias)


class GeneratedMask(SiteMask):
    """Masks that a generator makes of what a layer reads.

    Args:
        site: As in `SiteMask`. `groups` and `keeps_mean` likewise.
        groups: As in `SiteMask`.
        keeps_mean: As in `SiteMask`.
        rank: Hidden width of the generator.
    """

    def __init__(self, site: NeuronSite, groups: int, keeps_mean: bool, rank: int) -> None:
        super().__init__(site, groups, keeps_mean)
        self.generator = MaskGenerator(site.in_features, rank, site.neurons)

    def attach(self, model: nn.Module) -> list[Handle]:
        """Registers the hooks on a model's layers and returns their handles."""
        pooled = model.get_submodule(self.site.pooled)
        handle = (
            pooled.register_forward_hook(self.pool_output)
            if self.site.pooled_output
            else pooled.register_forward_pre_hook(self.pool_input, with_kwargs=True)
        )
        return [handle, *super().attach(model)]

    def pool_input(self, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the call's mask from a layer's first input."""
        if self.state.is_enabled:
            given = inputs[0] if inputs else kwargs[next(iter(inspect.signature(layer.forward).parameters))]
            self._make_mask(self._positions_first(given, neuron_dim(layer)))

    def pool_output(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Makes the call's mask from a layer's (first) output."""
        if self.state.is_enabled:
            self._make_mask(output[0] if isinstance(output, tuple) else output)

    def _positions_first(self, hidden_states: Tensor, dim: int) -> Tensor:
        """Turns images (batch, channels, height, width) to (batch, positions, channels), flattened ones as well."""
        features = self.site.in_features
        if dim != 1 and hidden_states.shape[-1] == features:
            return hidden_states
        return hidden_states.reshape(len(hidden_states), features, -1).mT

    def _make_mask(self, hidden_states: Tensor) -> None:
        state = self.state
        state.check_is_open()
        if self._is_shared(hidden_states):
            return
        pooled = self._pooled(hidden_states)
        mask = self.generator(pooled.detach() if state.detaches_pooled else pooled)
        self._collect(mask)
        if state.is_hard:
            # Forward 1[m > 0], backward the gradient of m; the difference is taken first, so that it is 0.
            mask = (mask > 0).float() + (mask - mask.detach())
        if state.static_masks is not None:
            # The generator runs all the same: parameters without a gradient would stop DDP.
            static = state.static_masks[self.site.key].to(mask)
            samples = state.static_samples
            everywhere = torch.ones_like(mask[:, :1], dtype=torch.bool)
            mask = torch.where(everywhere if samples is None else samples[:, None], static, mask)
        state.current[self.site.key] = mask

    def _current(self) -> Tensor:
        if self.site.key not in self.state.current:
            raise RuntimeError(
                f"Got a call of a layer of the site {self.site.key!r} before its input {self.site.pooled!r} was seen; "
                "expected it after. Name another `pooled` layer in NeMoConfig(sites=[...]), or leave the site out."
            )
        return self.state.current[self.site.key]


class ActivityMask(SiteMask):
    """What rectified units do themselves, in place of a mask: one that is 0 for a sample counts as closed.

    No sample closes any neuron; only static masks do.

    References:
        MODA (arXiv 2411.01074): the activity of a channel is its mean over positions, and a unit belongs to a
        class by the share of its samples in which it is active.
    """

    def _observe(self, given: Tensor, dim: int) -> None:
        """Collects the mean over positions of what one reader of the units reads; several readers are as many calls."""
        self.state.check_is_open()
        magnitudes = given.abs() if dim == -1 else given.abs().flatten(2).mT
        self._collect(self._pooled(magnitudes).unflatten(-1, (self.site.neurons, -1)).mean(-1))

    def _current(self) -> Tensor:
        """The static mask of the running call, (batch, neurons), 1 for samples that it is not for."""
        static, samples = self.state.static_masks, self.state.static_samples
        assert static is not None
        mask = static[self.site.key].to(self.relevance.device, torch.float32).expand(self.state.batch_size, -1)
        return mask if samples is None else torch.where(samples[:, None].to(mask.device), mask, 1.0)

    def mask_output_inputs(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Observes what a layer reads; static masks multiply it."""
        if self.state.is_enabled and not self._is_shared(inputs[0]):
            self._observe(inputs[0], neuron_dim(layer))
        return None if self.state.static_masks is None else super().mask_output_inputs(layer, inputs)

    def read_masked(self, layer: nn.Linear, hidden_states: Tensor) -> Tensor:
        """As `mask_output_inputs`, with the layer."""
        if self.state.is_enabled and not self._is_shared(hidden_states):
            self._observe(hidden_states, -1)
        if self.state.static_masks is None:
            return F.linear(hidden_states, layer.weight, layer.bias)
        return super().read_masked(layer, hidden_states)

    def _mask_produced(self, part: str, output: Tensor) -> Tensor | None:
        return None if self.state.static_masks is None else super()._mask_produced(part, output)
