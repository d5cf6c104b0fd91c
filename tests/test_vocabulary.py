"""Smaller vocabularies and position tables: texts of the calibration stay as they are, any other still encodes."""

import copy
import functools
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LABELS, fresh, generated, image_samples, logits_of, parent_of, randomize, text_samples, tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from nemo_hf import NeMoForSequenceClassification, make_parent
from nemo_hf.models.vocabulary import share_tokens, shorten_positions, shrink_vocabulary

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "max_position_embeddings": 40}
ALBERT = {**TEXT, "embedding_size": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DEBERTA = {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
# Kind of vocabulary, special tokens in the order of their ids, tokenizer, model and its sizes.
FAMILIES = {
    "bert": ("WordPiece", "[unused0] [PAD] [UNK] [CLS] [SEP] [MASK]", "BertTokenizer", "Bert", TEXT),
    "roberta": ("ByteLevel", "<s> <pad> </s> <unk> <mask>", "RobertaTokenizer", "Roberta", TEXT),
    "gpt2": ("ByteLevel", "<|endoftext|>", "GPT2Tokenizer", "GPT2", GPT2),
    "llama": ("bytes", "<unk> <s> </s>", "LlamaTokenizer", "Llama", {**TEXT, "num_key_value_heads": 2}),
    "albert": (
        "Unigram",
        "<pad> <unk> [CLS] [SEP] [MASK]",
        "AlbertTokenizer",
        "Albert",
        {**TEXT, "embedding_size": 16},
    ),
    "xlm-roberta": ("Unigram", "<s> <pad> </s> <unk> <mask>", "XLMRobertaTokenizer", "XLMRoberta", TEXT),
    "deberta-v2": ("Unigram", "[PAD] [CLS] [SEP] [UNK] [MASK]", "DebertaV2Tokenizer", "DebertaV2", DEBERTA),
    "t5": ("Unigram", "<pad> </s> <unk>", "T5Tokenizer", "T5", T5),
}
SIMILAR = ("gpt2", "xlm-roberta", "deberta-v2")  # to others here
CALIBRATION = [
    "please copy the software and sublicense it",
    "a notice of copyright, for any person in 2024!",
    "Whether in contract or otherwise: naïve use of modules",
    "train the classifier on labels",
]
SCRIPTS = "Übergrößen naïve čaj привет мир ελλάδα 日本語 안녕 🙂🚀 🇮🇹"


@functools.cache
def trained(family: str):
    """A small tokenizer of a family, trained on the project's own texts."""
    kind, special, class_name, _, _ = FAMILIES[family]
    root = Path(__file__).parents[1]
    lines = [
        *(root / "LICENSE").read_text().split("\n"),
        *(root / "README.md").read_text()[:20_000].split("\n"),
        SCRIPTS,
    ]
    inner = Tokenizer({"WordPiece": models.WordPiece, "Unigram": models.Unigram}.get(kind, models.BPE)())
    options: dict = {"vocab_size": 700, "special_tokens": special.split(), "show_progress": False}
    if kind == "WordPiece":
        inner.pre_tokenizer, trainer = pre_tokenizers.BertPreTokenizer(), trainers.WordPieceTrainer(**options)
        inner.normalizer = normalizers.BertNormalizer()
    elif kind == "ByteLevel":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        options["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)] if kind == "bytes" else []
        unknown = {"unk_token": next(token for token in special.split() if "unk" in token.lower())}
        trainer = trainers.UnigramTrainer(**options, **unknown) if kind == "Unigram" else trainers.BpeTrainer(**options)
    inner.train_from_iterator(lines, trainer)
    content = json.loads(inner.to_str())["model"]
    vocab = [tuple(entry) for entry in content["vocab"]] if kind == "Unigram" else content["vocab"]
    merges = {"merges": [tuple(merge) for merge in content["merges"]]} if "merges" in content else {}
    names = {"pad_token": "</s>" if family == "llama" else "<|endoftext|>"} if family in ("llama", "gpt2") else {}
    return getattr(transformers, class_name)(vocab=vocab, **merges, **names, model_max_length=36)


def encoded(own, texts) -> dict:
    return dict(own(texts, padding=True, return_tensors="pt"))


@functools.cache
def _module(family: str):
    own, (_, _, _, name, sizes) = trained(family), FAMILIES[family]
    ids = {name: getattr(own, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    ids = {name: index for name, index in ids.items() if index is not None}
    if family == "t5":
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    model = randomize(tiny(f"{name}ForSequenceClassification", vocab_size=len(own) + 4, **sizes, **ids), 0.3)
    return make_parent(model, generated()).extract_module(LABELS[:3])


def module_of(family: str):
    return copy.deepcopy(_module(family))


def unknown_in(own, text: str) -> int:
    return own(text)["input_ids"].count(own.unk_token_id) if own.unk_token != own.eos_token else 0


def random_texts(count: int = 60) -> list[str]:
    draw = random.Random(0)
    blocks = [(32, 127), (32, 127), (0xA0, 0x250), (0x370, 0x530), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
              (0x1F300, 0x1F680)]  # fmt: skip
    texts = []
    for _ in range(count):
        chosen = [chr(draw.randrange(*draw.choice(blocks))) for _ in range(draw.randrange(1, 12))]
        texts.append("".join(one + " " * (draw.random() < 0.2) for one in chosen).strip() or "a")
    words = (SCRIPTS + " the software provided without warranty accuracy tokens zebra quixotic").split()
    return texts + [" ".join(draw.sample(words, 4)) for _ in range(count)]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.sweep if name in SIMILAR else ()) for name in FAMILIES]
)
def test_calibration_texts_keep_tokens_and_logits_and_others_encode(family, tmp_path):
    module, own = module_of(family), trained(family)
    inputs = encoded(own, CALIBRATION)
    module.attach_processor(own)
    module.save_pretrained(tmp_path / "before")
    expected = logits_of(module, **inputs)
    batches = [
        ({name: value[row : row + 1] for name, value in inputs.items()}, None) for row in range(len(CALIBRATION))
    ]
    report = shrink_vocabulary(module, own, batches)
    module.save_pretrained(tmp_path / "after")
    loaded = NeMoForSequenceClassification.from_pretrained(tmp_path / "after")
    reduced = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert type(reduced) is type(own)
    # The same texts.
    again = encoded(reduced, CALIBRATION)
    split = [list(map(own.convert_ids_to_tokens, inputs["input_ids"]))]
    assert split == [list(map(reduced.convert_ids_to_tokens, again["input_ids"]))]
    for each in (module, loaded):
        torch.testing.assert_close(logits_of(each, **again), expected, atol=1e-6, rtol=0)
        assert each.config.vocab_size == report["tokens"] == len(each.get_input_embeddings().weight)
        assert each.config.pad_token_id == reduced.pad_token_id
    result = pipeline("text-classification", model=str(tmp_path / "after"))(CALIBRATION[0])[0]
    assert result["label"] == module.config.names[int(expected[0].argmax())]
    # Other texts.
    for text in random_texts():
        if not unknown_in(own, text):
            assert not unknown_in(reduced, text), text
            assert reduced.decode(reduced(text)["input_ids"]) == own.decode(own(text)["input_ids"]), text
    # The report.
    assert report["seen_tokens"] == len(inputs["input_ids"].unique())
    sizes = [{path.name: path.stat().st_size for path in (tmp_path / name).iterdir()} for name in ("before", "after")]
    saved = {name: size - sizes[1][name] for name, size in sizes[0].items()}
    assert saved.pop("model.safetensors") == pytest.approx(report["weight_bytes_saved"], abs=512)  # of the headers
    assert saved["tokenizer.json"] + saved["tokenizer_config.json"] == report["tokenizer_bytes_saved"] > 0
    assert report["tokens"] < report["tokens_before"] == len(own) + 4


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_shared_rows_are_those_of_the_most_similar_tokens(family, tmp_path):
    module, own = module_of(family), trained(family)
    inputs = encoded(own, CALIBRATION)
    table = module.get_input_embeddings().weight.detach()
    others = encoded(own, random_texts(4)[:4])
    seen = sorted(set(inputs["input_ids"].flatten().tolist()) - set(own.all_special_ids))
    stand_ins = others["input_ids"].clone()
    for index in set(others["input_ids"].flatten().tolist()) - set(seen) - set(own.all_special_ids):
        similar = torch.nn.functional.cosine_similarity(table[seen], table[index][None])
        stand_ins[others["input_ids"] == index] = seen[int(similar.argmax())]
    expected = [logits_of(module, **each) for each in (inputs, {**others, "input_ids": stand_ins})]
    module.attach_processor(own)
    size, files = module.num_parameters(), module.processor_files
    report = share_tokens(module, own, [inputs])
    module.save_pretrained(tmp_path / "shared")
    module.save_plain(tmp_path / "plain", inputs)
    for name in ("shared", "plain"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for each, wanted in zip((inputs, others), expected, strict=True):
            torch.testing.assert_close(logits_of(loaded, **each), wanted, atol=1e-5, rtol=0)
    assert module.processor_files == files
    assert module.config.vocab_size == report["tokens"] == len(table)
    assert report["token_rows"] == len(module.get_input_embeddings().weight) == module.config.token_rows
    rows_bytes = 4 * (size - module.num_parameters())
    assert rows_bytes - report["weight_bytes_saved"] in [4 * len(table) * tables for tables in (1, 2, 3)]  # of rows
    with pytest.raises(ValueError, match="whose input layer is SharedEmbedding"):
        share_tokens(module, own, [inputs])


def test_frequent_words_may_keep_their_rows():
    module, own = module_of("bert"), trained("bert")
    inputs = encoded(own, CALIBRATION)
    reports = [share_tokens(copy.deepcopy(module), own, [inputs], extra_tokens=extra) for extra in (0, 20)]
    assert reports[1]["token_rows"] == reports[0]["token_rows"] + 20


def test_rows_that_do_not_exist_are_refused(tmp_path):
    module, own = module_of("bert"), trained("bert")
    report = share_tokens(module, own, [encoded(own, CALIBRATION)])
    module.get_input_embeddings().row_of_token[7] = report["token_rows"]
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"row_of_token' with indices from 0 to"):
        NeMoForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "albert"])
