"""The neuron masks of a whole model, and the size of their generators."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_hf.config import NeMoConfig

from .calls import Calls, FrameMask, MaskedCall, running_backward
from .mask_hooks import ActivityMask, AssignedMask, GeneratedMask, HookHandle, SiteMask, StaticMask
from .sites import NeuronSite

LARGEST_RANK = 64
LEVEL_SCALE = 1e6  # the logarithm of the sparsity factor is stored in millionths


class NeuronMasks(nn.ModuleList):
    """The masks of all sites of a model, in site order; threads may call the model at the same time."""

    sparsity_level: Tensor

    def __init__(self, masks: Iterable[SiteMask], is_hard: bool, detaches_pooled: bool = True) -> None:
        super().__init__(masks)
        self.is_hard, self.detaches_pooled = is_hard, detaches_pooled
        self.calls = Calls()
        # An integer, since a cast of the model to another dtype would change a float buffer.
        self.register_buffer("sparsity_level", torch.zeros((), dtype=torch.int64))
        self._handles: list[HookHandle] = []
        for mask in self.site_masks():
            mask.calls = self.calls

    @property
    def sparsity_factor(self) -> Tensor:
        """Factor by which training towards a target size has scaled the sparsity weight; 1 without a target."""
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
        """Lets the model run as if no masks were attached, in this thread or asyncio task; others keep theirs."""
        with self.calls.off():
            yield

    @contextmanager
    def call(
        self,
        batch_size: int,
        attention_mask: Tensor | None,
        static_masks: Mapping[str, Tensor] | None,
        static_samples: Tensor | None,
        frame_mask: FrameMask | None = None,
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Opens one forward call in this thread, and yields its soft masks: by site, one (batch, neurons) a call."""
        for mask in self.site_masks() if static_masks is not None else ():
            static = (static_masks or {}).get(mask.site.key)
            if static is None or static.shape[-1] != mask.site.neurons:
                got = "no static mask" if static is None else f"a static mask of shape {tuple(static.shape)}"
                raise ValueError(
                    f"Got {got} for {mask.site.key!r}; expected one of {mask.site.neurons} neurons, for each of the "
                    f"{len(self)} sites. Start from parent.masks.open_masks()."
                )
        collected: dict[str, list[Tensor]] = {}
        call = MaskedCall(
            batch_size,
            attention_mask,
            frame_mask,
            static_masks,
            static_samples,
            self.is_hard,
            self.detaches_pooled,
            not self.calls.is_off(),
            collected,
            backward=running_backward(),
        )
        with self.calls.entered(call):
            yield collected

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Lets assigned masks collect the mean squares of their neurons in calls."""
        own = [mask for mask in self.site_masks() if isinstance(mask, AssignedMask)]
        for mask in own:
            mask.is_measured = True
        try:
            yield
        finally:
            for mask in own:
                mask.is_measured = False

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
    """Largest rank, 1 to 64, at which generators take up to 10 % (wide inputs: 6 %) of the model's parameters."""
    share = 0.06 if max(site.in_features for site in sites) >= 384 else 0.10
    biases = sum(site.neurons for site in sites)
    per_rank = sum(site.in_features + site.neurons + 1 for site in sites)
    return int(max(1, min(LARGEST_RANK, (share * base_parameters - biases) // per_rank)))


def untied_parameters(model: PreTrainedModel) -> int:
    """Counts parameters, tied ones once, even if they are not tied yet, as while loading: the rank must be the same."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    own = {tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name not in tied}
    return sum(tensor.numel() for tensor in own)


def build_masks(sites: Sequence[NeuronSite], config: NeMoConfig, base_parameters: int, groups: int) -> NeuronMasks:
    """Builds the masks, not attached yet, of a plain model with `base_parameters` for a number of label groups."""
    masks: list[SiteMask]
    if config.has_generators:
        rank = config.generator_rank or default_rank(sites, base_parameters)
        masks = [GeneratedMask(site, groups, not config.hard_masks, rank) for site in sites]
    else:
        kinds = {"generated": ActivityMask, "assigned": AssignedMask, "static": StaticMask}
        masks = [kinds[config.masks](site, groups, keeps_mean=False) for site in sites]
    return NeuronMasks(masks, config.hard_masks, config.detach_pooled)
