"""Token embeddings of which several tokens share a row: those that a module rarely meets have that of a similar one."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

CHUNK = 4096  # tokens whose similarities to all rows are in memory at once


class SharedEmbedding(nn.Embedding):
    """Embeddings of more tokens than rows: `row_of_token` has shape (tokens,), `weight` (rows, width)."""

    row_of_token: Tensor

    def __init__(self, tokens: int, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("row_of_token", torch.zeros(tokens, dtype=torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows of token ids (...), shape (..., width)."""
        return nn.functional.embedding(self.row_of_token[input], self.weight)


def token_table(model: Any) -> nn.Embedding:
    """The table of a plain model's tokens, as large as its configuration says."""
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError:  # of models that hash characters
        layer = None
    inner = (value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig))
    sizes = [getattr(config, "vocab_size", None) for config in (model.config, *inner)]
    if not isinstance(layer, nn.Embedding) or layer.num_embeddings not in sizes:
        raise ValueError(
            f"Got a {type(model).__name__}, whose input layer is {layer}; expected one table with a row for each "
            "token. Leave the vocabulary as it is."
        )
    return layer


def share_rows(model: nn.Module, table: nn.Embedding, rows: int) -> None:
    """Gives a model's token embeddings so many rows, uninitialised; tables that are tied to this one too."""
    names = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        is_tied = f"{path}.weight" in names and getattr(layer, "num_embeddings", None) == table.num_embeddings
        if layer is table or (is_tied and type(layer) is nn.Embedding):
            shared = SharedEmbedding(table.num_embeddings, rows, table.embedding_dim)
            model.set_submodule(path, shared.to(table.weight.device, table.weight.dtype))


def nearest_rows(table: Tensor, own: Tensor, targets: Collection[int]) -> Tensor:
    """The row of each token of a table (tokens, width): tokens in `own` (rows,) have their own, increasing.

    Others have that of the token in `targets`, some of `own`, whose embedding has the most similar direction.
    """
    directions = nn.functional.normalize(table.detach().float(), dim=-1)
    places = torch.tensor([place for place, token in enumerate(own.tolist()) if token in targets], device=own.device)
    among = directions[own[places]]
    nearest = torch.cat([places[(part @ among.T).argmax(-1)] for part in directions.split(CHUNK)])
    return nearest.scatter(0, own, torch.arange(len(own), device=own.device)).int()


def expanded_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state in which each token has a row of its own."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SharedEmbedding):
            row_of_token = state.pop(f"{path}.row_of_token")
            state[f"{path}.weight"] = layer.weight.detach()[row_of_token]
    return state
