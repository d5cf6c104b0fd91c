"""Neuron masks: the generators, how they attach to a plain model, and the state of one forward call."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .config import NeMoConfig
from .generators import MaskGenerator
from .neurons import NeuronSite, neuron_dim
from .products import ForwardHandle, can_be_masked, for_all, masked_linear, times

LARGEST_RANK = 64

LEVEL_SCALE = 1e6
"""The logarithm of the sparsity factor is stored in millionths."""


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
    """Generator, relevance and hooks of one site.

    The hooks are methods of a layer and not closures, so that a deep copy of the model drives its own.

    Args:
        site: The site.
        rank: Hidden width of the generator.
        groups: Number of label groups.
        keeps_mean: Whether mean mask values are kept for modules, as soft masks need.
    """

    relevance: Tensor
    mean_mask: Tensor | None

    def __init__(self, site: NeuronSite, rank: int, groups: int, keeps_mean: bool) -> None:
        super().__init__()
        self.site = site
        self.generator = MaskGenerator(site.in_features, rank, site.neurons)
        self.state = CallState()
        # uint8, since a cast of the model to another dtype would change a float buffer
        self.register_buffer("relevance", torch.full((groups, site.neurons), 255, dtype=torch.uint8))
        self.register_buffer("mean_mask", torch.ones(groups, site.neurons) if keeps_mean else None)

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle | ForwardHandle]:
        """Registers the hooks on a model's layers and returns their handles."""
        pooled = model.get_submodule(self.site.pooled)
        handles: list[torch.utils.hooks.RemovableHandle | ForwardHandle] = [
            pooled.register_forward_hook(self.pool_output)
            if self.site.pooled_output
            else pooled.register_forward_pre_hook(self.pool_input, with_kwargs=True)
        ]
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
        if state.collected is not None:
            state.collected.setdefault(self.site.key, []).append(mask)
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

    def _pooled(self, hidden_states: Tensor) -> Tensor:
        """Mean over a sample's tokens: (batch, tokens, features), or windows of them, to (batch, features)."""
        batch, attention_mask = self.state.batch_size, self.state.attention_mask
        tokens = hidden_states.reshape(batch, -1, hidden_states.shape[-1])
        if attention_mask is None:
            return tokens.mean(1, dtype=torch.float32)
        admitted = self._fitted(attention_mask, tokens.shape[1]).to(tokens.dtype)[:, :, None]
        total = (tokens * admitted).sum(1, dtype=torch.float32)
        return total / admitted.sum(1, dtype=torch.float32).clamp(min=1)

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

    def _current(self) -> Tensor:
        if self.site.key not in self.state.current:
            raise RuntimeError(
                f"Got a call of a layer of the site {self.site.key!r} before its input {self.site.pooled!r} was seen; "
                "expected it after. Name another `pooled` layer in NeMoConfig(sites=[...]), or leave the site out."
            )
        return self.state.current[self.site.key]

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


