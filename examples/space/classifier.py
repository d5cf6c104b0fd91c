"""The classifier that visitors of the app cut modules from: what it loads, cuts, measures and compares."""

import copy
import shlex
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import nemo_hf
from nemo_hf.cli.data import load_samples
from nemo_hf.cli.models import load_plain, names_of, read_config
from nemo_hf.evaluation.latency import count_macs
from nemo_hf.models.calibration_inputs import input_kind
from nemo_hf.models.cut_saved import saved_processor
from nemo_hf.models.weight_files import size_in_bytes

RUNS = 10  # of a model on one input, of which the fastest counts


class Source:
    """A plain classifier of texts or images with its samples; all visitors share it, and nothing changes it.

    Args:
        model: Directory or Hub repository of the classifier and its tokenizer or image processor.
        data: Folder or Hub data set with samples to cut on; labels are named as the model names them.
        split: Split to cut on.
        validation_split: Split to measure modules and to calibrate their rejection on; empty: none.
        label_column: Column of the labels.
        max_samples: Most samples of the module's labels to cut on.
    """

    def __init__(
        self, model: str, data: str, split: str, validation_split: str, label_column: str, max_samples: int
    ) -> None:
        self.name, self.data, self.split, self.validation_split = model, data, split, validation_split
        self.label_column, self.max_samples = label_column, max_samples
        self.model = load_plain(model, read_config(model)).eval()
        self.kind = input_kind(self.model)
        if self.kind not in ("text", "image"):
            raise ValueError(f"Got {model!r}, a model of {self.kind}; expected one of texts or images. Name another.")
        self.processor = saved_processor(self.model, model)
        if self.processor is None:
            raise ValueError(f"Got {model!r} without a processor; expected one beside the model. Save it there, too.")
        self.labels = list(names_of(self.model.config).values())
        read = {"kind": self.kind, "names": self.labels, "label_column": label_column}
        self.samples = load_samples(data, split, **read)
        self.validation = load_samples(data, validation_split, **read) if validation_split else None
        self.bytes = size_in_bytes(self.model.parameters())
        reference = nemo_hf.make_parent(copy.deepcopy(self.model), nemo_hf.NeMoConfig(masks="static"))
        self.macs = count_macs(reference)

    def cut(
        self, labels: Sequence[str], retention: float, shares_tokens: bool = False, texts: str | None = None
    ) -> Any:
        """Cuts a module, on a visitor's own texts, one in a line, if there are any."""
        own = [line.strip() for line in (texts or "").splitlines() if line.strip()]
        return nemo_hf.extract_module(
            self.model,
            list(labels),
            calibration=own or self.samples,
            retention=retention,
            validation=self.validation,
            processing_class=self.processor,
            vocabulary="shared" if shares_tokens else None,
            max_samples=self.max_samples,
        )

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """The models' inputs of one text or image."""
        if self.kind == "text":
            return dict(self.processor(sample, truncation=True, return_tensors="pt"))
        return dict(self.processor(images=sample.convert("RGB"), return_tensors="pt"))

    def table(self, module: Any) -> list[tuple[str, str, str]]:
        """What a module costs and how good it is, beside its source: rows of a name and two values."""
        done, rejection = module.config.extraction, module.config.rejection
        _, times = self.run(module, (self.validation or self.samples)[0][self.input_column])
        rows = [
            ("Size", f"{self.bytes / 1e6:.2f} MB", f"{done['bytes'] / 1e6:.2f} MB ({done['bytes'] / self.bytes:.0%})"),
            ("Multiply-accumulates", f"{self.macs / 1e6:,.2f} M", _share(count_macs(module), self.macs)),
            ("Time of an input", *(f"{milliseconds:.2f} ms" for milliseconds in times.values())),
            ("Cut in", "", f"{done['seconds']:.1f} s, on {done['samples']} samples"),
        ]
        if "accuracy" in (found := done.get("validation", {})):
            shares = (f"{found['source_accuracy']:.1%}", f"{found['accuracy']:.1%}")
            rows.append((f"Accuracy on {found['samples']} other samples of these labels", *shares))
        if rejection:
            rows.append(("Inputs of other labels that it rejects", "", f"{rejection['rejected']:.0%}"))
            rows.append(("Inputs of its own labels that it rejects", "", f"{1 - rejection['accepted']:.0%}"))
        return rows

    @property
    def input_column(self) -> str:
        """Column of the texts or images."""
        return next(name for name in self.samples.column_names if name != "labels")

    @torch.no_grad()
    def run(self, module: Any, sample: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Logits of the `source` and the `module` for a sample, and their milliseconds."""
        inputs, logits, fastest = self.prepare(sample), {}, dict.fromkeys(("source", "module"), float("inf"))
        for _ in range(RUNS):  # in turn, so that a busy moment meets both
            for name, model in {"source": self.model, "module": module}.items():
                start = time.perf_counter()
                logits[name] = model(**inputs).logits[0]
                fastest[name] = min(fastest[name], 1000 * (time.perf_counter() - start))
        return logits, fastest

    def compare(self, module: Any, sample: Any) -> dict[str, tuple[dict[str, float], float]]:
        """Chances by label, and milliseconds: of the source, of the module's labels in it, and of the module."""
        (whole, own), (slow, fast) = (each.values() for each in self.run(module, sample))
        ids = module.config.label_ids
        return {
            "all": (self._chances(whole, self.labels), slow),
            "restricted": (self._chances(whole[ids], [self.labels[index] for index in ids]), slow),
            "module": (self._chances(own, list(module.config.id2label.values())), fast),
        }

    def _chances(self, logits: Tensor, names: Sequence[str]) -> dict[str, float]:
        has_several = self.model.config.problem_type == "multi_label_classification"
        chances = logits.sigmoid() if has_several else logits.softmax(-1)
        return dict(zip(names, chances.tolist(), strict=True))

    def sample_of(self, labels: Sequence[str], is_own: bool, place: int) -> Any:
        """The sample at a place among those of the given labels, or of others; `None` where there are none."""
        ids, samples = {self.labels.index(label) for label in labels}, self.validation or self.samples
        if "labels" not in samples.column_names:
            return None
        fitting = [index for index, label in enumerate(samples["labels"]) if (label in ids) is is_own]
        return samples[fitting[place % len(fitting)]][self.input_column] if fitting else None

    def command(self, labels: Sequence[str], retention: float, shares_tokens: bool) -> str:
        """The command that cuts such a module on the samples of the app."""
        words = ["nemo-hf", "cut", self.name, "--labels", *labels, "--dataset", self.data, "--split", self.split]
        words += ["--label-column", self.label_column, "--samples", str(self.max_samples)]
        words += ["--validation-split", self.validation_split] if self.validation_split else []
        words += ["--vocabulary", "shared"] if shares_tokens else []
        return shlex.join([*words, "--retention", f"{retention:g}", "--output-dir", "module"])

    def code(self, labels: Sequence[str], retention: float, shares_tokens: bool) -> str:
        """Code that cuts such a module on samples of one's own, and uses it."""
        words = {"text": ("Sequence", "Tokenizer"), "image": ("Image", "ImageProcessor")}
        word, processor = words[self.kind]
        vocabulary = ', vocabulary="shared"' if shares_tokens else ""
        return f"""import nemo_hf
from transformers import AutoModelFor{word}Classification, Auto{processor}, pipeline

name = {self.name!r}
model, processor = AutoModelFor{word}Classification.from_pretrained(name), Auto{processor}.from_pretrained(name)
module = nemo_hf.extract_module(
    model, {list(labels)!r}, calibration=samples, processing_class=processor, retention={retention:g}{vocabulary}
)  # samples: a data set, or a list of {self.kind}s
module.save_pretrained("module")
classify = pipeline("{self.kind}-classification", model="module")
"""


def _share(value: int, whole: int) -> str:
    return f"{value / 1e6:,.2f} M ({value / whole:.0%})"
