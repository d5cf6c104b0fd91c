"""Calibration samples of every kind of data come out as the processor or collator of transformers gives them."""

import datasets
import numpy as np
import pytest
import torch
from conftest import FAMILIES, fresh, image_processor, image_samples, parent_of, text_samples, tiny, tokenizer
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from training_helpers import Stream, batch_of
from transformers import (
    DataCollatorWithPadding,
    Wav2Vec2FeatureExtractor,
    default_data_collator,
)

from nemo_hf.models.calibration import read_calibration

TEXTS = ["w5 w6", "w1 w2 w3 w4", "w7", "w2 w9 w8 w100 w3 w3", "unknown w4 w5"]
WAV2VEC2 = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
            "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}  # fmt: skip


def pairs_of(model, data, *args, **options):
    calibration = read_calibration(model, data, *args, **options)
    pairs, again = list(calibration), list(calibration)
    assert len(calibration) == sum(len(next(iter(inputs.values()))) for inputs, _ in pairs)
    for (inputs, labels), (others, more) in zip(pairs, again, strict=True):
        assert_same(inputs, others)
        assert (labels is None) == (more is None)
        assert labels is None or torch.equal(labels, more)
    return pairs


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].device.type == "cpu"
        assert torch.equal(got[name], value), name


def samples_of(pairs):
    """Labels and inputs of all samples without padding, sorted."""
    found = []
    for inputs, labels in pairs:
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            found.append((int(labels[row]), {name: value[row][mask].tolist() for name, value in inputs.items()}))
    return sorted(found, key=lambda sample: (sample[0], sample[1]["input_ids"]))


def ragged(count=20):
    """Token ids of unequal lengths, as lists, with labels."""
    samples = [(s["input_ids"][s["attention_mask"].bool()].tolist(), s["labels"]) for s in text_samples(count)]
    return [{"input_ids": ids, "label": label} for ids, label in samples]


def images(count=10):
    pixels = (torch.stack([s["pixel_values"] for s in image_samples(count)]).clamp(0, 2) * 120).byte()
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


TEXT_DATA = {
    "rows": lambda rows: rows,
    "data set": datasets.Dataset.from_list,
    "torch format": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "stream of datasets": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "stream of torch": Stream,
    "generator": lambda rows: iter(rows),
    "other columns": lambda rows: datasets.Dataset.from_list([{"idx": 1, "text": "w3", **row} for row in rows]),
    "loader": lambda rows: DataLoader(rows, batch_size=3, collate_fn=DataCollatorWithPadding(tokenizer())),
    "shuffled loader": lambda rows: DataLoader(rows, 3, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer())),
    "batches": lambda rows: [DataCollatorWithPadding(tokenizer())(rows[i : i + 7]) for i in range(0, len(rows), 7)],
    "one-shot batches": lambda rows: iter(TEXT_DATA["batches"](rows)),
    "lists by batch": lambda rows: datasets.Dataset.from_list(rows).iter(7),
    "lists": lambda rows: datasets.Dataset.from_list(rows)[:],
    "one batch": lambda rows: DataCollatorWithPadding(tokenizer())(rows),
}


@pytest.mark.parametrize("kind", TEXT_DATA)
@pytest.mark.parametrize("processor", [None, tokenizer()], ids=["no processor", "tokenizer"])
def test_all_forms_of_the_same_texts_give_the_same_samples(bert, kind, processor):
    rows = ragged()
    pairs = pairs_of(bert, TEXT_DATA[kind](rows), processor, batch_size=6)
    expected = [(row["label"], row["input_ids"]) for row in rows]
    assert [(label, inputs["input_ids"]) for label, inputs in samples_of(pairs)] == sorted(expected)
    assert all(set(inputs) == {"input_ids", "attention_mask"} for inputs, _ in pairs)
    assert max(len(labels) for _, labels in pairs) <= 6


@pytest.mark.parametrize("processor", [None, tokenizer()], ids=["config", "tokenizer"])
def test_rows_of_other_lengths_are_padded_as_the_tokenizer_does(processor):
    model = tiny(*[FAMILIES["bert"][0]], **{**FAMILIES["bert"][1], "pad_token_id": 0})
    rows = sorted(ragged(), key=lambda row: len(row["input_ids"]))
    pairs = pairs_of(model, ragged(), processor, batch_size=8)
    for start, (inputs, labels) in zip(range(0, 20, 8), pairs, strict=True):
        expected = DataCollatorWithPadding(tokenizer())(rows[start : start + 8])
        assert labels.tolist() == expected.pop("labels").tolist()
        assert_same(inputs, dict(expected))


