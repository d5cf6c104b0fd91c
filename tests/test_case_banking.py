"""The case study of a banking assistant: its endpoint, what it refuses, and the whole study on tiny data."""

import http.client
import json
import re
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from conftest import LABELS, TEXT, example_script, fresh, tiny, tokenizer
from sklearn.metrics import roc_auc_score

import nemo_hf

serve, clients, banking = (example_script("case_studies", name) for name in ("serve", "clients", "banking"))
OWN = ["ship", "cat"]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "unknown words", "w1 " * 100, "w3 w3"]


def text(index):
    return f"w{5 + index % 5} w{index % 7} w{20 + index % 11}"


@pytest.fixture(scope="module")
def module():
    """A module of two labels that rejects half of what it sees."""
    module = nemo_hf.extract_module(
        fresh("bert"), OWN, [text(index) for index in range(30)], retention=0.5, processing_class=tokenizer(),
        max_positions=20, show_progress=False,
    )  # fmt: skip
    inputs = tokenizer()([text(index) for index in range(40)], padding=True, return_tensors="pt")
    batch = {**inputs, "labels": torch.arange(40) % 5}
    nemo_hf.calibrate_rejection(module, [batch], accepted=0.5, show_progress=False)
    return module.eval()


@pytest.fixture(scope="module")
def saved(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    module.save_pretrained(folder)
    return folder


@contextmanager
def serving(folder, name="me/module"):
    with serve.Endpoint(name, serve.Classifier(str(folder))) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def endpoint(saved):
    with serving(saved) as endpoint:
        yield endpoint


def ask(endpoint, body, method="POST", path="/classify", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server_port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def classified(endpoint, texts):
    status, reply = ask(endpoint, json.dumps({"texts": texts}))
    assert status == 200, reply
    return reply["answers"]


def check_as_module(answers, module, texts):
    """Answers are those of the module itself to each text alone."""
    assert len(answers) == len(texts)
    for answer, each in zip(answers, texts, strict=True):
        with torch.no_grad():
            inputs = tokenizer()(each, truncation=True, max_length=20, return_tensors="pt")
            output = module(**inputs)
        (score,), (logits,) = output.rejection_scores, output.logits
        is_rejected = bool(score > module.config.rejection["threshold"])
        best = module.config.names[logits[:2].argmax().item()]
        assert (answer["rejected"], answer["closest"]) == (is_rejected, best)
        assert answer["label"] == ("none of these" if is_rejected else best)
        assert answer["label"] == module.config.id2label[logits.argmax().item()]
        assert answer["score"] == pytest.approx(logits[:2].softmax(-1).max().item(), abs=1e-5)
        assert answer["rejection_score"] == pytest.approx(score.item(), abs=1e-4)


def test_the_endpoint_answers_as_the_module_does(endpoint, module):
    answers = classified(endpoint, TEXTS + [text(index) for index in range(20)])
    check_as_module(answers, module, TEXTS + [text(index) for index in range(20)])
    assert {answer["rejected"] for answer in answers} == {True, False}


def test_health_says_what_is_served(endpoint):
    status, reply = ask(endpoint, None, "GET", "/health")
    labels = [*OWN, "none of these"]
    assert (status, reply) == (200, {"status": "ok", "model": "me/module", "runtime": "torch", "labels": labels})


REFUSED = {
    "no JSON": (b"texts", 400, "no JSON"),
    "not UTF-8": (b'{"texts": ["\xff"]}', 400, "no JSON"),
    "deep": (b"[" * 100_000, 400, "no JSON"),
    "a list": (b'["w1"]', 400, "no list of texts"),
    "no texts": (b'{"text": "w1"}', 400, "no list of texts"),
    "a text alone": (b'{"texts": "w1"}', 400, "no list of texts"),
    "empty list": (b'{"texts": []}', 400, "no list of texts"),
    "a number": (b'{"texts": ["w1", 1]}', 400, "1.* at place 1"),
    "empty text": (b'{"texts": [" "]}', 400, "at place 0"),
    "half a character": (b'{"texts": ["\\ud800"]}', 400, "at place 0"),
    "too many": (json.dumps({"texts": ["w1"] * 65}).encode(), 413, "65 texts; expected at most 64"),
    "too long": (b" " * (2**23), 413, "bytes; expected at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_and_the_next_one_is_answered(endpoint, name):
    body, status, message = REFUSED[name]
    found, reply = ask(endpoint, body)
    assert found == status
    assert set(reply) == {"error"}
    assert re.search(message, reply["error"])
    assert len(classified(endpoint, ["w1"])) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/classify", 405), ("POST", "/health", 405), ("POST", "/x", 404), ("PUT", "/x", 501)],
)
def test_other_addresses_and_methods_are_refused(endpoint, method, path, status):
    found, reply = ask(endpoint, b"{}", method, path)
    assert (found, set(reply)) == (status, {"error"})
    assert len(classified(endpoint, ["w1"])) == 1


@pytest.mark.parametrize("length", ["", "-1", "1e3", "²", "9" * 5000])
def test_a_body_needs_its_length(endpoint, length):
    head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", endpoint.server_port), timeout=20) as client:
        client.sendall(head.encode("latin-1", "replace"))
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 411")
    assert len(classified(endpoint, ["w1"])) == 1


def test_clients_that_leave_and_failures_of_the_model_end_nothing_else(endpoint, monkeypatch):
    with socket.create_connection(("127.0.0.1", endpoint.server_port)) as client:
        client.sendall(b'POST /classify HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"te')
    with monkeypatch.context() as patch:
        patch.setattr(endpoint.classify, "model", None)
        status, reply = ask(endpoint, json.dumps({"texts": ["w1"]}))
        assert (status, "log says why" in reply["error"]) == (500, True)
    assert len(classified(endpoint, ["w1"])) == 1


def test_many_clients_at_once_each_get_their_own_answers(endpoint):
    expected = [classified(endpoint, [each])[0] for each in TEXTS]
    found = {}

    def run(client):
        found[client] = [classified(endpoint, [each])[0] for each in TEXTS]

    threads = [threading.Thread(target=run, args=(client,)) for client in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 6


@pytest.mark.parametrize("longest", [20, 10**30, None])
def test_texts_are_cut_to_what_the_tokenizer_says_and_the_model_has(longest, module, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    options = json.loads((saved / "tokenizer_config.json").read_text())
    options = {**options, "model_max_length": longest} if longest else {"pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    check_as_module(serve.Classifier(str(tmp_path))(TEXTS), module, TEXTS)


def test_a_model_with_fewer_positions_than_its_configuration_says_takes_long_texts(tmp_path):
    words = tokenizer()
    model = tiny("RobertaForSequenceClassification", **{**TEXT, "max_position_embeddings": 25})
    words.model_max_length = 24
    texts = [text(index) for index in range(40)]
    batch = {**words(texts, padding=True, return_tensors="pt"), "labels": torch.arange(40) % 5}
    module = nemo_hf.extract_module(model, OWN, [batch], 0.5, processing_class=words, show_progress=False)
    module.save_pretrained(tmp_path)
    (answer,) = serve.Classifier(str(tmp_path))(["w1 " * 100])
    with torch.no_grad():
        output = module(**words("w1 " * 100, truncation=True, return_tensors="pt"))
    assert answer["rejection_score"] == pytest.approx(output.rejection_scores.item(), abs=1e-4)


def test_a_module_without_calibration_is_not_served(tmp_path, monkeypatch):
    module = nemo_hf.make_parent(fresh("bert")).extract_module(OWN)
    module.attach_processor(tokenizer())
    module.save_pretrained(tmp_path / "module")
    with pytest.raises(SystemExit, match="last label is 'cat'; expected a module with calibrated rejection"):
        serve.Classifier(str(tmp_path / "module"))


def test_a_load_counts_answers_and_ends_with_the_first_refusal(endpoint):
    address = f"127.0.0.1:{endpoint.server_port}"
    found = clients.load(address, TEXTS, 3, 0.3)
    assert set(found) == {"per_second", "p50_ms", "p95_ms"}
    assert 0 < found["p50_ms"] <= found["p95_ms"]
    with pytest.raises(RuntimeError, match=r"^400: Got ' ' at place 0"):
        clients.load(address, [" "], 2, 0.3)


def test_shares_are_those_of_a_naive_count():
    right, rejected = (
        [True, True, False, False],
        {"own": [False, True, False, True], "other": [True], "strange": [False]},
    )
    scores = {"own": [0.1, 0.2, 0.3, 0.9], "other": [0.5], "strange": [0.15]}
    found = banking.shares(right, rejected, scores)
    assert (found["closest"], found["right"]) == (0.5, 0.25)
    assert [found[f"rejected_{kind}"] for kind in rejected] == [0.5, 1, 0]
    assert found["auroc_other"] == roc_auc_score([0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.9, 0.5])
    assert found["auroc_strange"] == 0.25


def test_outputs_for_other_labels_change_none_of_the_first():
    model = fresh("bert")
    inputs = tokenizer()(TEXTS[:4], padding=True, return_tensors="pt")
    expected = model(**inputs).logits
    names = [*"abc", *LABELS, "d"]
    wide = banking.with_all_labels(model, [4, 6, 8, 0, 2], names)
    assert list(wide.config.id2label.values()) == names
    torch.testing.assert_close(wide(**inputs).logits[:, [4, 6, 8, 0, 2]], expected)
    assert not wide(**inputs).logits[:, [1, 3, 5, 7]].any()


def write_data(folder):
    """Queries of five intents in two domains, as the files of CLINC150."""
    owner = [0, 0, 1, 1, 0]
    classes = {
        "intent": datasets.ClassLabel(names=LABELS),
        "domain": datasets.ClassLabel(names=["animals", "vehicles"]),
    }
    features = datasets.Features(text=datasets.Value("string"), **classes)
    for split, count in (("train", 120), ("validation", 60), ("test", 40)):
        labels = [index % 5 for index in range(count)]
        rows = {"text": [text(index) for index in range(count)], "intent": labels}
        rows["domain"] = [owner[label] for label in labels]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"text": ["w90 w91", "w93"] * 5}).to_parquet(folder / "oos-test.parquet")


@pytest.mark.slow
def test_the_whole_study_on_tiny_data(tmp_path, monkeypatch):
    data, encoder = tmp_path / "data", tmp_path / "encoder"
    data.mkdir()
    write_data(data)
    fresh("bert").save_pretrained(encoder)
    tokenizer().save_pretrained(encoder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(banking, "RATES", (1e-3,))
    monkeypatch.setattr(banking, "SMALL", {"vocabulary": "shared", "max_positions": 20})
    words = ["--data", data, "--work", tmp_path / "work", "--model", encoder, "--output", tmp_path / "found.json"]
    words = [*map(str, words), "--domains", "vehicles", "--layers", "1"]
    monkeypatch.setattr(banking, "FORMATS", {"onnx": None})
    banking.main(["make", *words])
    banking.main(["export", "module", *words])
    banking.main(["answers", "module", "module-onnx", *words])
    banking.main(["load", "module-onnx", *words, "--rounds", "1", "--seconds", "0.2"])
    found = banking.compact.load(tmp_path / "found.json")
    models, answers = ({row["model"]: row for row in found[table]} for table in ("models", "answers"))
    assert set(models) == {"source", "module", "truncated", "truncated-all", "module-onnx"}
    assert models["module"]["parameters"] < models["source"]["parameters"]
    module = nemo_hf.NeMoForSequenceClassification.from_pretrained(tmp_path / "work" / "module")
    queries = [text(index) for index in range(40) if index % 5 in (2, 3)]
    logits = torch.cat([module(**tokenizer()(each, return_tensors="pt")).logits for each in queries])
    for name in ("module", "module-onnx"):
        assert answers[name]["rejected_own"] == pytest.approx((logits.argmax(-1) == 2).float().mean().item())
        assert answers[name]["pulled_bytes"] >= models[name]["bytes"]
    with serving(tmp_path / "work" / "module-onnx") as endpoint:
        check_as_module(classified(endpoint, TEXTS), module, TEXTS)
        assert ask(endpoint, None, "GET", "/health")[1]["runtime"] == "onnxruntime"
    (row,) = found["load"]
    assert 0 < row["resident_mib"] <= row["peak_mib"]


def test_the_commands_of_the_pages_are_those_of_the_scripts():
    """test_docs.py leaves them out."""
    pages = [Path(__file__).parents[1] / "docs" / f"case_{name}.md" for name in ("banking", "repair")]
    commands = [line.split() for page in pages for line in page.read_text().splitlines() if line.startswith("python ")]
    assert len(commands) == 7
    for _, script, *words in commands:
        assert example_script("case_studies", Path(script).stem).arguments(words)
        assert (pages[0].parents[1] / script).exists()
