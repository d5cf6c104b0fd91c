"""The neuron masks of a whole model, and how many parameters their generators take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_hf.config import NeMoConfig

from .mask_hooks import ActivityMask, CallState, FrameMask, GeneratedMask, Handle, SiteMask
from .sites import NeuronSite

LARGEST_RANK = 64

LEVEL_SCALE = 1e6
"""The logarithm of the sparsity factor is stored in millionths."""


class NeuronMasks(nn.ModuleList):
    """The masks of all sites of a model, in site order, with one shared call state.

    Args:
        masks: The masks of the sites.
        is_hard: Whether the forward pass sees 0/1 masks.
        detaches_pooled: Whether no gradient goes through the generators' inputs.
    """

    sparsity_level: Tensor

    def __init__(self, masks: Iterable[SiteMask], is_hard: bool, detaches_pooled: bool = True) -> None:
        super().__init__(masks)
        self.state = CallState()
        self.state.is_hard = is_hard
        self.state.detaches_pooled = detaches_pooled
        # An integer, since a cast of the model to another dtype would change a float buffer.
        self.register_buffer("sparsity_level", torch.zeros((), dtype=torch.int64))
        self._handles: list[Handle] = []
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
    masks: list[SiteMask]
    if not config.has_generators:
        masks = [ActivityMask(site, groups, keeps_mean=False) for site in sites]
    else:
        rank = config.generator_rank or default_rank(sites, base_parameters)
        masks = [GeneratedMask(site, groups, not config.hard_masks, rank) for site in sites]
    return NeuronMasks(masks, config.hard_masks, config.detach_pooled)
