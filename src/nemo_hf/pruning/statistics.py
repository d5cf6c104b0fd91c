"""What the neurons of a model do on calibration samples: second moments, of the same size for any number of samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hf.neurons.sites import AttentionSite, NeuronSite, Rows, neuron_dim


@dataclass
class Moments:
    """Sums over rows of numbers by head: (rows, heads, dims)."""

    rows: int = 0
    total: Tensor | float = 0.0  # (heads, dims)
    square: Tensor | float = 0.0  # (heads, dims, dims), or (heads, dims) if only that diagonal is kept

    def add(self, values: Tensor, is_diagonal: bool) -> None:
        """Adds rows."""
        values = values.float()
        square = values.square().sum(0) if is_diagonal else torch.einsum("nhi,nhj->hij", values, values)
        self.rows += len(values)
        self.total = self.total + values.sum(0).double()
        self.square = self.square + square.double()

    def second(self) -> Tensor:
        """Mean of products, (heads, dims, dims) or (heads, dims)."""
        return torch.as_tensor(self.square) / max(1, self.rows)

    def covariance(self) -> Tensor:
        """The same around the mean."""
        mean = torch.as_tensor(self.total) / max(1, self.rows)
        second = self.second()
        return second - (mean.square() if second.ndim == 2 else mean[..., :, None] * mean[..., None, :])


@dataclass
class SiteStatistics:
    """Moments of what the readers of a site read, by path, and of an attention site's q and k."""

    read: dict[str, Moments] = field(default_factory=dict)
    query: Moments = field(default_factory=Moments)
    key: Moments = field(default_factory=Moments)


def admitted_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask of texts, (batch, tokens), or `None`."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def admitted_rows(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Rows (rows, features) of what a layer reads or returns, without those of padding."""
    rows, mask = values.detach().flatten(0, -2), admitted_tokens(inputs)
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.flatten().to(rows.device, torch.bool)]


@torch.no_grad()
def measure_sites(
    model: nn.Module,
    sites: Sequence[NeuronSite],
    batches: Iterable[Mapping[str, Any]],
    on_batch: Callable[[Any], None] = lambda outputs: None,
) -> dict[str, SiteStatistics]:
    """Runs a model once over all batches; returns statistics by site key. `on_batch` gets the outputs of each."""
    found = {site.key: SiteStatistics() for site in sites}
    inputs: Mapping[str, Any] = {}

    def on_read(moments: Moments, heads: int | None, layer: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].movedim(1, -1) if neuron_dim(layer) == 1 else args[0]
        rows = admitted_rows(values, inputs if values is args[0] else {})
        moments.add(rows.unflatten(-1, (heads or 1, -1)), is_diagonal=heads is None)

    def on_made(moments: Moments, rows: Rows, heads: int, layer: nn.Module, args: Any, output: Tensor) -> None:
        own = output.index_select(-1, rows.indices(torch.arange(rows.size)).to(output.device))
        moments.add(admitted_rows(own, inputs).unflatten(-1, (heads, -1)), is_diagonal=False)

    with ExitStack() as stack:
        for site in sites:
            own = found[site.key]
            for path in site.readers:
                own.read[path] = Moments()
                hook = partial(on_read, own.read[path], site.heads if isinstance(site, AttentionSite) else None)
                stack.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
            if isinstance(site, AttentionSite):
                for moments, rows, heads in (
                    (own.query, site.query, site.heads),
                    (own.key, site.key_rows, site.key_value_heads),
                ):
                    hook = partial(on_made, moments, rows, heads)
                    stack.callback(model.get_submodule(rows.layer).register_forward_hook(hook).remove)
        for inputs in batches:
            on_batch(model(**inputs, return_dict=True))
    return found
