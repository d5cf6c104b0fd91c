"""Makes a text module's tables smaller: the tokens and the positions that its inputs use stay."""

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nemo_hf.pruning.shared_rows import nearest_rows, token_table
from nemo_hf.pruning.tokenizer_cut import check_kind, cut_tokenizer, kept_tokens, vocabulary_of

from .atomic_writes import scratch_directory
from .base import NeMoPreTrainedModel
from .positions import position_offset, position_table, position_tables
from .rebuilding import replace_module

TOKENIZER_JSON = "tokenizer.json"
NOT_OF_TOKENIZERS = ("preprocessor_config.json", "processor_config.json")  # stay beside a new tokenizer
IDS = "input_ids"
WORD_STARTS = "\u2581\u0120"  # marks of SentencePiece and of byte-level BPE
TOKEN_ID = re.compile(r".*_token_(id|ids|index)")  # entries of configurations
CHECKED_SAMPLES, CHECKED_TEXTS = 8, 200

Batches = Iterable[Any]


def shrink_vocabulary(
    module: NeMoPreTrainedModel, tokenizer: Any, batches: Batches, held_out: Sequence[Any] = ()
) -> dict[str, float]:
    """Reduces the vocabulary of a text module to the tokens of some batches, in place.

    Kept are the tokens that the batches have, special and added tokens, single characters or bytes, and what BPE merges
    need. So these texts have the same tokens and the same logits as before, and any other text still encodes, in more
    tokens perhaps. The module carries the new tokenizer, and what it measured before is dropped: calibrate its
    rejection, and evaluate it, afterwards.

    Args:
        module: A module, whose inputs are token ids.
        tokenizer: The fast tokenizer that made the batches, of kind WordPiece, BPE or Unigram.
        batches: Batches of model inputs by name, alone or as the first entry of a pair; `input_ids` have shape
            (batch, tokens). They are read once.
        held_out: Batches of other texts, in the same tokens, whose `unseen_share` is to be in the report.

    Returns:
        A report: `tokens_before`, `tokens` (rows of the embedding), `seen_tokens` (of the batches), and the bytes that
        are saved: `weight_bytes_saved` and `tokenizer_bytes_saved`.

    Raises:
        TypeError: If the module is a parent or a plain model.
        ValueError: If the tokenizer is slow, of another kind or of another model, if the model doesn't look its tokens
            up in one table, or if the reduced module has other answers. The module is unchanged then.
    """
    data = _tokenizer_data(module, tokenizer)
    check_kind(data)
    table = token_table(module.model).weight
    rows = len(table)
    seen, first, texts = _read(batches, tokenizer)
    _check_ids(seen, rows, vocabulary_of(data).values())
    named = {index for _, _, ids in _token_ids(module.config) for index in ids if 0 <= index < rows}
    kept = kept_tokens(data, {*seen, *named, *tokenizer.all_special_ids})
    chosen = torch.tensor([index for index in kept if index < rows], device=table.device)
    reduced = _reloaded(tokenizer, cut_tokenizer(data, kept))
    _check_tokens(tokenizer, reduced, texts)
    config = _renumbered(module.config, kept, rows, len(chosen))
    state = module.state_dict(keep_vars=True)
    state = {name: value[chosen] if value is table else value for name, value in state.items()}
    lookup = torch.full((kept[-1] + 1,), -1).scatter(0, torch.tensor(kept), torch.arange(len(kept)))
    after = {name: lookup[value.cpu()] if name.endswith(IDS) else value for name, value in first.items()}
    saved = replace_module(module, config, state, [(first, after)])
    return {
        "tokens_before": rows,
        "tokens": len(chosen),
        "seen_tokens": len(seen),
        "weight_bytes_saved": saved,
        "tokenizer_bytes_saved": _carry(module, tokenizer, reduced),
        **_unseen_share(kept, tokenizer.all_special_ids, held_out),
    }


