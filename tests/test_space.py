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
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import example_script, logits_of, tiny
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


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(digits, tmp_path_factory):
    """The address of the app, started as a user starts it, and what it writes; it leaves no temporary files behind."""
    pytest.importorskip("gradio", reason="Needs what [test] installs: gradio")
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    own = {
        "TMPDIR": str(folder),
        "DATA": str(digits / "data"),
        "LABEL_COLUMN": "label",
        "HF_HOME": str(digits / "home"),
    }
    source = {"PYTHONPATH": str(SPACE.parents[1] / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ["--model", str(digits / "model"), "--port", str(port)]
    log = digits / "log.txt"
    with log.open("w") as output:
        app = subprocess.Popen([sys.executable, str(SPACE / "app.py"), *words], cwd=folder, stdout=output,
                               stderr=subprocess.STDOUT, env={**os.environ, **source, **own})  # fmt: skip
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


@pytest.fixture
def page(served):
    """A page of headless Chromium with the app, in which nothing went wrong and nothing else was asked for."""
    api = pytest.importorskip("playwright.sync_api", reason="Needs what [test] installs: playwright")
    if CHROMIUM is None:
        pytest.skip("Needs a Chromium: on the path, or named by CHROMIUM.")
    address, log = served
    noise = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        page.set_default_timeout(SOON)
        page.on("console", lambda message: noise.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda asked: noise.append(asked.url) if is_elsewhere(asked.url, address) else None)
        page.goto(address)
        yield page
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


@pytest.mark.slow
def test_a_visitor_cuts_a_module_and_compares_it(page, tmp_path):
    from playwright.sync_api import expect

    press(page, "Cut")
    page.get_by_text("Got an empty set of labels; expected at least one label or group. Name some.").wait_for()
    chosen = page.get_by_label("Labels")
    for label in LABELS:
        chosen.click()
        chosen.fill(label)
        page.get_by_role("option", name=label, exact=True).click()
    page.keyboard.press("Escape")  # closes the list, which covers the button
    press(page, "Cut")
    page.get_by_text(re.compile(r"\d+ steps")).first.wait_for()  # progress
    page.get_by_text("Multiply-accumulates").wait_for()
    table = [row.split("\t") for row in page.locator(".costs table").inner_text().splitlines() if "\t" in row]
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
    for title in ("Source:", "Source, these labels only:", "Module:"):
        assert page.get_by_text(title).inner_text().endswith(" ms")
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