def test_the_padding_token_is_that_of_the_configuration(bert):
    bert.config.pad_token_id = 7
    ((inputs, _),) = pairs_of(bert, [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert inputs["input_ids"].tolist() == [[4, 7, 7], [1, 2, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_model_without_a_padding_token_gets_one_text_at_a_time():
    model = fresh("gpt2")
    model.config.pad_token_id = None
    pairs = pairs_of(model, ragged(5))
    assert [len(inputs["input_ids"]) for inputs, _ in pairs] == [1] * 5
    for inputs, _ in pairs:
        model(**inputs)


RAW_TEXTS = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "generator": (text for text in TEXTS),
    "data set": datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(5)), "intent": ["a"] * 5}),
    "column": datasets.Dataset.from_dict({"query": TEXTS})["query"],
    "stream": datasets.Dataset.from_dict({"query": TEXTS}).to_iterable_dataset(),
    "pairs": [(text, None) for text in TEXTS],
}


@pytest.mark.parametrize("kind", RAW_TEXTS)
def test_raw_texts_come_out_as_the_tokenizer_gives_them(bert, kind):
    data = RAW_TEXTS[kind]
    ((inputs, labels),) = pairs_of(bert, data, tokenizer())
    by_length = sorted(TEXTS, key=lambda text: len(text.split()))
    assert labels is None
    assert_same(inputs, dict(tokenizer()(by_length, padding=True, return_tensors="pt")))


def test_texts_are_cut_to_what_tokenizer_or_model_takes(bert):
    texts, short = ["w1 " * 100, "w2"], tokenizer()
    short.model_max_length = 9
    assert pairs_of(bert, texts, short)[0][0]["input_ids"].shape == (2, 9)
    ((inputs, _),) = pairs_of(bert, texts, tokenizer())
    assert bert(**inputs).logits.isfinite().all()


def test_the_processor_that_a_parent_carries_is_taken(vit):
    parent = parent_of("bert")
    parent.attach_processor(tokenizer())
    assert_same(pairs_of(parent, TEXTS)[0][0], pairs_of(parent, TEXTS, tokenizer())[0][0])
    parent = parent_of("vit")
    parent.attach_processor(image_processor())
    assert_same(pairs_of(parent, images())[0][0], pairs_of(vit, images(), image_processor())[0][0])


