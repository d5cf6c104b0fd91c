"""Cuts the vocabulary of a fast tokenizer, given as the content of its tokenizer.json: which tokens stay, and the rest.

All kinds choose pieces by what they have, so pieces that a text doesn't use can go and the text keeps its own:
WordPiece takes the longest piece that fits, Unigram the likeliest row of pieces, BPE applies the first merge that
fits, of which the tree of each kept token stays. With single characters (or bytes) kept, any text still encodes.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]
KINDS = ("WordPiece", "BPE", "Unigram")
BYTE = re.compile("<0x[0-9A-F]{2}>")


def check_kind(data: Mapping[str, Any]) -> None:
    """Refuses a tokenizer whose vocabulary can't be cut so that any text still encodes (`ValueError`)."""
    if (kind := data["model"].get("type")) not in KINDS:
        raise ValueError(
            f"Got a tokenizer of kind {kind}; expected one of {list(KINDS)}: others have no pieces for words that the "
            "calibration lacks. Leave the vocabulary as it is."
        )


def vocabulary_of(data: Mapping[str, Any]) -> dict[str, int]:
    """Ids of all tokens by their text, added ones included."""
    vocab = data["model"]["vocab"]
    own = {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return own | {token["content"]: token["id"] for token in data["added_tokens"]}


def kept_tokens(data: Mapping[str, Any], seen: Collection[int]) -> list[int]:
    """Ids of the tokens that stay where these are seen, increasing."""
    vocab, model = vocabulary_of(data), data["model"]
    kept = set(seen)

    def keep(index: int) -> int:
        kept.add(index)
        return index

    _map_ids(data, keep)
    by_id = {index: token for token, index in vocab.items()}
    texts = [by_id[index] for index in kept if index in by_id]
    chosen = {unknown} if isinstance(unknown := model.get("unk_token"), str) else set()
    chosen.update(token for token in vocab if BYTE.fullmatch(token) or len(_bare(token, model)) == 1)
    if model["type"] == "BPE":
        for pair in _merges_of(texts, model):
            chosen |= {*pair, _merged(*pair, model)}
    elif not model.get("byte_fallback"):
        chosen.update(token for token in vocab if any(piece not in vocab for piece in _characters(token, model)))
    if model["type"] == "Unigram":  # by which the cost of an unknown character is set
        chosen.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return sorted(kept | {vocab[token] for token in chosen if token in vocab})


def cut_tokenizer(data: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The content of a tokenizer.json with these tokens alone, whose ids become their places in `kept`."""
    places = {index: place for place, index in enumerate(kept)}
    new: dict[str, Any] = {**data, "model": {**data["model"]}}
    model, vocab = new["model"], data["model"]["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [entry for index, entry in enumerate(vocab) if index in places]
    else:
        named = sorted((places[index], token) for token, index in vocab.items() if index in places)
        model["vocab"] = {token: place for place, token in named}
    if model["type"] == "BPE":
        own = {token for token, index in vocab.items() if index in places}
        applied = {pair for pair in _merges_of(own, model) if own >= {*pair, _merged(*pair, model)}}
        model["merges"] = [list(pair) for pair in map(_pair, model["merges"]) if pair in applied]
    return _map_ids(new, places.__getitem__)


def _map_ids(data: Mapping[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    """A copy in which the ids of added tokens, padding, the post-processor and Unigram's unknown token are changed."""
    new: dict[str, Any] = copy.deepcopy({key: value for key, value in data.items() if key != "model"})
    new["model"] = {**data["model"]}
    for token in new["added_tokens"]:
        token["id"] = change(token["id"])
    if new.get("padding"):
        new["padding"]["pad_id"] = change(new["padding"]["pad_id"])
    if new["model"].get("unk_id") is not None:
        new["model"]["unk_id"] = change(new["model"]["unk_id"])
    for processor in _processors(new.get("post_processor")):
        for name in {"cls", "sep"} & processor.keys():
            processor[name] = [processor[name][0], change(processor[name][1])]
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [change(index) for index in token["ids"]]
    return new


def _processors(data: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A post-processor, and those inside it."""
    if data:
        yield data  # type: ignore[misc]
        for inner in data.get("processors", ()):
            yield from _processors(inner)


def _bare(token: str, model: Mapping[str, Any]) -> str:
    """A token without what marks it as the start, the middle or the end of a word."""
    return token.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(
        model.get("end_of_word_suffix") or ""
    )


def _characters(token: str, model: Mapping[str, Any]) -> list[str]:
    """The tokens that a token's characters would be, each alone."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    is_inner = bool(prefix) and token.startswith(prefix) and token != prefix
    is_last = bool(suffix) and token.endswith(suffix) and token != suffix
    pieces = [f"{prefix if place or is_inner else ''}{one}" for place, one in enumerate(_bare(token, model))]
    return [*pieces[:-1], pieces[-1] + suffix] if is_last and pieces else pieces


def _pair(merge: str | Sequence[str]) -> Pair:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merged(first: str, second: str, model: Mapping[str, Any]) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _merges_of(tokens: Collection[str], model: Mapping[str, Any]) -> set[Pair]:
    """The merges by which BPE makes these tokens of their characters.

    They are also those that make them within any text: there a merge across a token's borders is never the first that
    fits, or the token would not be left.
    """
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    applied: set[Pair] = set()
    for token in tokens:
        pieces, own = _characters(token, model), []
        while found := [(ranks[pair], pair) for pair in pairwise(pieces) if pair in ranks]:
            first, second = min(found)[1]
            own.append((first, second))
            place = list(pairwise(pieces)).index((first, second))
            pieces[place : place + 2] = [_merged(first, second, model)]
        if pieces == [token]:
            applied.update(own)
    return applied