def test_positions_below_the_limit_are_exact(family, tmp_path):
    module, own = module_of(family), trained(family)
    inputs = encoded(own, CALIBRATION)
    longest = inputs["input_ids"].shape[1]
    before = module.num_parameters()
    expected = logits_of(module, **inputs)
    report = shorten_positions(module, own, [inputs], longest)
    module.save_pretrained(tmp_path)
    loaded = NeMoForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, **inputs), expected)
    assert 4 * (before - module.num_parameters()) == report["weight_bytes_saved"] > 0
    assert report["positions"] == longest < report["positions_before"]
    reduced = AutoTokenizer.from_pretrained(tmp_path)
    assert len(reduced(" ".join(CALIBRATION), truncation=True)["input_ids"]) == longest
    with pytest.raises(ValueError, match=f"expected from {longest}"):
        shorten_positions(module, own, [inputs], longest - 1)


@pytest.mark.parametrize("family", ["llama", "t5", "deberta-v2"])
def test_models_without_one_table_of_positions_are_refused(family):
    module, own = module_of(family), trained(family)
    with pytest.raises(ValueError, match=r"expected one, as long|expected the same"):
        shorten_positions(module, own, [encoded(own, CALIBRATION)], 30)


@pytest.mark.parametrize("smaller", [shrink_vocabulary, share_tokens])
def test_share_of_unseen_tokens(smaller):
    own = trained("bert")
    batches = [(encoded(own, CALIBRATION[:2]), None)]
    held_out = [own.tokenize(text) for text in CALIBRATION]
    seen = {token for tokens in held_out[:2] for token in tokens}
    report = smaller(module_of("bert"), own, batches, held_out=[(encoded(own, CALIBRATION), None)])
    tokens = [token for text in held_out for token in text]
    is_kept = [
        token in seen or (smaller is shrink_vocabulary and len(token.removeprefix("##")) == 1) for token in tokens
    ]
    assert report["unseen_share"] > 0
    assert report["unseen_share"] == pytest.approx(is_kept.count(False) / len(tokens))
    assert "unseen_share" not in smaller(module_of("bert"), own, batches)


