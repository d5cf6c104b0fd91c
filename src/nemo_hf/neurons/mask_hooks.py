"""The masks of one neuron site: the network that makes them, and the hooks that apply them to a model's layers."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calls import Calls, MaskedCall
from .masked_products import ReplacedForward, apply_mask, expand_mask, is_replaceable, masked_linear
from .sites import NeuronSite, Rows, neuron_dim, spread

MASK_BIAS = 1.0  # at the start: tanh(1) = .76, so that every neuron is open and can still close
HookHandle = torch.utils.hooks.RemovableHandle | ReplacedForward


class MaskGenerator(nn.Module):
    """Low-rank network from a site's pooled input to its soft masks: relu(tanh(W2 relu(W1 p + b1) + b2)).

    NeMo (arXiv 2508.11348) makes the hidden width that of the layer; here it is `rank`.
    """

    def __init__(self, in_features: int, rank: int, neurons: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank)
        self.up = nn.Linear(rank, neurons)
        if not self.up.weight.is_meta:  # where drawing numbers takes long, and nothing keeps them
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights; all neurons start open for inputs of ordinary size."""
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.constant_(self.up.bias, MASK_BIAS)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps pooled inputs (batch, in_features) to soft masks (batch, neurons) in [0, 1), float32."""
        # Without autocast: a mask near 0 must not open or close with the dtype.
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = F.linear(pooled.float(), self.down.weight.float(), self.down.bias.float()).relu()
            return F.linear(hidden, self.up.weight.float(), self.up.bias.float()).tanh().relu()


class SiteMask(nn.Module):
    """Relevance and hooks of one site; the hooks are bound methods, so that those of a deep copy use the copy."""

    relevance: Tensor
    mean_mask: Tensor | None

    def __init__(self, site: NeuronSite, groups: int, keeps_mean: bool) -> None:
        super().__init__()
        self.site = site
        self.calls = Calls()
        # uint8, since a cast of the model to another dtype would change a float buffer
        self.register_buffer("relevance", torch.full((groups, site.neurons), 255, dtype=torch.uint8))
        # Of each group, for modules of soft masks.
        self.register_buffer("mean_mask", torch.ones(groups, site.neurons) if keeps_mean else None)

    def attach(self, model: nn.Module) -> list[HookHandle]:
        """Registers the hooks on a model's layers."""
        handles: list[HookHandle] = []
        # Masking q alone is enough for q.k: the products of closed dimensions are 0. All that is produced is masked
        # where something between there and the output mixes the neurons.
        for rows, part in self.site.produced():
            if part == "query" or self.site.cut_by.is_gated:
                layer = model.get_submodule(rows.layer)
                handles.append(layer.register_forward_hook(partial(self.mask_outputs, rows, part)))
        for path in self.site.readers:
            reader = model.get_submodule(path)
            if is_replaceable(reader):
                handles.append(ReplacedForward(reader, partial(self.masked_forward, reader)))
            else:
                handles.append(reader.register_forward_pre_hook(self.mask_inputs))
        return handles

    def mask_outputs(
        self, rows: Rows, part: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Forward hook: multiplies those outputs of a layer that are the queries, keys, values or units of the site."""
        mask = self._current_for(self.calls.get(), output)
        return None if mask is None else apply_mask(output, rows.spread(self.site.part_mask(part, mask)))

    def mask_inputs(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: multiplies what a layer reads, such as values after attention, or activated units."""
        # Masks of v commute with attention; a unit is closed after the activation, whose value at 0 may not be 0.
        mask = self._read_mask(inputs[0], neuron_dim(layer))
        return None if mask is None else (apply_mask(inputs[0], mask, neuron_dim(layer)), *inputs[1:])

    def masked_forward(self, layer: nn.Linear, hidden_states: Tensor) -> Tensor:
        """Replaces the `forward` of a plain linear layer: as with `mask_inputs`, but with less memory."""
        mask = self._read_mask(hidden_states, -1)
        if mask is None:
            return F.linear(hidden_states, layer.weight, layer.bias)
        return masked_linear(hidden_states, expand_mask(hidden_states, mask), layer.weight, layer.bias)

    def _read_mask(self, hidden_states: Tensor, dim: int) -> Tensor | None:
        """Returns the mask of what a layer reads; `None` if it is to be read as it is."""
        call = self.calls.get()
        call.mark(self.calls, hidden_states)
        mask = self._current_for(call, hidden_states)
        return None if mask is None else self.site.read_mask(mask)

    def _current_for(self, call: MaskedCall, hidden_states: Tensor) -> Tensor | None:
        return self._current(call) if call.is_enabled and not self._is_shared(call, hidden_states) else None

    def _current(self, call: MaskedCall) -> Tensor | None:
        """Returns the mask of a call, (batch, neurons), or `None` if all neurons are open."""
        raise NotImplementedError

    @staticmethod
    def _is_shared(call: MaskedCall, hidden_states: Tensor) -> bool:
        """Whether a tensor belongs to no sample, as relative positions do, which a layer projects as well."""
        return hidden_states.shape[0] % call.batch_size != 0

    def _collect(self, call: MaskedCall, mask: Tensor) -> None:
        if call.collected is not None:
            call.collected.setdefault(self.site.key, []).append(mask)

    def _with_static(self, call: MaskedCall, mask: Tensor) -> Tensor:
        """Replaces a (batch, neurons) mask by the call's static one, for those samples that it is for."""
        static, samples = call.static_masks, call.static_samples
        if static is None:
            return mask
        chosen = torch.ones_like(mask[:, :1], dtype=torch.bool) if samples is None else samples[:, None]
        return torch.where(chosen.to(mask.device), static[self.site.key].to(mask), mask)

    @staticmethod
    def _pool(call: MaskedCall, hidden_states: Tensor) -> Tensor:
        """Mean over a sample's tokens: (batch, tokens, features), or windows of them, to (batch, features)."""
        tokens = hidden_states.reshape(call.batch_size, -1, hidden_states.shape[-1])
        if call.attention_mask is None:
            return tokens.mean(1, dtype=torch.float32)
        admitted = _fit_attention_mask(call, call.attention_mask, tokens.shape[1]).float()
        with torch.autocast(tokens.device.type, enabled=False):  # a sum of many tokens needs float32
            total = (admitted[:, None] @ tokens.float()).squeeze(1)
        return total / admitted.sum(1, keepdim=True).clamp(min=1)


class GeneratedMask(SiteMask):
    """Masks from a generator of hidden width `rank`, which sees what one layer reads (or returns)."""

    def __init__(self, site: NeuronSite, groups: int, keeps_mean: bool, rank: int) -> None:
        super().__init__(site, groups, keeps_mean)
        self.generator = MaskGenerator(site.in_features, rank, site.neurons)

    def attach(self, model: nn.Module) -> list[HookHandle]:
        """Registers the hooks on a model's layers."""
        pooled = model.get_submodule(self.site.pooled)
        if self.site.pooled_output:
            return [pooled.register_forward_hook(self.pool_output), *super().attach(model)]
        return [pooled.register_forward_pre_hook(self.pool_input, with_kwargs=True), *super().attach(model)]

    def pool_input(self, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: makes the call's mask from a layer's first input."""
        call = self.calls.get()
        if call.is_enabled:
            given = inputs[0] if inputs else kwargs[next(iter(inspect.signature(layer.forward).parameters))]
            features = self.site.in_features
            if neuron_dim(layer) == 1 or given.shape[-1] != features:  # images (batch, channels, ...), or flattened
                given = given.reshape(len(given), features, -1).mT
            self._make_mask(call, given)

    def pool_output(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook: makes the call's mask from a layer's (first) output."""
        call = self.calls.get()
        if call.is_enabled:
            self._make_mask(call, output[0] if isinstance(output, tuple) else output)

    def _make_mask(self, call: MaskedCall, hidden_states: Tensor) -> None:
        if self._is_shared(call, hidden_states):
            return
        pooled = self._pool(call, hidden_states)
        mask = self.generator(pooled.detach() if call.detaches_pooled else pooled)
        call.mark(self.calls, mask)
        self._collect(call, mask)
        if call.is_hard:
            # Forward 1[m > 0], backward the gradient of m; the difference is taken first, so that it is 0.
            mask = (mask > 0).float() + (mask - mask.detach())
        # The generator runs for static masks too: parameters without a gradient would stop DDP.
        call.current[self.site.key] = self._with_static(call, mask)

    def _current(self, call: MaskedCall) -> Tensor:
        if self.site.key not in call.current:
            raise RuntimeError(
                f"Got a call of a layer of the site {self.site.key!r} before its input {self.site.pooled!r} was seen. "
                "Name another `pooled` layer in NeMoConfig(sites=[...]), or leave the site out."
            )
        return call.current[self.site.key]


class StaticMask(SiteMask):
    """Leaves all neurons open unless a call brings static masks."""

    def _current(self, call: MaskedCall) -> Tensor | None:
        if call.static_masks is None:
            return None
        return self._with_static(call, torch.ones(call.batch_size, self.site.neurons, device=self.relevance.device))


class ActivityMask(StaticMask):
    """Collects the mean activity of rectified units, as MODA (arXiv 2411.01074) does; static masks alone close them."""

    def _read_mask(self, hidden_states: Tensor, dim: int) -> Tensor | None:
        call = self.calls.get()
        if call.is_enabled and not self._is_shared(call, hidden_states):
            magnitudes = hidden_states.abs() if dim == -1 else hidden_states.abs().flatten(2).mT
            activity = self._pool(call, magnitudes).unflatten(-1, (self.site.neurons, -1)).mean(-1)
            self._collect(call, activity)
        return super()._read_mask(hidden_states, dim)


class AssignedMask(StaticMask):
    """Collects, where it is asked to, the mean squares by which neurons are assigned; static masks alone close them.

    They are those of what is read, values, units and channels, and of queries.
    """

    is_measured = False

    def mask_outputs(
        self, rows: Rows, part: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """As in `SiteMask`."""
        if part == "query" and self.is_measured:
            places = rows.indices(torch.arange(rows.size)).to(output.device)
            self._measure(output.index_select(-1, places), partial(self.site.part_mask, part))
        return super().mask_outputs(rows, part, layer, inputs, output)

    def _read_mask(self, hidden_states: Tensor, dim: int) -> Tensor | None:
        rows = hidden_states if dim == -1 else hidden_states.movedim(1, -1)
        if self.site.kind == "conv":
            self._measure(rows, lambda places: spread(places, rows.shape[-1]))
        else:
            self._measure(rows, self.site.read_mask)
        return super()._read_mask(hidden_states, dim)

    def _measure(self, rows: Tensor, owners: Callable[[Tensor], Tensor]) -> None:
        call = self.calls.get()
        if self.is_measured and call.is_enabled and not self._is_shared(call, rows):
            squares = self._pool(call, rows.float().square())
            places = owners(torch.arange(self.site.neurons, device=rows.device))
            self._collect(call, squares.new_zeros(len(squares), self.site.neurons).index_add_(1, places, squares))


def _fit_attention_mask(call: MaskedCall, attention_mask: Tensor, tokens: int) -> Tensor:
    """Turns an attention mask into one of another number of tokens: (batch, tokens)."""
    if attention_mask.ndim != 2:
        raise ValueError(
            f"Got an attention mask of shape {tuple(attention_mask.shape)}; expected (batch, tokens), since "
            "padding must not change the masks. Pass the tokenizer's own attention mask."
        )
    if attention_mask.shape[1] != tokens and call.frame_mask is not None:
        attention_mask = call.frame_mask(tokens, attention_mask)
    given = attention_mask.shape[1]
    if given < tokens:  # the model itself padded the sequence, or appended tokens that are not text
        return F.pad(attention_mask, (0, tokens - given))
    # A sequence that the model shortened: each token stands for given / tokens of those before.
    places = torch.arange(tokens, device=attention_mask.device) * given // tokens
    return attention_mask if given == tokens else attention_mask.index_select(1, places)
