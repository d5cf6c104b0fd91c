"""Turns samples and batches of calibration data into a model's inputs: raw or prepared, named or not."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_utils import is_pil_image

from nemo_hf.config import label_id
from nemo_hf.neurons.trial_inputs import random_inputs

from .base import NeMoPreTrainedModel
from .batches import Pair, sample_count
from .configuration import SEVERAL_LABELS
from .labels import IGNORED, LABEL_COLUMNS, has_label, label_ids, label_targets
from .positions import check_length
from .processors import can_pad, features, is_raw, own_processor, padded, part_of, pixels, stacked, tokenized

MAIN_INPUTS = {"text": ("input_ids",), "image": ("pixel_values",), "audio": ("input_values", "input_features")}
ANY_INPUTS = "inputs"  # of Perceiver, in place of these
WHOLE_SAMPLES = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")
MOST_NAMED = 12

MIXED = (
    "Got calibration samples of which some have labels and others have none; expected labels for all or none. Give "
    f"those without one the label {IGNORED}, or remove the column of labels."
)


def input_kind(model: PreTrainedModel) -> str:
    """What a model's samples are: `"text"`, `"image"` or `"audio"`."""
    inputs = random_inputs(model, samples=1)
    return next((kind for kind, names in MAIN_INPUTS.items() if not inputs.keys().isdisjoint(names)), "text")


def is_data_set(data: Any, kind: str = "Dataset") -> bool:
    """Whether data are a `Dataset` or `IterableDataset` of the library `datasets`, which is imported by who has one."""
    return isinstance(data, getattr(sys.modules.get("datasets"), kind, ()))