class NeuronMasks(nn.ModuleList):
    """The masks of all sites of a model, in site order, with one shared call state.

    Args:
        sites: The sites.
        rank: Hidden width of the generators.
        groups: Number of label groups.
        is_hard: Whether the forward pass sees 0/1 masks.
        detaches_pooled: Whether no gradient goes through the generators' inputs.
    """

    sparsity_level: Tensor

    def __init__(
        self, sites: Sequence[NeuronSite], rank: int, groups: int, is_hard: bool, detaches_pooled: bool = True
    ) -> None:
        super().__init__(SiteMask(site, rank, groups, keeps_mean=not is_hard) for site in sites)
        self.state = CallState()
        self.state.is_hard = is_hard
        self.state.detaches_pooled = detaches_pooled
        # An integer, since a cast of the model to another dtype would change a float buffer.
        self.register_buffer("sparsity_level", torch.zeros((), dtype=torch.int64))
        self._handles: list[torch.utils.hooks.RemovableHandle | ForwardHandle] = []
        for mask in self.site_masks():
            mask.state = self.state

    @property
    def sparsity_factor(self) -> Tensor:
        """Factor of the sparsity weight that training under a size target has come to; 1 without one."""
        return (self.sparsity_level.double() / LEVEL_SCALE).exp().float()

    def steer(self, change: Tensor) -> None:
        """Adds to the logarithm of `sparsity_factor`."""
        self.sparsity_level += (change.double() * LEVEL_SCALE).round().long()

    def site_masks(self) -> Iterator[SiteMask]:
        """Iterates over the masks with their type."""
        for mask in self:
            assert isinstance(mask, SiteMask)
            yield mask

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks on the model's layers."""
        self._handles = [handle for mask in self.site_masks() for handle in mask.attach(model)]

    def detach(self) -> None:
        """Removes the hooks; the model is what it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Lets the model run as if no masks were attached."""
        before, self.state.is_enabled = self.state.is_enabled, False
        try:
            yield
        finally:
            self.state.is_enabled = before

    @contextmanager
    def call(
        self,
        batch_size: int,
        attention_mask: Tensor | None,
        static_masks: Mapping[str, Tensor] | None,
        static_samples: Tensor | None,
        frame_mask: FrameMask | None = None,
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Sets the state of one forward call and collects its soft masks.

        Args:
            batch_size: Number of samples.
            attention_mask: 1 for tokens, 0 for padding, shape (batch, tokens), or `None`.
            static_masks: Site key to masks of shape (neurons,) or (batch, neurons) in place of the
                generated ones, or `None`.
            static_samples: Samples that take the static masks, boolean, shape (batch,); `None`: all.
            frame_mask: How an attention mask of another length becomes one of the tokens, or `None`.

        Yields:
            Site key to soft masks of shape (batch, neurons), one a call of the site; filled as the
            model runs.
        """
        state = self.state
        if static_masks is not None:
            self._check_static(static_masks)
        state.batch_size, state.attention_mask, state.frame_mask = batch_size, attention_mask, frame_mask
        state.static_masks, state.static_samples = static_masks, static_samples
        collected: dict[str, list[Tensor]] = {}
        state.collected = collected
        try:
            yield collected
        finally:
            state.collected = None
            state.current = {}

    def _check_static(self, static_masks: Mapping[str, Tensor]) -> None:
        for mask in self.site_masks():
            static = static_masks.get(mask.site.key)
            if static is None or static.shape[-1] != mask.site.neurons:
                raise ValueError(
                    f"Got static masks with {None if static is None else tuple(static.shape)} for {mask.site.key!r}; "
                    f"expected a mask of {mask.site.neurons} neurons for each of the {len(self)} sites. "
                    "Start from parent.masks.open_masks()."
                )

    def relevance(self) -> dict[str, Tensor]:
        """Returns site key to relevance, uint8, shape (groups, neurons): round(255 f)."""
        return {mask.site.key: mask.relevance for mask in self.site_masks()}

    def dead_share(self) -> float:
        """Returns the share of neurons that no group opens; without a gradient they stay closed."""
        dead = [relevance.amax(0) == 0 for relevance in self.relevance().values()]
        return torch.cat(dead).float().mean().item()

    def open_masks(self) -> dict[str, Tensor]:
        """Returns static masks that keep every neuron."""
        return {m.site.key: torch.ones(m.site.neurons, device=m.relevance.device) for m in self.site_masks()}


def default_rank(sites: Sequence[NeuronSite], base_parameters: int) -> int:
    """Largest generator rank within the budget of parameters.

    Args:
        sites: The sites that get generators.
        base_parameters: Number of parameters of the plain model.

    Returns:
        A rank from 1 to 64: generators take at most 10 % of `base_parameters`, 6 % if a site's input is
        384 or wider.
    """
    share = 0.06 if max(site.in_features for site in sites) >= 384 else 0.10
    biases = sum(site.neurons for site in sites)
    per_rank = sum(site.in_features + site.neurons + 1 for site in sites)
    return int(max(1, min(LARGEST_RANK, (share * base_parameters - biases) // per_rank)))


def untied_parameters(model: PreTrainedModel) -> int:
    """Counts parameters, those that the configuration ties once, whether or not they are tied yet.

    Models are loaded into builds without tying: the rank of the generators must be the same there.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    own = {tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name not in tied}
    return sum(tensor.numel() for tensor in own)


def build_masks(sites: Sequence[NeuronSite], config: NeMoConfig, base_parameters: int, groups: int) -> NeuronMasks:
    """Builds the masks for a model's sites as the options say.

    Args:
        sites: The model's sites.
        config: The options.
        base_parameters: Number of parameters of the plain model.
        groups: Number of label groups.

    Returns:
        Masks that are not attached yet.
    """
    rank = config.generator_rank or default_rank(sites, base_parameters)
    return NeuronMasks(sites, rank, groups, config.hard_masks, config.detach_pooled)
