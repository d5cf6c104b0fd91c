"""Calibration data that can't be used are refused: what was got, what was expected, and a remedy."""

import datasets
import numpy as np
import pytest
import torch
from conftest import image_samples, text_samples, tokenizer
from PIL import Image
from training_helpers import batch_of, check_message, text_table

from nemo_hf.models.calibration import read_calibration

ROWS = [{"input_ids": sample["input_ids"].tolist(), "label": sample["labels"]} for sample in text_samples(3)]
IMAGES = [Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))] * 2
NAN = [{"pixel_values": torch.full((3, 16, 16), value)} for value in (0.0, float("nan"), 1.0, float("inf"))]
NO_LABEL = {"input_ids": [1, 2]}
BAD_TEXTS = {
    "one text": (lambda: "w1 w2", TypeError, "Pass a list of them"),
    "none": (list, ValueError, "Got no calibration samples"),
    "an empty generator": (lambda: iter(()), ValueError, "Got no calibration samples"),
    "a number": (lambda: 3, TypeError, "Got a int as calibration"),
    "numbers": (lambda: [1, 2], ValueError, "input_ids"),
    "splits": (lambda: datasets.DatasetDict(train=text_table()), ValueError, r"calibration\['train'\]"),
    "other columns": (lambda: datasets.Dataset.from_dict({"score": [1.0]}), ValueError, "'score'"),
    "two texts": (lambda: datasets.Dataset.from_dict({"a": ["w1"], "b": ["w2"]}), ValueError, "select_columns"),
    "label and none": (lambda: [*ROWS, NO_LABEL], ValueError, "some have labels"),
    "batches with and without": (lambda: [batch_of(text_samples(2)), {"input_ids": torch.ones(2, 3).long()}],
                                 ValueError, "some have labels"),
    "unknown label": (lambda: [{**ROWS[0], "label": "dogg"}], ValueError, "Did you mean 'dog'"),
    "other columns later": (lambda: [{"input_ids": [1]}, {"input_ids": [1], "token_type_ids": [0]}],
                            ValueError, "alike"),
    "other numbers": (lambda: text_table().cast_column("label", datasets.ClassLabel(names=["dog", "cat", *"abc"])),
                      ValueError, "id2label"),
    "missing labels": (lambda: [{**NO_LABEL, "label": 9}], ValueError, "Got the label 9"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_calibration_data_are_refused_with_a_remedy(bert, kind):
    data, error, words = BAD_TEXTS[kind]
    with pytest.raises(error, match=words) as raised:
        list(read_calibration(bert, data(), tokenizer()))
    check_message(raised)


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (NAN, {}, ValueError, r"'pixel_values' of the calibration samples \[1, 3\]"),
        ([batch_of(NAN)], {}, ValueError, r"'pixel_values' of the calibration samples \[1, 3\]"),
        (IMAGES, {}, ValueError, r"processing_class=AutoImageProcessor.from_pretrained\("),
        (IMAGES, {"processing_class": tokenizer()}, TypeError, "expected an image processor"),
        (IMAGES, {"processing_class": "google/vit"}, TypeError, "Got a str as processing_class"),
        (IMAGES[0], {}, TypeError, "Got one image"),
        (np.zeros(5), {}, TypeError, "Got one array"),
        ([{"pixel_values": torch.zeros(3, 16, 16)}, {"pixel_values": torch.zeros(3, 8, 8)}], {}, ValueError, "shapes"),
        (image_samples(2), {"max_samples": 0}, ValueError, "max_samples=0"),
        (image_samples(2), {"batch_size": 2.0}, ValueError, "batch_size=2.0"),
    ],
)
def test_bad_images_and_options_are_refused_with_a_remedy(vit, data, options, error, words):
    with pytest.raises(error, match=words) as raised:
        list(read_calibration(vit, data, **options))
    check_message(raised)