def share_tokens(
    module: NeMoPreTrainedModel, tokenizer: Any, batches: Batches, extra_tokens: int = 0, held_out: Sequence[Any] = ()
) -> dict[str, float]:
    """Lets tokens that some batches lack share the embeddings of tokens that they have, in place.

    Each takes the row of the one whose embedding has the most similar direction. The tokenizer stays: any text has the
    same tokens as before, and texts of tokens in the batches have the same logits. What the module measured before is
    dropped: calibrate its rejection, and evaluate it, afterwards.

    Args:
        module: A module, whose inputs are token ids.
        tokenizer: The tokenizer that made the batches, of any kind.
        batches: Batches as `shrink_vocabulary` takes them.
        extra_tokens: How many words that the batches lack keep rows of their own: those first in the vocabulary, where
            frequent ones are.
        held_out: As in `shrink_vocabulary`.

    Returns:
        A report: `tokens`, `token_rows` (of the embedding), `seen_tokens` (of the batches), `weight_bytes_saved`.

    Raises:
        TypeError: If the module is a parent or a plain model.
        ValueError: If the batches are of another tokenizer, or if the model doesn't look its tokens up in one table by
            an `nn.Embedding`. The module is unchanged then.
    """
    _check_module(module)
    layer = token_table(module.model)
    if type(layer) is not nn.Embedding:
        raise ValueError(
            f"Got token embeddings of the class {type(layer).__name__}; expected an nn.Embedding. Take "
            "vocabulary='calibration' for another class."
        )
    table, vocab = layer.weight, tokenizer.get_vocab()
    seen, first, _ = _read(batches, tokenizer)
    _check_ids(seen, len(table), vocab.values())
    named = {index for _, _, ids in _token_ids(module.config) for index in ids}
    special = {*named, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = sorted(index for token, index in vocab.items() if len(token) > 2 and token.lstrip(WORD_STARTS).isalpha())
    extra = [index for index in words if index not in seen | special][:extra_tokens]
    own = torch.tensor(sorted(index for index in {*seen, *special, *extra} if 0 <= index < len(table)))
    row_of_token = nearest_rows(table, own.to(table.device), {*seen, *extra} - special)
    config = copy.deepcopy(module.config)
    config.token_rows = len(own)
    state = dict(module.state_dict(keep_vars=True))
    for name in [name for name, value in state.items() if value is table]:
        state[name] = table[own]
        state[f"{name.removesuffix('weight')}row_of_token"] = row_of_token.clone()
    saved = replace_module(module, config, state, [(first, first)])
    counts = {"tokens": len(table), "token_rows": len(own), "seen_tokens": len(seen), "weight_bytes_saved": saved}
    return {**counts, **_unseen_share(own.tolist(), tokenizer.all_special_ids, held_out)}


def shorten_positions(
    module: NeMoPreTrainedModel, tokenizer: Any, batches: Batches, max_positions: int
) -> dict[str, int]:
    """Cuts a text module's table of absolute positions to the longest input that is to come, in place.

    Inputs up to that length have the same logits as before; longer ones need `truncation=True`, which goes by the
    `model_max_length` of the tokenizer that the module carries then.

    Args:
        module: A module with a table of positions, such as one of BERT, RoBERTa or GPT-2.
        tokenizer: Its fast tokenizer.
        batches: Batches as `shrink_vocabulary` takes them.
        max_positions: Tokens of the longest input, special ones included: at least those of the longest batch.

    Returns:
        A report: `positions_before` and `positions` (tokens of the longest input), and `weight_bytes_saved`.

    Raises:
        TypeError: If the module is a parent or a plain model.
        ValueError: If it has no such table, if inputs are longer, or if the shorter table changes answers. The module
            is unchanged then.
    """
    data = _tokenizer_data(module, tokenizer)
    inputs = list(_inputs_of(batches))
    table, before = check_positions(module.model, inputs, max_positions)
    offset = position_offset(table)
    config = copy.deepcopy(module.config)
    for inner in _configs(config):
        if getattr(inner, "max_position_embeddings", None) == before + offset:
            inner.max_position_embeddings = max_positions + offset
    state = dict(module.state_dict(keep_vars=True))
    rows = table.num_embeddings - before + max_positions
    state = {name: value[:rows] if value is table.weight else value for name, value in state.items()}
    ids = torch.cat([batch[IDS].flatten() for batch in inputs])
    ids = ids[ids != module.config.pad_token_id]  # which has no position
    full = {IDS: ids.repeat(-(-max_positions // len(ids)))[:max_positions][None]}
    full["attention_mask"] = torch.ones_like(full[IDS])
    saved = replace_module(module, config, state, [(inputs[0], inputs[0]), (full, full)])
    _carry(module, tokenizer, _reloaded(tokenizer, data, model_max_length=max_positions))
    return {"positions_before": before, "positions": max_positions, "weight_bytes_saved": saved}


def _unseen_share(kept: Collection[int], special: Collection[int], held_out: Sequence[Any]) -> dict[str, float]:
    """The share of tokens, special ones left out, that are not kept, by its name; nothing where there are no tokens."""
    kept, special = set(kept), set(special)
    ids = [index for inputs in (_inputs_of(held_out) if held_out else ()) for index in inputs[IDS].flatten().tolist()]
    ids = [index for index in ids if index not in special]
    return {"unseen_share": sum(index not in kept for index in ids) / len(ids)} if ids else {}


def _check_module(module: NeMoPreTrainedModel) -> None:
    if not isinstance(module, NeMoPreTrainedModel) or module.is_parent:
        kind = "parent" if isinstance(module, NeMoPreTrainedModel) else type(module).__name__
        raise TypeError(f"Got a {kind}; expected a module. Cut one with extract_module(...) first.")


def _tokenizer_data(module: NeMoPreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """The content of a tokenizer.json, once module and tokenizer are known to be of the right kinds."""
    _check_module(module)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Got a {type(tokenizer).__name__}; expected a fast tokenizer, whose vocabulary is in tokenizer.json. Pass "
            "one that AutoTokenizer makes with backend='tokenizers', or leave the vocabulary as it is."
        )
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return data


def check_positions(plain: Any, inputs: Sequence[Mapping[str, Any]], max_positions: Any) -> tuple[nn.Embedding, int]:
    """A plain model's table of absolute positions, and for how many tokens it is, if it can be shortened."""
    size = getattr(plain.config, "max_position_embeddings", None)
    table = position_table(plain, size)
    if table is None or size is None:
        raise ValueError(
            f"Got max_positions={max_positions!r} for a {type(plain).__name__} with the position tables "
            f"{list(position_tables(plain))}; expected one, as long as max_position_embeddings says. Leave "
            "max_positions out."
        )
    before: int = size - position_offset(table)
    longest = max(value.shape[1] for batch in inputs for name, value in batch.items() if name.endswith(IDS))
    if type(max_positions) is not int or not longest <= max_positions <= before:
        is_short = type(max_positions) is int and 0 < max_positions < longest
        do = f", or batches with truncation=True, max_length={max_positions}" if is_short else ""
        raise ValueError(
            f"Got max_positions={max_positions!r}; expected from {longest}, the tokens of the longest batch, to "
            f"{before}. Pass such a number{do}."
        )
    return table, before


def _configs(config: Any) -> Iterator[Any]:
    """The plain model's configuration in that of a module, and those inside it."""
    for inner in list(vars(config).values()):
        if isinstance(inner, PreTrainedConfig):
            yield inner
            yield from _configs(inner)


def _token_ids(config: Any) -> Iterator[tuple[Any, str, list[int]]]:
    """The entries of configurations that hold ids of tokens: configuration, name and ids."""
    for inner in _configs(config):
        for name, value in list(vars(inner).items()):
            ids = value if isinstance(value, list) else [value]
            if TOKEN_ID.fullmatch(name) and ids and all(type(index) is int for index in ids):
                yield inner, name, ids


def _inputs_of(batches: Batches) -> Iterator[dict[str, Any]]:
    """The model inputs of batches, which may come with labels; there must be some, of token ids."""
    is_empty = True
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(inputs, Mapping) or IDS not in inputs:
            got = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"Got a batch with {got}; expected token ids, named input_ids. Pass batches of texts.")
        is_empty = False
        yield {name: value for name, value in inputs.items() if name != "labels"}
    if is_empty:
        raise ValueError("Got no batches; expected some that have the tokens to keep. Pass calibration samples.")


def _read(batches: Batches, tokenizer: Any) -> tuple[set[int], dict[str, Any], list[str]]:
    """The tokens that batches have, the first samples, and some texts."""
    seen: set[int] = set()
    first: dict[str, Any] = {}
    texts: list[str] = []
    for inputs in _inputs_of(batches):
        for name, value in inputs.items():
            if name.endswith(IDS):
                seen.update(value.unique().tolist())
        first = first or {name: value[:CHECKED_SAMPLES] for name, value in inputs.items() if isinstance(value, Tensor)}
        rows = inputs[IDS][: CHECKED_TEXTS - len(texts)]
        texts.extend(tokenizer.batch_decode(rows, skip_special_tokens=True))
    return seen, first, texts


def _renumbered(config: Any, kept: Sequence[int], rows: int, tokens: int) -> Any:
    """A copy of a module's configuration with so many tokens in place of `rows`, and their new ids."""
    places = {index: place for place, index in enumerate(kept)}
    config = copy.deepcopy(config)
    for inner, name, ids in _token_ids(config):
        new = [places.get(index, index) for index in ids]
        setattr(inner, name, new if isinstance(getattr(inner, name), list) else new[0])
    for inner in _configs(config):
        if getattr(inner, "vocab_size", None) == rows:
            inner.vocab_size = tokens
    return config


def _check_ids(seen: Collection[int], rows: int, ids: Iterable[int]) -> None:
    known = {index for index in ids if index < rows}
    if strange := sorted(set(seen) - known):
        raise ValueError(
            f"Got the token ids {strange[:12]} in the batches, which the tokenizer or the model doesn't have; expected "
            f"those of both, of which there are {len(known)}. Pass the tokenizer that made the batches."
        )


def _reloaded(tokenizer: Any, data: Mapping[str, Any], **options: Any) -> Any:
    """A tokenizer as it will be read from its files, with this content of its tokenizer.json."""
    with scratch_directory() as directory:
        tokenizer.save_pretrained(directory)
        (directory / TOKENIZER_JSON).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(directory, **options)


def _check_tokens(tokenizer: Any, reduced: Any, texts: list[str]) -> None:
    """Refuses a reduced tokenizer that splits texts otherwise though it has their tokens: its class rebuilds itself."""
    kept = reduced.get_vocab().keys()
    split = [
        [each.convert_ids_to_tokens(ids) for ids in each(texts, verbose=False)[IDS]] if texts else []
        for each in (tokenizer, reduced)
    ]
    for text, before, after in zip(texts, *split, strict=True):
        if before != after and kept >= set(before):
            raise ValueError(
                f"Got a {type(tokenizer).__name__} that splits {text[:80]!r} into {after[:12]} once its vocabulary is "
                f"reduced; expected {before[:12]}. Leave the vocabulary as it is."
            )


def _carry(module: NeMoPreTrainedModel, tokenizer: Any, new: Any) -> int:
    """Lets a module carry another tokenizer; returns by how many bytes its files are smaller than those before."""
    before = module.processor_files
    if TOKENIZER_JSON not in before:
        module.attach_processor(tokenizer)
        before = {**before, **module.processor_files}
    others = {name: content for name, content in before.items() if name in NOT_OF_TOKENIZERS}
    module.attach_processor(new)
    module.processor_files = {**others, **module.processor_files}
    return sum(map(len, before.values())) - sum(map(len, module.processor_files.values()))
