"""Attention without values costs nothing: its queries need not be compared with its keys."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CLOSED = "nemo_hf_closed"


class ClosedConfig:
    """A view of a model's configuration for one attention layer, which computes as `CLOSED` says.

    Eager attention stays as it is, since it is asked for where attention weights are wanted.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        value = getattr(self.config, name)
        return CLOSED if name == "_attn_implementation" and value not in (None, "eager") else value


def _closed_attention(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Zeros (batch, tokens, heads, dims), or in training, where parameters need gradients, what attention computes."""
    if layer.training:
        config: Any = layer.config
        attention = ALL_ATTENTION_FUNCTIONS[config.config._attn_implementation]
        return attention(layer, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(()).expand(batch, tokens, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(CLOSED, _closed_attention)