IMAGES = {
    "PIL": images(),
    "arrays": [np.asarray(image) for image in images()],
    "one array": np.stack([np.asarray(image) for image in images()]),
    "gray among them": [*images()[:9], images()[9].convert("L")],
    "data set": datasets.Dataset.from_dict({"img": images(), "id": list(range(10))}).cast_column(
        "img", datasets.Image()
    ),
    "pairs": [(image, 3) for image in images()],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_raw_images_come_out_as_the_image_processor_gives_them(vit, kind):
    expected = images()
    if kind == "gray among them":
        expected = [image.convert("RGB") for image in IMAGES[kind]]
    pairs = pairs_of(vit, IMAGES[kind], image_processor(), batch_size=4)
    assert [len(inputs["pixel_values"]) for inputs, _ in pairs] == [4, 4, 2]
    got = torch.cat([inputs["pixel_values"] for inputs, _ in pairs])
    assert torch.equal(got, image_processor()(images=expected, return_tensors="pt")["pixel_values"])
    assert all((labels is not None) == (kind == "pairs") for _, labels in pairs)


PREPARED_IMAGES = {
    "samples": lambda samples: samples,
    "data set": datasets.Dataset.from_list,
    "transformed": lambda samples: datasets.Dataset.from_list(samples).with_transform(dict),
    "tensors": lambda samples: TensorDataset(*batch_of(samples).values()),
    "loader of tensors": lambda samples: DataLoader(TensorDataset(*batch_of(samples).values()), 3),
    "loader": lambda samples: DataLoader(samples, 3, collate_fn=default_data_collator),
    "loader of a part": lambda samples: DataLoader([*samples, *image_samples(9, 1)], sampler=range(20)),
    "batches": lambda samples: list(DataLoader(samples, 20)),
}


@pytest.mark.parametrize("kind", PREPARED_IMAGES)
def test_prepared_images_keep_their_order(vit, kind):
    samples = image_samples(20)
    pairs = pairs_of(vit, PREPARED_IMAGES[kind](samples), batch_size=8)
    expected = batch_of(samples)
    assert torch.equal(torch.cat([inputs["pixel_values"] for inputs, _ in pairs]), expected["pixel_values"])
    assert torch.equal(torch.cat([labels for _, labels in pairs]), expected["labels"])


@pytest.mark.parametrize("returns_mask", [False, True])
def test_raw_audio_comes_out_as_the_feature_extractor_gives_it(returns_mask):
    model = tiny("Wav2Vec2ForSequenceClassification", **WAV2VEC2)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=returns_mask, do_normalize=True)
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=size).astype(np.float32) for size in (500, 800, 650)]
    expected = dict(extractor(arrays, sampling_rate=16000, padding=True, return_tensors="pt"))
    for data in (arrays, [{"array": array, "sampling_rate": 16000} for array in arrays]):
        ((inputs, _),) = pairs_of(model, data, extractor)
        assert inputs.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(inputs[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"cast_column\('audio', datasets.Audio\(sampling_rate=16000\)\)"):
        list(read_calibration(model, [{"array": arrays[0], "sampling_rate": 8000}], extractor))


@pytest.mark.parametrize("form", ["data set", "rows", "generator", "batches", "loader"])
def test_samples_of_wanted_labels_come_first_and_others_no_more_than_those(bert, form):
    rows = ragged(100)  # labels 0 to 4 in turn
    data = {**TEXT_DATA, "data set": datasets.Dataset.from_list}[form](rows)
    for wanted, most, expected in (
        ([2], 30, (20, 20)),
        ([2], 10, (10, 10)),
        ([0, 1], 15, (15, 15)),
        (range(5), 7, (7, 0)),
    ):
        if form == "generator":
            data = iter(rows)
        pairs = pairs_of(bert, data, labels_wanted=wanted, max_samples=most)
        labels = torch.cat([labels for _, labels in pairs])
        own = int(torch.isin(labels, torch.tensor(list(wanted))).sum())
        assert (own, len(labels) - own) == expected


def test_a_draw_reads_no_more_than_it_keeps_and_is_the_same_each_time(vit):
    class Counted(torch.utils.data.Dataset):
        read = ()

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.read = {*self.read, index}
            return {"pixel_values": torch.full((3, 16, 16), float(index))}

    first, again = Counted(), Counted()
    drawn = [
        int(v) for inputs, _ in read_calibration(vit, first, max_samples=9) for v in inputs["pixel_values"][:, 0, 0, 0]
    ]
    pairs_of(vit, again, max_samples=9)
    assert first.read - {0} == again.read - {0} == set(drawn) - {0}
    assert drawn == sorted(drawn)
    assert (len(drawn), drawn[-1] > 500) == (9, True)

    def stream():
        yield from (first[index] for index in range(12))
        raise AssertionError("read too far")

    assert len(read_calibration(vit, stream(), max_samples=9)) == 9


@pytest.mark.parametrize("lists", [True, False])
def test_labels_of_several_kinds_are_read_as_elsewhere(bert, lists):
    rows = ragged(6)
    hot = np.eye(5, dtype=np.float32)[[row["label"] for row in rows]]
    chances = [{**row, "label": own.tolist() if lists else own} for row, own in zip(rows, hot, strict=True)]
    named = [{**row, "label": bert.config.id2label[row["label"]]} for row in rows]
    expected = torch.cat([labels for _, labels in pairs_of(bert, rows)])
    for data in (chances, named):
        assert torch.equal(torch.cat([labels for _, labels in pairs_of(bert, data)]), expected)
    bert.config.problem_type = "multi_label_classification"
    several = torch.cat([labels for _, labels in pairs_of(bert, chances, labels_wanted=[0])])
    assert (several.dtype, several.shape[1]) == (torch.bool, 5)


def test_labels_of_tokens_are_padded_with_the_one_that_counts_nowhere():
    model = tiny("BertForTokenClassification", **FAMILIES["bert"][1])
    rows = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [8], "labels": [4]}]
    ((_, labels),) = pairs_of(model, rows)
    assert labels.tolist() == [[4, -100, -100], [1, 2, 3]]


def test_samples_of_other_labels_only_are_warned_about(bert, caplog):
    pairs = pairs_of(bert, [row for row in ragged() if row["label"]], labels_wanted=[0])
    assert "None of the calibration or validation samples has a label of the module" in caplog.text
    assert sum(len(labels) for _, labels in pairs) == 16
