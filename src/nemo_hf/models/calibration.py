"""Reads the samples that a cut is calibrated on, in whatever form a user has them, to be repeated batch by batch."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel
from transformers.image_utils import is_pil_image

from .batches import Pair, sample_count, select_pair
from .calibration_inputs import MIXED, MOST_NAMED, InputReader, is_data_set
from .labels import LABEL_COLUMNS, check_label_numbers

logger = logging.getLogger(__name__)

SEARCHED = 100  # times `max_samples`: how far a stream is read for samples of the labels that are wanted

Item = TypeVar("Item")


class Calibration:
    """Calibration samples in batches on the CPU: the same samples in the same order, as often as it is iterated.

    Iterating yields pairs of model inputs by name, without labels, and labels: `None` if the data have none, else ids,
    shape (batch,), where a sample may have several labels booleans, shape (batch, labels), or those of a head that
    answers for each token or pixel, in the shape of its answers.
    """

    def __init__(self, reads: Sequence[Callable[[], Pair]], samples: int) -> None:
        self._reads, self._samples = reads, samples

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[Pair]:
        known: set[bool] = set()
        for read in self._reads:
            inputs, labels = read()
            known.add(labels is not None)
            if len(known) > 1:
                raise ValueError(MIXED)
            yield dict(inputs), labels


def read_calibration(
    model: PreTrainedModel,
    calibration: Any,
    processing_class: Any = None,
    batch_size: int = 32,
    max_samples: int = 1000,
    labels_wanted: Sequence[int] | None = None,
) -> Calibration:
    """Reads calibration samples for a plain model, a parent or a module.

    Of data that can be read at any place a fixed seed draws, and unless they are texts, which are small, they are read
    again at each pass; of a stream or generator the first samples are taken and kept. Columns that the model's
    `forward` does not name are left out. Texts are sorted by length.

    Args:
        model: The model that the inputs are for.
        calibration: A data set of prepared inputs (such as `input_ids` or `pixel_values`) or with a column of texts,
            images or audio; a `DataLoader`; an iterable of batches or samples; a list of texts, images or recordings.
        processing_class: Tokenizer, image processor, feature extractor or processor of texts, images or audio; `None`
            takes the one that a parent or module carries.
        batch_size: Most samples in a batch.
        max_samples: Most samples in all; with `labels_wanted` of these labels, and up to as many again of others.
        labels_wanted: Ids of labels whose samples are drawn first, where the data have labels.

    Returns:
        The samples.

    Raises:
        TypeError: If `calibration` or `processing_class` is of another kind than the model reads.
        ValueError: If there are no samples, or some that the model can't take; at a pass also if numbers are not
            finite, or if only some of the samples have labels.
    """
    for name, number in {"batch_size": batch_size, "max_samples": max_samples}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"Got {name}={number!r}; expected a whole number of samples. Pass {name}=32, say.")
    reader = InputReader(model, processing_class, labels_wanted or ())
    source, collate, places = _opened(calibration, reader)
    if isinstance(source, Iterator):
        first = next(source, None)
        _check_some(first is not None)
        source = chain([first], source)
    else:
        first = source[places[0]]
    size = 1 if reader.takes_one else batch_size
    if collate is None and reader.is_batch(first):
        if not isinstance(first, Mapping) or all(isinstance(values, Tensor) for values in first.values()):
            return _of_batches(reader, source, size, max_samples)
        source = (sample for batch in source for sample in reader.unbatched(batch))  # lists of any lengths
    if isinstance(source, Iterator):
        source = _chosen(islice(source, SEARCHED * max_samples), reader.label, max_samples, reader)
        places = range(len(source))
    else:
        _warn_of_other_name(source, reader)
        source = reader.columns_needed(source, first) if collate is None else source
        column = _label_column(source, reader)
        drawn = (places[index] for index in _drawn(len(places)))
        label_of = (lambda place: reader.label(source[place])) if column is None else column.__getitem__
        places = sorted(_chosen(drawn, label_of, max_samples, reader))
    return _of_samples(reader, source, places, collate, size)


def _drawn(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def _check_some(is_any: bool) -> None:
    if not is_any:
        raise ValueError(
            "Got no calibration samples; expected some. Pass a few hundred; a generator can be read once only."
        )


def _opened(calibration: Any, reader: InputReader) -> tuple[Any, Any, Sequence[int]]:
    """Elements to read (an iterator, or by place), the collate function of a `DataLoader`, and the places."""
    if isinstance(calibration, (str, bytes)):
        raise TypeError(f"Got one text, {calibration[:80]!r}; expected several. Pass a list of them: [text, ...].")
    if isinstance(calibration, Mapping):
        if not reader.main_of(calibration):
            parts = list(calibration)[:MOST_NAMED]
            do = f"Pass one part of it: calibration[{next(iter(parts), None)!r}]."
            raise ValueError(f"Got a {type(calibration).__name__} with {parts}; expected {reader.expected}. {do}")
        calibration = reader.unbatched(calibration) if reader.is_batch(calibration) else [calibration]
    name = type(calibration).__name__
    has_places = isinstance(calibration, DataLoader) and not isinstance(calibration.dataset, IterableDataset)
    if has_places and calibration.batch_sampler is not None:
        with torch.random.fork_rng(devices=[]):
            places = sorted(set(chain.from_iterable(calibration.batch_sampler)))
        _check_some(bool(places))
        return calibration.dataset, calibration.collate_fn, places
    if isinstance(calibration, (Tensor, np.ndarray)) and calibration.ndim < 2:
        raise TypeError(f"Got one array of shape {tuple(calibration.shape)}; expected several. Pass a list: [array].")
    if is_pil_image(calibration):
        raise TypeError("Got one image; expected several. Pass a list of them: [image].")
    is_listed = hasattr(calibration, "__getitem__") and hasattr(calibration, "__len__")
    if hasattr(calibration, "iloc") or not (is_listed or isinstance(calibration, Iterable)):
        do = "Pass datasets.Dataset.from_pandas(...) of it." if hasattr(calibration, "iloc") else "Pass a list of them."
        raise TypeError(f"Got a {name} as calibration; expected {reader.expected}. {do}")
    if not is_listed or isinstance(calibration, IterableDataset) or is_data_set(calibration, "IterableDataset"):
        return iter(calibration), None, ()
    _check_some(len(calibration) > 0)
    return calibration, None, range(len(calibration))


def _chosen(items: Iterator[Item], label_of: Callable[[Item], Any], most: int, reader: InputReader) -> list[Item]:
    """The first `most` items, or that many with labels that are wanted, and up to as many of others."""
    own: list[Item] = []
    others: list[Item] = []
    for item in items if reader.wanted else ():
        label = label_of(item)
        if label is None:  # the data have no labels; if only some have, a pass will say so
            return [*own, *others, item, *islice(items, most)][:most]
        part = own if reader.is_wanted(label) else others
        part += [item] if len(part) < most else []
        if len(own) == most and (reader.wants_all or len(others) == most):
            break
    if not reader.wanted:
        return list(islice(items, most))
    _check_own(own)
    return own + others[: len(own) or most]


def _check_own(own: Sequence[Any]) -> None:
    if not own:
        logger.warning(
            "None of the calibration or validation samples has a label of the module: it would be cut on inputs that "
            "it is not for, or can't be measured. Pass samples of its labels, or data without labels."
        )


def _label_column(source: Any, reader: InputReader) -> list[Any] | None:
    """The labels of a `datasets.Dataset`, read without its other columns, if some are wanted more than others."""
    name = next((name for name in LABEL_COLUMNS if name in (getattr(source, "column_names", None) or ())), None)
    if name is None or not is_data_set(source):
        return None
    check_label_numbers(getattr(source.features[name], "names", None) or [], name, reader.names)
    return list(source.with_format(None)[name]) if reader.wanted else None


def _warn_of_other_name(source: Any, reader: InputReader) -> None:
    """Warns of a column with the names of the model's labels that is called otherwise, and so not read."""
    if not is_data_set(source) or set(LABEL_COLUMNS) & set(source.column_names):
        return
    names = set(reader.names.values())
    columns = {name: set(getattr(feature, "names", None) or ()) for name, feature in source.features.items()}
    if found := next((column for column, known in columns.items() if known and known <= names), None):
        logger.warning(
            "The column %r has names of the model's labels but is not read, so all samples count as the module's own. "
            "Pass dataset.rename_column(%r, 'label'), or remove it.",
            *(found, found),
        )


