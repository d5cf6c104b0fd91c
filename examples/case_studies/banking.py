"""A banking assistant on a small CPU: a module of two of CLINC150's ten domains, served with rejection.

    python examples/case_studies/banking.py make --data path/to/clinc150 --work work
    python examples/case_studies/banking.py export --data path/to/clinc150 --work work
    python examples/case_studies/banking.py answers --data path/to/clinc150 --work work
    python examples/case_studies/banking.py load --data path/to/clinc150 --work work

`make` fine-tunes a MiniLM on all 150 intents, unless `--source` names one, cuts the module, and trains truncated
encoders as alternatives. All become modules of the 30 intents whose rejection is calibrated on validation data.
`export` writes ONNX files of them. `answers` pushes them to the Hub and pulls each into the endpoint of `serve.py`,
which answers all test queries; without `--hub` to the Hub of this library's tests, in this process. `load` starts the
endpoints in turn from the files pulled, in reverse order every other round, and sends requests of one text, on a quiet
machine. Test data choose nothing: the learning rate of the truncated encoder of the 30 intents is the best on
validation data; that of all 150 takes it over. Writes results/case_banking.json of examples/benchmarks.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from clients import Server, load
from datasets import Dataset, disable_progress_bars, load_dataset
from huggingface_hub import HfApi
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, Trainer
from transformers.utils import logging as transformers_logging

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parents[2] / "tests")]
import compact
from cutting import accuracy
from cutting_baselines import train, truncated
from cutting_units import Job, logits_of
from tasks import Task, clinc150, label_names

import nemo_hf

RESULTS = compact.RESULTS / "case_banking.json"
DOMAINS = ("banking", "credit_cards")
RETENTION, POSITIONS, SAMPLES = 0.25, 64, 3000
EPOCHS = 3  # of the source; truncated encoders get as many steps
RATES = (5e-4, 1e-3)  # of truncated encoders, to choose from
CLIENTS = (1, 4, 16)
SERVED = ("source", "module", "truncated", "source-onnx", "source-onnx-int8", "module-onnx", "module-onnx-int8",
          "truncated-onnx", "truncated-onnx-int8")  # fmt: skip
EXPORTED = ("source", "module", "truncated")
FORMATS = {"onnx": None, "onnx-int8": "int8"}
WARM_UP = 30  # requests
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SMALL = {"vocabulary": "shared", "max_positions": POSITIONS}


class Study:
    """Data and models by name; `work` has a folder of each model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.work = given, given.work
        files = {name: str(given.data / f"{name}-00000-of-00001.parquet") for name in ("train", "validation", "test")}
        self.data = load_dataset("parquet", data_files=files).rename_column("intent", "label")
        self.strange = load_dataset("parquet", data_files=str(given.data / "oos-test.parquet"))["train"]
        first = self.data["train"]
        self.intents = first.features["label"].names
        wanted = {first.features["domain"].str2int(name) for name in given.domains}
        pairs = sorted(set(zip(first["label"], first["domain"], strict=True)))
        self.labels = [label for label, domain in pairs if domain in wanted]
        self.rows: dict[str, dict] = {row["model"]: row for row in compact.load(given.output).get("models", [])}

    @property
    def names(self) -> list[str]:
        """The intents of the domains."""
        return [self.intents[label] for label in self.labels]

    def texts(self, split: str) -> Dataset:
        """Queries with the columns that the front door reads."""
        return self.data[split].select_columns(["text", "label"])

    def has(self, name: str) -> bool:
        """Whether a model was made before."""
        return name in self.rows and (self.work / name / "config.json").exists()

    def save(self, name: str, model: PreTrainedModel, before: Mapping[str, float], **options) -> None:
        """Makes a module of the intents, calibrated, and saves it; `seconds` of work came before."""
        start = time.process_time()
        module = nemo_hf.extract_module(
            model, self.names, self.texts("train"), validation=self.texts("validation"),
            processing_class=AutoTokenizer.from_pretrained(self.given.model), show_progress=False, **options,
        )  # fmt: skip
        seconds = before.get("seconds", 0.0) + time.process_time() - start
        module.save_pretrained(self.work / name)
        sizes = {"parameters": module.num_parameters(), "bytes": bytes_of(self.work / name)}
        validation = module.config.extraction["validation"]["accuracy"]
        self.store({**before, "model": name, "seconds": seconds, "validation": validation, **sizes})

    def store(self, row: dict) -> None:
        """Keeps a row of the table of models."""
        print(row, flush=True)
        self.rows[row["model"]] = row
        about = {"command": "python examples/case_studies/banking.py STEP --data DATA --work WORK"}
        domains = " and ".join(self.given.domains)
        about |= {
            "task": f"CLINC150, MiniLM; domains {domains}; seed {self.given.seed}",
            "retention": self.given.retention,
        }
        compact.update(self.given.output, {**compact.load(self.given.output), **about}, "models", [row], "model")


def bytes_of(folder: Path) -> int:
    """Size of the files in a folder, each once."""
    files = {path.resolve() for path in folder.rglob("*") if path.is_file()}
    return sum(path.stat().st_size for path in files)


