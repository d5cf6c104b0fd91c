"""A text model's table of absolute positions, and whether inputs fit into it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .processors import SPARE_POSITIONS

POSITIONS = re.compile(r".*(position|wpe)[^.]*")  # names of the layers that hold position tables
OFFSET = 2  # rows of BART's tables before the first position


def position_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Embeddings that are called tables of positions, by path."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Embedding)}
    return {path: layer for path, layer in layers.items() if POSITIONS.fullmatch(path)}


def position_table(model: nn.Module, size: int | None) -> nn.Embedding | None:
    """The table of a plain model, if there is one alone, as long as `max_position_embeddings`, `size`, says."""
    found = list(position_tables(model).values())
    is_known = len(found) == 1 and size is not None and found[0].num_embeddings - size in (0, OFFSET)
    return found[0] if is_known else None


def position_offset(table: nn.Embedding) -> int:
    """Where positions count from: those of RoBERTa from behind that of padding."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def check_length(model: nn.Module, config: Any, inputs: Mapping[str, Any]) -> None:
    """Refuses inputs with more tokens than a plain model has absolute positions."""
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    given, size = embeddings if ids is None else ids, getattr(config, "max_position_embeddings", None)
    if torch.compiler.is_compiling() or inputs.get("position_ids") is not None:
        return
    if not isinstance(given, Tensor) or given.ndim < 2 or not size or given.shape[1] <= size - SPARE_POSITIONS:
        return  # tables are looked for if need be
    tables = list(position_tables(model).values())
    kinds = {(table.num_embeddings, table.padding_idx) for table in tables}
    if len(kinds) != 1 or tables[0].num_embeddings - size not in (0, OFFSET):
        return
    tokens, most, padding = given.shape[1], size - position_offset(tables[0]), tables[0].padding_idx
    if tokens > most and padding is not None:  # then padding takes no position, and ESM's table is for ids alone
        tokens = 0 if ids is None else int((ids != padding).sum(1).max())
    elif tokens > most and tables[0].num_embeddings > size and inputs.get("attention_mask") is not None:  # as OPT's
        tokens = int(inputs["attention_mask"].sum(1).max())
    if tokens > most:
        raise ValueError(
            f"Got an input of {tokens} tokens; expected at most {most}, for which this {type(model).__name__} has "
            f"positions. Pass truncation=True, max_length={most} to the tokenizer or pipeline."
        )