def _of_samples(reader: InputReader, source: Any, places: Sequence[int], collate: Any, size: int) -> Calibration:
    if reader.kind == "text":
        source = [source[place] for place in places]
        source = sorted(source, key=reader.length) if collate else reader.tokenized(source)
        places = range(len(source))

    def read(part: Sequence[int]) -> Pair:
        return reader.pair((collate or reader.collate)([source[place] for place in part]), part)

    parts = [places[start : start + size] for start in range(0, len(places), size)]
    return Calibration([partial(read, part) for part in parts], len(places))


def _of_batches(reader: InputReader, batches: Any, size: int, most: int) -> Calibration:
    """Keeps so many samples of batches, of a list drawn at random, in their order, and splits large batches."""
    numbered = enumerate(batches) if isinstance(batches, Iterator) else ((i, batches[i]) for i in _drawn(len(batches)))
    kept: dict[bool, list[tuple[int, Pair]]] = {True: [], False: []}
    missing, seen = {True: most, False: 0 if reader.wants_all else most}, 0
    for number, batch in numbered:
        pair = reader.pair(batch, range(seen, seen + SEARCHED * most))
        is_own = reader.own_samples(pair)
        seen += len(is_own)
        for own, entries in kept.items():
            part = select_pair(pair, (is_own == own).nonzero().flatten()[: missing[own]])
            missing[own] -= sample_count(part[0])
            entries += [(number, part)] if sample_count(part[0]) else []
        if (not missing[True] and (pair[1] is None or not missing[False])) or seen >= SEARCHED * most:
            break
    _check_own(kept[True])
    left = sum(sample_count(part[0]) for _, part in kept[True]) or most
    for number, part in kept[False]:
        kept[True] += [(number, select_pair(part, torch.arange(min(left, sample_count(part[0])))))] if left else []
        left = max(0, left - sample_count(part[0]))
    pairs = [part for _, part in sorted(kept[True], key=lambda entry: entry[0])]
    parts = [select_pair(pair, rows) for pair in pairs for rows in torch.arange(sample_count(pair[0])).split(size)]
    return Calibration(
        [partial(lambda pair: pair, part) for part in parts], sum(sample_count(inputs) for inputs, _ in parts)
    )