def make(study: Study) -> None:
    """Makes the models that are not there."""
    given = study.given
    task = clinc150(str(given.data), given.model)
    source, work = source_of(task, given)
    if not study.has("source"):
        study.save("source", source, work, retention=1.0)
    if not study.has("module"):
        study.save("module", source, {}, retention=given.retention, max_samples=given.samples, **SMALL)
    rates = RATES
    for name, has_all in (("truncated", False), ("truncated-all", True)):
        if not study.has(name):
            model, work = truncated_encoder(task, study, has_all, rates)
            study.save(name, model, work, retention=1.0, max_samples=given.samples, **SMALL)
        rates = [study.rows[name]["rate"]]  # taken over


def export(study: Study) -> None:
    """Exports models to ONNX."""
    for name in study.given.models or EXPORTED:
        module = AutoModelForSequenceClassification.from_pretrained(study.work / name)
        for form, width in FORMATS.items():
            options = {"quantize": width, "calibration": study.texts("validation")} if width else {}
            folder, start = study.work / f"{name}-{form}", time.process_time()
            module.export_onnx(folder, **options)
            seconds = study.rows[name]["seconds"] + time.process_time() - start
            study.store({**study.rows[name], "model": folder.name, "seconds": seconds, "bytes": bytes_of(folder)})


def source_of(task: Task, given: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, float]]:
    """The classifier of all intents, and the seconds of its training, if it is trained here."""
    folder = given.source or given.work / "classifier"
    start = time.process_time()
    if not folder.exists():
        trainer = task.trainer(Trainer, *task.splits(given.seed)[:2], given.seed, EPOCHS)
        trainer.train()
        trainer.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(given.model).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), {"seconds": time.process_time() - start}


