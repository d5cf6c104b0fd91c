# /// script
# dependencies = ["nemo-hf[onnx]"]
# ///
"""Answers over HTTP with a text module that rejects what it is not for.

    python examples/case_studies/serve.py me/banking --port 8000
    curl -d '{"texts": ["what is on my account", "who was Ada Lovelace"]}' http://127.0.0.1:8000/classify
    curl http://127.0.0.1:8000/health

The model is a folder or a repository of the Hub: a module of nemo_hf with calibrated rejection, or its ONNX export,
which needs onnxruntime, tokenizers and numpy alone, and neither torch nor this library. Each text gets the label to act
on, whether it was rejected, the closest of the model's own labels with its probability, and the rejection score.
Refused requests get a status of 4xx and {"error": ...}. One request is computed at a time, on `--threads`.
"""

import argparse
import json
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MOST_TEXTS, MOST_BYTES = 64, 2**20  # of a request
LAST_READS = 100  # of what is sent after a refusal
REJECTED = "none of these"  # the last label of a calibrated module
Outputs = tuple[np.ndarray, np.ndarray]  # logits (texts, labels), that of `REJECTED` last, and rejection scores


class TorchModel:
    """A module of nemo_hf in torch."""

    runtime = "torch"

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        import nemo_hf  # noqa: F401 - its classes register themselves

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        """Runs a batch."""
        with self.torch.inference_mode():
            found = self.model(**{name: self.torch.from_numpy(value) for name, value in inputs.items()})
        return found.logits.numpy(), found.rejection_scores.numpy()


class OnnxModel:
    """An ONNX export of a module in onnxruntime."""

    runtime = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        """Runs a batch."""
        given = {name: inputs[name] for name in self.names}
        logits, scores = self.session.run(["logits", "rejection_scores"], given)
        return logits, scores


class Classifier:
    """A model with its tokenizer and labels, from a folder or a repository of the Hub."""

    def __init__(self, name: str, threads: int = 1) -> None:
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.labels = [label for _, label in sorted(config["id2label"].items(), key=lambda item: int(item[0]))]
        self.labels += [config["rejected_label"]] if config.get("rejected_label") else []  # named apart, except in ONNX
        if not config.get("rejection") or self.labels[-1] != REJECTED:
            raise SystemExit(
                f"Got {name}, whose last label is {self.labels[-1]!r}; expected a module with calibrated rejection and "
                f"the last label {REJECTED!r}. Run nemo_hf.calibrate_rejection(module, validation_batches), save it."
            )
        config = config.get("base_config", config)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        longest = config["max_position_embeddings"]  # RoBERTa has fewer positions
        self.tokenizer.enable_truncation(int(min(longest, options.get("model_max_length") or longest)))
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0)
        self.model = (OnnxModel if (folder / "model.onnx").exists() else TorchModel)(folder, threads)
        self.lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """An answer for each text."""
        encoded = self.tokenizer.encode_batch(list(texts))
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        inputs = {name: np.array([getattr(each, field) for each in encoded]) for name, field in fields.items()}
        with self.lock:
            logits, scores = self.model(inputs)
        own = np.exp(logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True))
        chances = own / own.sum(-1, keepdims=True)
        return [
            {
                "label": self.labels[place],
                "rejected": self.labels[place] == REJECTED,
                "closest": self.labels[chance.argmax()],
                "score": float(chance.max()),
                "rejection_score": float(score),
            }
            for place, chance, score in zip(logits.argmax(-1), chances, scores, strict=True)
        ]


class RefusedError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Endpoint(ThreadingHTTPServer):
    """Serves a classifier; the address is in `url`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str, classify: Classifier, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.classify = classify
        self.health = {"status": "ok", "model": name, "runtime": classify.model.runtime, "labels": classify.labels}
        self.url = f"http://{host}:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One connection, which may send many requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave together
    timeout = 60  # seconds without a request
    server: Endpoint

    def do_GET(self) -> None:
        """Answers /health."""
        self.answer("GET", "/health", lambda: self.server.health)

    def do_POST(self) -> None:
        """Answers /classify."""
        self.answer("POST", "/classify", lambda: {"answers": self.server.classify(self.texts())})

    def answer(self, method: str, path: str, make: Any) -> None:
        """Sends what is asked for, or why not."""
        try:
            if self.path != path:
                other = {"/health": "GET", "/classify": "POST"}.get(self.path)
                hint = f"{other} {self.path}" if other else "GET /health and POST /classify"
                raise RefusedError(405 if other else 404, f"Got {method} {self.path}; expected {hint}.")
            status, reply = 200, make()
        except RefusedError as refused:
            status, reply = refused.status, {"error": str(refused)}
        except (ConnectionError, TimeoutError):  # the client is gone, or silent for too long
            self.close_connection = True
            return
        except Exception:
            logger.exception("A request failed.")
            status, reply = 500, {"error": "Got a failure of the model; expected an answer. The server's log says why."}
        self.send_json(status, reply)

    def send_json(self, status: int, reply: Mapping[str, Any]) -> None:
        """Sends an answer; a refusal ends the connection, since the rest of the request may not have been read."""
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def finish(self) -> None:
        """Ends a connection, and reads what is still sent: with bytes unread, it would take the answer with it."""
        super().finish()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(LAST_READS):
                if not self.connection.recv(MOST_BYTES):
                    break

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON too."""
        self.send_json(code, {"error": message or explain or self.responses.get(code, ("refused",))[0]})

    def texts(self) -> list[str]:
        """The texts of a request, checked."""
        length = self.headers.get("Content-Length")
        if length is None or not (length.isascii() and length.isdigit() and len(length) < 20):
            raise RefusedError(411, f"Got Content-Length {length and length[:20]!r}; expected the body's bytes.")
        if int(length) > MOST_BYTES:
            raise RefusedError(413, f"Got {int(length)} bytes; expected at most {MOST_BYTES}. Send fewer texts.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"Got a body that is no JSON ({error}); expected {{'texts': [...]}}.") from None
        texts = asked.get("texts") if isinstance(asked, dict) else None
        if not isinstance(texts, list) or not texts:
            raise RefusedError(400, 'Got no list of texts; expected {"texts": ["...", ...]} with at least one.')
        if len(texts) > MOST_TEXTS:
            raise RefusedError(413, f"Got {len(texts)} texts; expected at most {MOST_TEXTS}. Send several requests.")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip() or has_surrogates(text):
                raise RefusedError(400, f"Got {str(text)[:50]!r} at place {place}; expected a text that is not empty.")
        return texts

    def log_message(self, *args: Any) -> None:
        """Logs nothing: texts and addresses are the users'."""


def has_surrogates(text: str) -> bool:
    """Whether a text has halves of characters, which JSON can write and no tokenizer reads."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What to serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Folder or repository of the Hub.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free.")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(words)


def main() -> None:
    """Serves until it is stopped."""
    given = arguments()
    endpoint = Endpoint(given.model, Classifier(given.model, given.threads), given.host, given.port)
    print(f"Listening on {endpoint.url}", flush=True)
    try:
        endpoint.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        endpoint.server_close()


if __name__ == "__main__":
    main()