def test_measured_results_and_other_files_of_the_processor():
    module, own = module_of("bert"), trained("bert")
    module.processor_files = {"preprocessor_config.json": b"{}", "vocab.txt": b"old"}
    module.report = {"metrics": {}}
    was_tuned = module.config.is_tuned
    shrink_vocabulary(module, own, [encoded(own, CALIBRATION)])
    assert module.report is module.config.rejection is None
    assert module.config.is_tuned == was_tuned
    assert sorted(module.processor_files) == ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def cut(family: str):
    return parent_of(family).extract_module(LABELS[:2])


BATCH = [None]  # stands for a batch of the tokenizer of "bert"


def whole_words():
    """A tokenizer of no pieces of words."""
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "w0": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


REFUSED = {
    "a parent": (lambda: parent_of("bert"), lambda: trained("bert"), BATCH, TypeError, "Got a parent"),
    "a plain model": (lambda: fresh("bert"), lambda: trained("bert"), BATCH, TypeError, "Got a BertFor"),
    "no batches": (lambda: module_of("bert"), lambda: trained("bert"), [], ValueError, "Got no batches"),
    "images": (lambda: module_of("bert"), lambda: trained("bert"), image_samples(1), ValueError, "expected token ids"),
    "an image model": (lambda: cut("vit"), lambda: trained("bert"), BATCH, ValueError, "whose input layer"),
    "a slow tokenizer": (
        lambda: module_of("bert"),
        transformers.CanineTokenizer,
        BATCH,
        ValueError,
        "a fast tokenizer",
    ),
    "whole words": (lambda: cut("bert"), whole_words, text_samples(1), ValueError, "kind WordLevel"),
    "ids of another tokenizer": (lambda: cut("bert"), lambda: trained("bert"), BATCH, ValueError, "in the batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    build, make, batches, error, match = REFUSED[case]
    module = build()
    batches = [encoded(trained("bert"), CALIBRATION)] if batches is BATCH else batches
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(error, match=match):
        shrink_vocabulary(module, make(), batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