class InputReader:
    """Turns samples and batches of one kind into a model's inputs."""

    def __init__(self, model: PreTrainedModel, processing_class: Any, wanted: Sequence[int]) -> None:
        plain = model.model if isinstance(model, NeMoPreTrainedModel) else model
        self._model, self._plain, self._given, self._config = model, plain, processing_class, plain.config
        self._accepted = set(inspect.signature(plain.forward).parameters) - set(LABEL_COLUMNS)
        trial = random_inputs(model, samples=1)
        main = next(iter(trial))
        self.kind = input_kind(model)
        self._ndim = trial[main].ndim
        self._mains = [name for name in (*MAIN_INPUTS[self.kind], ANY_INPUTS) if name in self._accepted]
        self._pad: int | None = getattr(self._config.get_text_config(), "pad_token_id", None)
        # Speech models with group norms were trained without masks.
        is_masked = self.kind == "text" or getattr(self._config, "feat_extract_norm", None) == "layer"
        self._has_mask = is_masked and "attention_mask" in self._accepted
        self.takes_one = self.kind == "text" and self._pad is None  # classifiers then take one text at a time
        self._channels = getattr(self._config, "num_channels", 3)
        names = model.config.base_config.id2label if getattr(model.config, "role", "") == "module" else None
        self.names = {int(index): str(name) for index, name in (names or model.config.id2label or {}).items()}
        self._has_several = model.config.problem_type == SEVERAL_LABELS
        self._is_dense = not any(task in type(plain).__name__ for task in WHOLE_SAMPLES)
        self.wanted = set(wanted)
        self.wants_all = self.wanted >= set(self.names)
        self._processor = None if processing_class is None else part_of(processing_class, self.kind)

    @property
    def expected(self) -> str:
        """What calibration data may be, for errors."""
        return f"a data set, a list of {self.kind} samples, or batches with {' or '.join(map(repr, self._mains))}"

    def main_of(self, sample: Mapping[str, Any]) -> str | None:
        """Name of the main prepared input of a sample or batch."""
        found = (name for name in self._mains if name in sample)
        return next((n for n in found if not isinstance(sample[n], str) and not is_pil_image(sample[n])), None)

    def _named(self, element: Any) -> Mapping[str, Any]:
        """A sample or batch as values by name; raw ones, as in pairs with a label, get that of their kind."""
        if isinstance(element, Mapping) and not is_raw(element, self.kind):
            return element
        is_pair = isinstance(element, (tuple, list)) and 1 <= len(element) <= 2
        value, label = (*element, None)[:2] if is_pair else (element, None)
        is_prepared = isinstance(value, Tensor) and self._given is None
        named = {self._mains[0] if is_prepared else self.kind: value}
        return named if label is None else {**named, "labels": label}

    def is_batch(self, element: Any) -> bool:
        """Whether an element is a batch of prepared samples, and not one."""
        named = self._named(element)
        main = self.main_of(named)
        return main is not None and _ndim(named[main]) >= self._ndim

    def unbatched(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The samples of a batch."""
        count = len(batch[self.main_of(batch) or ""])
        columns = {
            name: values for name, values in batch.items() if hasattr(values, "__len__") and len(values) == count
        }
        return [{name: values[index] for name, values in columns.items()} for index in range(count)]

    def _input_columns(self, named: Mapping[str, Any]) -> list[str]:
        """Names of a sample's prepared inputs, or of its one text, image or recording."""
        if self.main_of(named):
            return [name for name in named if name in self._accepted]
        found = [name for name, value in named.items() if name not in LABEL_COLUMNS and is_raw(value, self.kind)]
        found = [name for name in found if name == self.kind] or found
        if len(found) == 1:
            return found
        got = f"the columns {found} of {self.kind} samples" if found else f"samples with {list(named)[:MOST_NAMED]}"
        do = "Keep one: dataset.select_columns([...])." if found else "Prepare the samples with the model's processor."
        if not found and self._given is None:
            do += f" Or pass {self.kind} samples with processing_class=."
        raise ValueError(
            f"Got {got}; expected {' or '.join(map(repr, self._mains))}, or one column of {self.kind} samples. {do}"
        )

    def columns_needed(self, dataset: Any, first: Any) -> Any:
        """The columns of a `datasets.Dataset` that are read, prepared ones as tensors; other data as they are."""
        if not is_data_set(dataset) or dataset.format["type"] == "custom":
            return dataset
        columns = self._input_columns(self._named(first))
        labels = [name for name in LABEL_COLUMNS if name in dataset.column_names][:1]
        needed = dataset.select_columns([*columns, *labels])
        if dataset.format["type"] is not None or not self.main_of(first):
            return needed
        return needed.with_format("torch", columns=columns, output_all_columns=True)

    def label(self, element: Any) -> Any:
        """What the data say of a sample's label, or `None`."""
        named = self._named(element)
        return next((named[name] for name in LABEL_COLUMNS if name in named), None)

    def is_wanted(self, label: Any) -> bool:
        """Whether a sample of this label, or of several, is one of those that come first."""
        if isinstance(label, Mapping):  # of the objects in an image
            label = label.get("class_labels", [])
        values = torch.as_tensor(label_id(label, self.names) if isinstance(label, str) else label)
        if self._has_several and not self._is_dense:
            values = (values >= 0.5).nonzero()
        elif values.is_floating_point() and values.numel() > 1:
            values = values.argmax()
        return not self.wanted.isdisjoint(values.flatten().tolist())

    def own_samples(self, pair: Pair) -> Tensor:
        """Which samples of a batch are of the labels that are wanted: all, where none or no labels are known."""
        inputs, labels = pair
        if labels is None or not self.wanted:
            return torch.ones(sample_count(inputs), dtype=torch.bool)
        return has_label(labels, sorted(self.wanted))

    def tokenized(self, elements: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Text samples as token ids and the like, with their labels, in the order of their lengths."""
        named = [self._named(element) for element in elements]
        if not self.main_of(named[0]):
            columns = [self._input_columns(sample)[0] for sample in named]
            texts = [sample[column] for sample, column in zip(named, columns, strict=True)]
            rows = tokenized(self._find_processor(), texts, self._config)
            labels = [self.label(sample) for sample in named]
            named = [row if own is None else {**row, "labels": own} for row, own in zip(rows, labels, strict=True)]
        return sorted(named, key=self.length)

    def length(self, element: Any) -> int:
        """Number of a text's tokens; 0 where it is not known."""
        named = self._named(element)
        main = self.main_of(named)
        mask = named.get("attention_mask")
        return int(np.asarray(mask).sum()) if mask is not None else len(named[main]) if main else 0

    def _find_processor(self) -> Any:
        if self._processor is None:
            self._processor = part_of(own_processor(self._model, self.kind), self.kind)
        return self._processor

    def collate(self, elements: Sequence[Any]) -> dict[str, Any]:
        """A batch of samples, prepared and padded."""
        named = [self._named(element) for element in elements]
        columns = [self._input_columns(sample) for sample in named]
        if other := next((own for own in columns if set(own) != set(columns[0])), None):
            raise ValueError(
                f"Got a sample with {columns[0]} and one with {other}; expected the same. Prepare all alike."
            )
        inputs: Sequence[Mapping[str, Any]] = [{name: sample[name] for name in columns[0]} for sample in named]
        batch: Mapping[str, Any]
        if not self.main_of(named[0]):
            raw, processor = [sample[columns[0][0]] for sample in named], self._find_processor()
            is_image = self.kind == "image"
            batch = pixels(processor, raw, self._channels) if is_image else features(processor, raw)
        else:
            batch = self._padded(inputs)
        labels = [self.label(sample) for sample in named]
        if any(label is not None for label in labels):
            if any(label is None for label in labels):
                raise ValueError(MIXED)
            batch = {**batch, "labels": self._joined_labels(labels)}
        return dict(batch)

    def _joined_labels(self, labels: Sequence[Any]) -> Any:
        if self._is_dense and not isinstance(labels[0], Mapping):
            return stacked("labels", labels, IGNORED)
        labels = [label_id(label, self.names) if isinstance(label, str) else label for label in labels]
        return [label.tolist() if isinstance(label, (Tensor, np.ndarray, np.generic)) else label for label in labels]

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """A batch of prepared samples, padded by the processor, or else with the padding token of the model."""
        if self.kind != "image" and can_pad(self._processor):
            kept = [{name: value for name, value in sample.items() if name in self._accepted} for sample in samples]
            return padded(self._processor, kept)
        names, differs = samples[0], self.kind != "image"
        batch = {n: stacked(n, [sample[n] for sample in samples], self._padding(n) if differs else None) for n in names}
        if self._has_mask and "attention_mask" not in batch:
            lengths = torch.tensor([len(sample[self.main_of(sample) or ""]) for sample in samples])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch

    def _padding(self, name: str) -> int:
        return (self._pad or 0) if self.kind == "text" and name in self._mains else 0

    def pair(self, batch: Any, numbers: Sequence[int]) -> Pair:
        """The inputs of a batch that the model takes, checked, and its labels; `numbers` are those of its samples."""
        named = self._named(batch)
        main = self.main_of(named)
        if main is None:
            raise ValueError(
                f"Got a batch with {list(named)[:MOST_NAMED]}; expected {' or '.join(map(repr, self._mains))} in it. "
                "Let the data collator return the model's inputs."
            )
        inputs = {name: torch.as_tensor(value).cpu() for name, value in named.items() if name in self._accepted}
        for name, value in inputs.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                wrong = [number for number, own in zip(numbers, value, strict=False) if not bool(own.isfinite().all())]
                raise ValueError(
                    f"Got NaN or infinite numbers in {name!r} of the calibration samples {wrong[:MOST_NAMED]} (counted "
                    "from 0); expected finite ones. Leave these samples out, or correct them."
                )
        check_length(self._plain, self._config, inputs)
        labels = self._labels(self.label(named))
        if labels is not None and len(labels) != len(inputs[main]):
            raise ValueError(
                f"Got {len(labels)} labels for {len(inputs[main])} samples; expected one for each. Correct the batches."
            )
        return inputs, labels

    def _labels(self, given: Any) -> Tensor | None:
        if given is None:
            return None
        if self._is_dense:
            return None if not isinstance(given, Tensor) else given.long().cpu()
        return label_ids(label_targets(given, len(self.names), self._has_several, True), self._has_several).cpu()


def _ndim(value: Any) -> int:
    """Dimensions of a tensor or of nested lists."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    return 1 + (_ndim(value[0]) if len(value) else 0) if isinstance(value, (list, tuple)) else 0
