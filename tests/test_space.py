"""The app that cuts modules in the browser: what it loads, and a visit to it in a headless Chromium."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import LABELS as NAMES
from conftest import example_script, fresh, logits_of, text_samples, tiny, tokenizer
from PIL import Image
from sklearn.datasets import load_digits
from stage import stage as stage
from stage import template as template
from transformers import AutoModelForImageClassification, Trainer, ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import nemo_hf.cli.models
from nemo_hf.cli import demo, main
from nemo_hf.models.rejection import REJECTED_LABEL

SPACE = Path(__file__).parents[1] / "examples" / "space"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SOON = 60_000  # milliseconds for anything to show up on a busy machine
LABELS = ["3", "8", "9"]


def source_of(*words):
    return example_script("space", "classifier").Source(*words)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A directory with a classifier of digits, `model`, and its samples, `data`."""
    folder, half = tmp_path_factory.mktemp("digits"), [0.5] * 3
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}, image_mean=half, image_std=half)
    train, test, held_out = demo.load_digits_split(processor, 0)
    names = [str(digit) for digit in range(10)]
    set_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    trainer = demo.digits_trainer(Trainer, train, test, 0, 15, model=ViTForImageClassification(config))
    trainer.args.per_device_train_batch_size = 32
    trainer.train()
    trainer.model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    found = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in found.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, places in (("train", sorted({*range(len(images))} - {*held_out})), ("test", held_out)):
        rows = {"image": [images[place] for place in places], "label": [int(found.target[place]) for place in places]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-0.parquet")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A directory with a classifier of texts, `model`, whose labels have words of their own, and samples, `data`."""
    folder, model = tmp_path_factory.mktemp("words"), fresh("bert").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = {name: torch.as_tensor(values) for name, values in columns(text_samples(200)).items()}
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    features = datasets.Features(text=datasets.Value("string"), intent=datasets.ClassLabel(names=NAMES))
    for seed, split in enumerate(("train", "test")):
        found = columns(text_samples(200, seed))
        rows = {"text": [text_of(ids) for ids in found["input_ids"]], "intent": found["labels"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-0.parquet")
    return folder


def columns(samples):
    return {name: [each[name] if name == "labels" else each[name].tolist() for each in samples] for name in samples[0]}


def text_of(ids):
    """A text that the tokenizer turns into these ids; each label has twenty words."""
    return " ".join(f"w{index - 2}" for index in ids if index > 1)


TEXTS = ("google-bert/bert-base-uncased", "org/texts", "train", "test", "intent", 20)
WAV2VEC2 = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
            "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}  # fmt: skip
IMAGES = ("google/vit-base-patch16-224-in21k", "org/animals", "train", "", "label", 20)


@pytest.mark.parametrize("words", [TEXTS, IMAGES], ids=["texts", "images"])
def test_the_command_and_the_code_cut_what_the_app_cuts(words, stage):
    source = source_of(*words)
    options = (["dog", "cat"], 0.5, words is TEXTS)
    module = source.cut(*options, None)
    assert main(shlex.split(source.command(*options))[1:]) == 0
    space = {"samples": source.samples}
    exec(compile(source.code(*options), "code", "exec"), space)
    inputs = source.prepare(source.sample_of(["dog"], True, 0))
    expected = logits_of(module, **inputs)
    loaded = nemo_hf.cli.models.load("module")
    torch.testing.assert_close(logits_of(loaded, **inputs), expected)
    assert space["module"].config.label_ids == module.config.label_ids == [1, 0]
    assert {each["label"] for each in space["classify"](source.sample_of(["dog"], True, 0))} <= {
        "dog",
        "cat",
        REJECTED_LABEL,
    }


def test_what_is_shown_is_what_was_measured(stage):
    source = source_of(*TEXTS)
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    module = source.cut(["ship", "car"], 0.5, False, None)
    table = {name: (whole, own) for name, whole, own in source.table(module)}
    assert table["Size"][1].startswith(f"{module.num_parameters() * 4 / 1e6:.2f} MB")
    assert f"Accuracy on {module.config.extraction['validation']['samples']} other samples of these labels" in table
    sample = source.sample_of(["ship"], True, 3)
    found = {name: chances for name, (chances, _) in source.compare(module, sample).items()}
    assert list(found["all"]) == source.labels
    assert list(found["restricted"]) == ["ship", "car"]
    assert list(found["module"]) == ["ship", "car", REJECTED_LABEL]
    logits = source.model(**source.prepare(sample)).logits[0, [3, 2]]
    assert list(found["restricted"].values()) == pytest.approx(logits.softmax(-1).tolist())
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_visitors_texts_take_the_place_of_the_data(stage):
    source = source_of(*TEXTS)
    module = source.cut(["ship", "car"], 0.5, False, "w1 w2\n\n w3 w4 w5 \n" * 4)
    assert module.config.extraction["samples"] == 8
    assert module.config.rejection is not None  # by labelled samples of the validation split


def test_sources_that_the_app_cannot_serve_are_refused(stage):
    shutil.copytree("google/vit-base-patch16-224-in21k", "bare")
    Path("bare/preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="without a processor; expected one beside the model"):
        source_of("bare", *IMAGES[1:])
    tiny("Wav2Vec2ForSequenceClassification", **WAV2VEC2).save_pretrained("audio")
    with pytest.raises(ValueError, match="a model of audio; expected one of texts or images"):
        source_of("audio", *IMAGES[1:])


def test_the_space_names_what_it_needs():
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    app = (SPACE / "app.py").read_text(encoding="utf-8")
    assert head["sdk"] == "gradio"
    assert (SPACE / head["app_file"]).exists()
    assert len(head["short_description"]) <= 60
    assert [f'"{name}"' in app for name in (*head["models"], *head["datasets"])] == [True, True]
    assert "nemo-hf" in (SPACE / "requirements.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "reason"), [
    ({}, "'philschmid/DistilBERT-Banking77', which is no directory here and can't be read from the Hub"),
    ({"model": TEXTS[0], "data": "org/missing"}, "org/missing"),
    ({"model": TEXTS[0], "data": TEXTS[1]}, "Got no column 'label_text'"),
    ({"model": "no such place", "data": TEXTS[1]}, "which is no directory and no name of a Hub repository"),
])  # fmt: skip
def test_what_cannot_be_loaded_ends_the_app_with_one_message(given, reason, stage, monkeypatch):
    pytest.importorskip("gradio", reason="Needs what [test] installs: gradio")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    app = example_script("space", "app")
    defaults = {name.replace("-", "_"): value for name, (value, _) in app.OPTIONS.items()}
    with pytest.raises(SystemExit) as ended:
        app.load(defaults | given)
    message = str(ended.value)
    assert message.startswith(f"Can't load the classifier {(defaults | given)['model']!r} with samples of ")
    assert reason in message
    assert "Name others by --model and --data" in message


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(source, label_column, folder):
    """The address of the app, started as a user starts it, and what it writes; it leaves no temporary files behind."""
    pytest.importorskip("gradio", reason="Needs what [test] installs: gradio")
    port = free_port()
    own = {
        "TMPDIR": str(folder),
        "DATA": str(source / "data"),
        "LABEL_COLUMN": label_column,
        "HF_HOME": str(source / "home"),
    }
    library = {"PYTHONPATH": str(SPACE.parents[1] / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--model", str(source / "model"), "--port", str(port)]
    log = source / "log.txt"
    with log.open("w") as output:
        app = subprocess.Popen([sys.executable, str(SPACE / "app.py"), *options], cwd=folder, stdout=output,
                               stderr=subprocess.STDOUT, env={**os.environ, **library, **own})  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, app, log)
        yield address, log
    finally:
        app.send_signal(signal.SIGTERM)
        app.wait(timeout=SOON / 1000)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def wait_for(address, app, log):
    end = time.monotonic() + SOON / 1000
    while True:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert app.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@contextmanager
def opened(address, log):
    """A page of headless Chromium with the app, in which nothing went wrong and nothing else was asked for."""
    api = pytest.importorskip("playwright.sync_api", reason="Needs what [test] installs: playwright")
    if CHROMIUM is None:
        pytest.skip("Needs a Chromium: on the path, or named by CHROMIUM.")
    noise = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        page.set_default_timeout(SOON)
        page.on("console", lambda message: noise.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda asked: noise.append(asked.url) if is_elsewhere(asked.url, address) else None)
        page.goto(address)
        try:
            yield page
        finally:
            browser.close()
    assert noise == []
    assert "Traceback" not in log.read_text()


def is_elsewhere(url, address):
    return not url.startswith((address, "data:", "blob:"))


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def verdict(page, text):
    """Waits for what the module says."""
    page.locator(".verdict").get_by_text(text).wait_for()


def choose(page, labels):
    chosen = page.get_by_label("Labels")
    for label in labels:
        chosen.click()
        chosen.fill(label)
        page.get_by_role("option", name=label, exact=True).click()
    page.keyboard.press("Escape")  # closes the list, which covers the button


def costs(page):
    """The table of what the module costs, once it is there."""
    page.get_by_text("Multiply-accumulates").wait_for()
    return [row.split("\t") for row in page.locator(".costs table").inner_text().splitlines() if "\t" in row]


def assert_all_answer(page):
    for title in ("Source:", "Source, these labels only:", "Module:"):
        assert page.get_by_text(title).inner_text().endswith(" ms")


@pytest.fixture
def images_page(digits, tmp_path_factory):
    with served(digits, "label", tmp_path_factory.mktemp("app")) as (address, log), opened(address, log) as page:
        yield page


@pytest.fixture
def texts_page(words, tmp_path_factory):
    with served(words, "intent", tmp_path_factory.mktemp("app")) as (address, log), opened(address, log) as page:
        yield page


@pytest.mark.slow
def test_a_visitor_types_texts_that_a_module_answers_or_rejects(texts_page, tmp_path):
    from playwright.sync_api import expect

    page = texts_page
    choose(page, ["cat", "dog"])
    page.get_by_label("number input for Share to keep").fill("0.5")
    page.keyboard.press("Enter")
    press(page, "Cut")
    accuracy = next(row for row in costs(page) if row[0].startswith("Accuracy"))
    assert float(accuracy[2].rstrip("%")) > 90
    press(page, "Classify")
    page.get_by_text("Got no text; expected one.").wait_for()
    text = page.get_by_label("Text", exact=True)
    text.fill(" ".join(f"w{place}" for place in range(30, 40)))  # words of the second label
    press(page, "Classify")
    verdict(page, "The module answers dog.")
    assert_all_answer(page)
    text.fill(" ".join(f"w{place}" for place in range(50, 60)))  # and of the third
    press(page, "Classify")
    verdict(page, "The module rejects this input: none of cat, dog.")
    for button, answer in (("A sample of these labels", "answers"), ("A sample of other labels", "rejects this input")):
        before = text.input_value()
        press(page, button)
        expect(text).not_to_have_value(before, timeout=SOON)
        press(page, "Classify")
        verdict(page, f"The module {answer}")

    expect(page.get_by_text("Command line", exact=True)).to_have_count(1)
    page.get_by_text("Samples of your own").click()
    page.get_by_label("Texts").fill("w9 w10 w11\n\nw30 w31 w32 w33\n" * 10)
    press(page, "Cut")
    page.get_by_text("on 20 samples").wait_for()
    expect(page.locator(".verdict")).to_have_count(0)  # it was about the module before, like the times
    expect(page.get_by_text(re.compile(r"^(Source|Module).*: .* ms$"))).to_have_count(0)
    expect(page.get_by_text("Command line", exact=True)).to_have_count(0)  # it would cut on the app's samples
    assert "/" not in page.get_by_text("without any, those of").inner_text()
    page.screenshot(path=tmp_path / "app.png", full_page=True)


@pytest.mark.slow
def test_a_visitor_cuts_a_module_and_compares_it(images_page, tmp_path):
    from playwright.sync_api import expect

    page = images_page
    press(page, "Cut")
    page.get_by_text("Got an empty set of labels; expected at least one label or group. Name some.").wait_for()
    choose(page, LABELS)
    press(page, "Cut")
    page.get_by_text(re.compile(r"\d+ steps")).first.wait_for()  # progress
    table = costs(page)
    size = next(row for row in table if row[0] == "Size")
    assert float(size[2].split()[0]) < 0.5 * float(size[1].split()[0])
    accuracy = next(row for row in table if row[0].startswith("Accuracy"))
    assert float(accuracy[2].rstrip("%")) > 85

    press(page, "Classify")
    page.get_by_text("Got no image; expected one.").wait_for()
    press(page, "A sample of these labels")
    page.locator("img[src*='/file=']").first.wait_for()
    press(page, "Classify")
    verdict(page, "The module answers")
    assert_all_answer(page)
    shown = page.locator("img[src*='/file=']").first
    before = shown.get_attribute("src")
    press(page, "A sample of other labels")
    expect(shown).not_to_have_attribute("src", before, timeout=SOON)
    press(page, "Classify")
    verdict(page, "The module rejects this input: none of 3, 8, 9.")
    page.screenshot(path=tmp_path / "app.png", full_page=True)

    with page.expect_download() as download:
        press(page, "Download the module")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    module = AutoModelForImageClassification.from_pretrained(tmp_path / "module")
    assert list(module.config.id2label.values()) == [*LABELS, "none of these"]
