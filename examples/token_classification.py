# /// script
# dependencies = ["nemo-hf"]
# ///
"""Fine-tunes a plain token classifier, cuts a module for a few of its tags without training, and measures both.

    python examples/token_classification.py --dataset path/to/clinc150 --output_dir tags --learning_rate 2e-4 \
        --per_device_train_batch_size 32 --max_steps 300 --save_strategy no --report_to none

Each word of CLINC150's queries gets a tag by the rules below: what a number means is said by the words beside it. So
the figures say how well a module does what its source does, not how well either would find what people mark by hand.
Training queries, without tags, calibrate the cut; test queries only measure. All figures answer one question: which
words are dates or amounts (or what `--types` says)? Tags of other types count as O, in truth and answers. A module has
either O and the tags of these types, as the restricted source has, or all tags, which costs a few rows of the head.
Writes the model, the modules and results.json, prints a table; 5 minutes on one CPU core.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from nemo_hf import extract_module
from nemo_hf.models.atomic_writes import write_json

NUMBER = (
    r"(?:\d+(?:[,.]\d+)*|(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty"
    r"|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million)(?: (?:hundred|thousand|million))*)"
)
MONTH = (
    r"(?:january|february|march(?! (?:of|back|for))|april|june|july|august|september|october|november|december|jan|feb"
    r"|aug|sept|oct|nov|dec|(?<=in )may|(?<=on )may|(?<=of )may|(?<=from )may|may(?= \d))"
)
DAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day)"
ORDINAL = r"\d+(?:st|nd|rd|th)"
MONEY = r"(?:dollars?|bucks|euros?|yen|pesos?|cents?|rupees?|usd)"
UNIT = (
    r"(?:gallons?|miles?|inch(?:es)?|feet|foot|cups?|ounces?|tablespoons?|teaspoons?|pounds?|kilograms?|grams?|liters?"
    r"|(?:kilo|centi|milli)?meters?|quarts?|pints?|yards?|kilometers?|mph|degrees|percent|%|hours?|minutes?|seconds?"
    r"|days?|weeks?|months?|years?)"
)
RULES = {  # of a word the first rule counts that finds it
    "TIME": rf"\d+(?::\d\d)? ?[ap]m|{NUMBER} (?:[ap]m|o'clock)|\d+:\d\d|noon|midnight",
    "DATE": rf"(?:(?:next|last|this) )?{DAY}|(?:{ORDINAL}|\d+)(?: of)? {MONTH}(?: 20\d\d)?|{ORDINAL}"
    rf"|{MONTH}(?: (?:the )?(?:{ORDINAL}|\d{{1,2}}(?!\d)))?(?:,? 20\d\d)?|today|tomorrow|yesterday|tonight"
    r"|(?:next|last|this) (?:week|weekend|month|year)|20[012]\d|\d+/\d+(?:/\d+)?",
    "AMOUNT": rf"\$ ?{NUMBER}|{NUMBER} {MONEY}",
    "MEASURE": rf"{NUMBER} {UNIT}",
    "PLACE": r"america(?! express)|usa|united states|canada|mexico|cuba|brazil|peru|england|ireland|france|spain"
    r"|portugal|italy|germany|greece|russia|egypt|africa|india|china|japan|korea|vietnam|thailand"
    r"|australia|europe|asia|iceland|london|paris|rome|tokyo|new york(?: city)?|chicago|boston|dallas|houston|miami"
    r"|seattle|denver|phoenix|los angeles|las vegas|san (?:francisco|diego|antonio|jose)|orlando|tampa|detroit|austin"
    r"|atlanta|portland|florida|texas|california|ohio|arizona|hawaii|alaska|new jersey|new orleans|nevada|colorado",
    "COMPANY": r"chase|wells fargo|citi(?:bank)?|bank of america|capital one|first bankcard|visa|mastercard|amex"
    r"|american express|td ameritrade|pnc|discover(?= card)|delta|united airlines|southwest|jetblue|uber"
    r"|lyft|marriott|hilton|walmart|target|amazon|spotify|pandora|netflix|starbucks|mcdonald's|applebee's|olive garden"
    r"|outback(?: steakhouse)?|red (?:lobster|robin)|cheesecake factory",
    "LANGUAGE": r"spanish|french|german|italian|english|japanese|chinese|russian|portuguese|korean|thai|vietnamese",
}
PATTERN = re.compile("|".join(rf"(?<![\w$])(?P<{name}>{rule})(?!\w)" for name, rule in RULES.items()))
TAGS = ["O", *(f"{place}-{name}" for name in RULES for place in "BI")]
IGNORED = -100  # of special tokens, padding and all but a word's first token


@dataclass
class Options:
    """What to train on and what to cut."""

    dataset: str = field(metadata={"help": "Data set of the Hub or local folder with a column text, train and test."})
    model: str = field(default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Pretrained model."})
    types: list[str] = field(default_factory=lambda: ["DATE", "AMOUNT"], metadata={"help": "Types of a module's tags."})
    retention: float = field(default=0.2, metadata={"help": "Share of the weights that modules keep."})
    samples: int = field(default=300, metadata={"help": "Queries that calibrate the cut."})
    results: str | None = field(default=None, metadata={"help": "Where to write the figures, if not output_dir."})


def tagged(texts: list[str], tokenizer) -> dict[str, list]:
    """Token ids of texts, and the tag of each word at its first token."""
    rows = tokenizer(texts, truncation=True, return_offsets_mapping=True)
    rows["labels"] = []
    for row, (text, offsets) in enumerate(zip(texts, rows.pop("offset_mapping"), strict=True)):
        spans = [(*match.span(), match.lastgroup) for match in PATTERN.finditer(text.lower())]
        words, labels, before = rows.word_ids(row), [], None
        for index, word in enumerate(words):
            start = offsets[index][0]
            span = next((each for each in spans if each[0] <= start < each[1]), None)
            is_first = word is not None and word != words[index - 1]
            tag = "O" if span is None else f"{'I' if span is before else 'B'}-{span[2]}"
            labels.append(TAGS.index(tag) if is_first else IGNORED)
            before = span if is_first else before
        rows["labels"].append(labels)
    return dict(rows)


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """First word, one past the last, and type of each run of tags; a B, or another type, begins a new one."""
    found, start = set(), 0
    for index, tag in enumerate([*tags, "O"]):
        before = tags[index - 1] if index else "O"
        if tag != f"I-{before[2:]}" or before == "O":
            if before != "O":
                found.add((start, index, before[2:]))
            start = index
    return found


@torch.no_grad()
def measure(model: PreTrainedModel, data: Dataset, collate, names: list[str], kept: list[str]) -> dict[str, float]:
    """Share of right tags and F1 of whole entities, where tags that are not `kept` count as O.

    `names` are those of the answers to choose among, in the model's order; "" is no answer.
    """
    choice = torch.tensor([index for index, name in enumerate(names) if name])
    right = words = hits = guesses = truths = 0
    for start in range(0, len(data), 64):
        batch = collate([data[index] for index in range(start, min(start + 64, len(data)))])
        labels = batch.pop("labels")
        answers = choice[model.eval()(**batch).logits[..., choice].argmax(-1)]
        for own, expected in zip(answers, labels, strict=True):
            is_word = expected != IGNORED
            got = [names[index] for index in own[is_word].tolist()]
            true = [TAGS[index] for index in expected[is_word].tolist()]
            got, true = ([tag if tag in kept else "O" for tag in tags] for tags in (got, true))
            right, words = right + sum(map(str.__eq__, got, true)), words + len(true)
            guessed, real = entities(got), entities(true)
            hits, guesses, truths = hits + len(guessed & real), guesses + len(guessed), truths + len(real)
    f1 = 2 * hits / max(1, guesses + truths)
    return {"token_accuracy": round(right / words, 4), "entity_f1": round(f1, 4), "words": words, "entities": truths}


def main() -> None:
    """Trains, cuts, measures and saves."""
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    data = load_dataset(options.dataset)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = (
        data[split].map(lambda batch: tagged(batch["text"], tokenizer), batched=True,
                        remove_columns=data[split].column_names)
        for split in ("train", "test")
    )  # fmt: skip
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: index for index, tag in enumerate(TAGS)}}
    model = AutoModelForTokenClassification.from_pretrained(options.model, ignore_mismatched_sizes=True, **names)
    collate = DataCollatorForTokenClassification(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collate, processing_class=tokenizer)
    trained = trainer.train()
    trainer.save_model()

    kept = ["O", *(tag for tag in TAGS if tag[2:] in options.types)]
    among = [tag if tag in kept else "" for tag in TAGS]
    rows = [
        {"model": "source", "tags": len(TAGS), **measure(model, test, collate, TAGS, kept)},
        {"model": "source, restricted", "tags": len(kept), **measure(model, test, collate, among, kept)},
    ]
    order = np.random.default_rng(arguments.seed).permutation(len(data["train"]))
    texts = [data["train"][int(index)]["text"] for index in order[: options.samples]]
    for tags in (kept, TAGS):
        for name, is_done in (("raw cut", False), ("reconstructed", True)):
            module = extract_module(model, tags, texts, options.retention, processing_class=tokenizer,
                                    reconstruct=is_done)  # fmt: skip
            seconds = {"seconds": module.config.extraction["seconds"]}
            rows.append({"model": name, "tags": len(tags), **measure(module, test, collate, tags, kept), **seconds})
            if is_done:
                module.save_pretrained(Path(arguments.output_dir, "modules", f"{len(tags)}-tags"))
    results = {
        "command": ["python", "examples/token_classification.py", *sys.argv[1:]],
        "tags": TAGS, "types": options.types, "seed": arguments.seed, "calibration_samples": len(texts),
        "retention": options.retention, "training_seconds": round(trained.metrics["train_runtime"]), "test": rows,
    }  # fmt: skip
    write_json(Path(options.results or Path(arguments.output_dir, "results.json")), results)
    line = "{model:20} of {tags:2} tags: token accuracy {token_accuracy:.3f}, entity F1 {entity_f1:.3f}"
    print(*(line.format(**row) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