def truncated_encoder(
    task: Task, study: Study, has_all: bool, rates: Sequence[float]
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The encoder's first layers trained on the intents, or on all 150; the rate that was chosen, and the seconds."""
    given = study.given
    splits = task.splits(given.seed)
    labels = list(range(len(study.intents))) if has_all else study.labels
    data, choice = splits[0].part(labels), splits[1].part(study.labels)
    steps, found = EPOCHS * -(-len(splits[0]) // task.batch), []
    for rate in rates:
        job = Job(None, labels, data, data, 1.0, given.seed, steps, task.batch, rate, given.model)
        start = time.process_time()
        model = truncated(job, given.layers)
        train(model, data, job, rate)
        seconds = time.process_time() - start
        own = logits_of(model, choice)[:, [labels.index(label) for label in study.labels]]
        found.append((accuracy(own, choice.labels), model, {"rate": rate, "seconds": seconds}))
    _, model, work = max(found, key=lambda each: each[0])
    return with_all_labels(model, labels, study.intents), work


def with_all_labels(model: PreTrainedModel, labels: Sequence[int], names: Sequence[str]) -> PreTrainedModel:
    """Names a classifier's outputs as the data do, and adds outputs for the other labels, which nobody reads."""
    own, head = model.classifier, nn.Linear(model.classifier.in_features, len(names))
    with torch.no_grad():
        head.weight.zero_()[list(labels)] = own.weight
        head.bias.zero_()[list(labels)] = own.bias
    model.classifier, model.num_labels = head, len(names)
    for name, value in label_names(names).items():
        setattr(model.config, name, value)
    return model


def answers(study: Study) -> None:
    """Pushes the models, pulls each into an endpoint, and lets it answer the test queries."""
    given, rows = study.given, []
    made = sorted(path.parent.name for path in study.work.glob("*/config.json"))
    models = given.models or [name for name in made if name != "classifier"]
    with hub_of(given) as environment:
        push = [sys.executable, __file__, "push", *models, "--work", str(study.work), "--namespace", given.namespace]
        subprocess.run(push, check=True, env={**os.environ, **environment, "HF_HOME": str(study.work / "home")})  # noqa: S603
        for name in models:
            home = study.work / "pulled" / name
            shutil.rmtree(home, ignore_errors=True)
            with Server(f"{given.namespace}/{name}", {**environment, "HF_HOME": str(home)}, given.threads) as server:
                rows.append({"model": name, "pulled_bytes": bytes_of(home / "hub"), **measured(study, server)})
            print(rows[-1], flush=True)
    rows.append({"model": "classifier", **of_classifier(study)})
    compact.update(given.output, compact.load(given.output), "answers", rows, "model")


def queries_of(study: Study) -> dict[str, Dataset]:
    """Test queries of the intents, of other domains and of none."""
    test, own = study.texts("test"), set(study.labels)
    return {
        "own": test.filter(lambda row: row["label"] in own),
        "other": test.filter(lambda row: row["label"] not in own),
        "strange": study.strange,
    }


def measured(study: Study, server: Server) -> dict[str, float]:
    """How the endpoint answers the test queries."""
    queries = queries_of(study)
    found = {kind: server.classify(list(data["text"])) for kind, data in queries.items()}
    right = [study.intents[label] for label in queries["own"]["label"]]
    return shares(
        [each["closest"] == name for each, name in zip(found["own"], right, strict=True)],
        {kind: [each["rejected"] for each in own] for kind, own in found.items()},
        {kind: [each["rejection_score"] for each in own] for kind, own in found.items()},
    )


def shares(
    right: Sequence[bool], rejected: Mapping[str, Sequence[bool]], scores: Mapping[str, Sequence[float]]
) -> dict:
    """Accuracy in scope without and with rejection, shares rejected by kind of query, and AUROC of the scores."""
    served = [is_right and not is_rejected for is_right, is_rejected in zip(right, rejected["own"], strict=True)]
    row = {"closest": statistics.fmean(right), "right": statistics.fmean(served)}
    row |= {f"rejected_{kind}": statistics.fmean(each) for kind, each in rejected.items()}
    for kind in ("other", "strange"):
        is_foreign = [False] * len(scores["own"]) + [True] * len(scores[kind])
        row[f"auroc_{kind}"] = roc_auc_score(is_foreign, [*scores["own"], *scores[kind]])
    return row


@torch.no_grad()
def of_classifier(study: Study) -> dict[str, float]:
    """The classifier of all intents as it is: it rejects what it answers with an intent of another domain."""
    folder = study.given.source or study.work / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    others = [label for label in range(len(study.intents)) if label not in study.labels]
    right, rejected, scores = [], {}, {}
    for kind, data in queries_of(study).items():
        batches = (tokenizer(part["text"], padding=True, return_tensors="pt") for part in data.iter(100))
        logits = torch.cat([model(**batch).logits for batch in batches])
        rejected[kind] = torch.isin(logits.argmax(-1), torch.tensor(others)).tolist()
        scores[kind] = logits.softmax(-1)[:, others].sum(-1).tolist()
        if kind == "own":
            closest = torch.tensor(study.labels)[logits[:, study.labels].argmax(-1)]
            right = (closest == torch.tensor(data["label"])).tolist()
    return shares(right, rejected, scores)


@contextmanager
def hub_of(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Environment of processes that use the Hub: the one that is asked for, or one in this process."""
    flags = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if given.hub:
        yield {**flags, "HF_ENDPOINT": given.hub}
        return
    from hub_server import HubServer

    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    local = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_me", "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    yield {**flags, **local, "NO_PROXY": "127.0.0.1"}
    server.shutdown()
    thread.join()
    server.server_close()


def push(given: argparse.Namespace) -> None:
    """Uploads models, in a process of its own, whose environment says where to."""
    for name in given.models:
        folder, repo = given.work / name, f"{given.namespace}/{name}"
        if (folder / "model.onnx").exists():
            api = HfApi()
            api.create_repo(repo, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder)
        else:
            AutoModelForSequenceClassification.from_pretrained(folder).push_to_hub(repo)


def under_load(study: Study) -> None:
    """Start, memory and requests a second of each endpoint, from the files that were pulled."""
    given, rows = study.given, []
    queries = queries_of(study)
    texts = [text for kind in queries for text in list(queries[kind]["text"])[:300]]
    texts = [texts[place * 7 % len(texts)] for place in range(len(texts))]  # kinds alternate
    before = {row["round"] for row in compact.load(given.output).get("load", [])}
    for turn in range(len(before), len(before) + given.rounds):
        models = given.models or SERVED
        for name in models if turn % 2 else models[::-1]:
            environment = {"HF_HOME": str(study.work / "pulled" / name), "HF_HUB_OFFLINE": "1", **THREADS}
            with Server(f"{given.namespace}/{name}", environment, given.threads) as server:
                row = {"model": name, "round": turn, "threads": given.threads, "start": server.first_answer(texts[0])}
                for text in texts[:WARM_UP]:
                    server.classify([text])
                row["resident_mib"] = server.memory()["resident_mib"]
                for clients in CLIENTS:
                    found = load(server.address, texts, clients, given.seconds)
                    row |= {f"{key}_{clients}": value for key, value in found.items()}
                row["peak_mib"] = server.memory()["peak_mib"]
                rows.append(row)
                print(row, flush=True)
        compact.update(given.output, compact.load(given.output), "load", rows, "model", "round")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("models", nargs="*", help="Not all of them; not for make.")
    parser.add_argument("--data", type=Path, help="Folder of CLINC150's parquet files.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for models and files that are pulled.")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="The pretrained encoder.")
    parser.add_argument("--source", type=Path, help="Folder of a classifier of all intents; else one is trained.")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--retention", type=float, default=RETENTION, help="Of the module.")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="Most training queries that the cut sees.")
    parser.add_argument("--layers", type=int, default=2, help="Of truncated encoders.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hub", help="Address of a Hub that you are signed in to.")
    parser.add_argument("--namespace", default="me", help="User or organization there.")
    parser.add_argument("--threads", type=int, default=1, help="Of the endpoint's model.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="Of each load.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Takes one step."""
    given = arguments(words)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)
    STEPS[given.step](given if given.step == "push" else Study(given))


STEPS = {"make": make, "export": export, "answers": answers, "push": push, "load": under_load}

if __name__ == "__main__":
    main()
