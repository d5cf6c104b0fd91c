"""Starts the endpoint of `serve.py` in a process of its own and sends it requests: answers, memory, load."""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVE = Path(__file__).with_name("serve.py")
HEADERS = {"Content-Type": "application/json"}


class Server:
    """A running endpoint: `with Server("me/banking", environment) as server`."""

    def __init__(self, model: str, environment: Mapping[str, str], threads: int = 1) -> None:
        command = [sys.executable, str(SERVE), model, "--port", "0", "--threads", str(threads)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        pipes = {"stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.start = time.perf_counter()
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)  # noqa: S603
        line = self.process.stdout.readline()
        if not line.startswith("Listening on "):
            self.__exit__()
            raise SystemExit(f"Got no endpoint of {model}; expected one. It says: {self.said[-2000:]}")
        self.address = urlsplit(line.split()[-1]).netloc

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.communicate()
        self.errors.seek(0)
        self.said = self.errors.read()
        self.errors.close()

    def first_answer(self, text: str) -> float:
        """Seconds from the start of the process to the first answer."""
        self.classify([text])
        return time.perf_counter() - self.start

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Answers to any number of texts, 50 a request."""
        connection, found = http.client.HTTPConnection(self.address), []
        for start in range(0, len(texts), 50):
            found += send(connection, texts[start : start + 50])["answers"]
        connection.close()
        return found

    def memory(self) -> dict[str, float]:
        """Resident memory of the process, now and at its peak, in MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return {"resident_mib": int(values["VmRSS"]) / 1024, "peak_mib": int(values["VmHWM"]) / 1024}


def send(connection: http.client.HTTPConnection, texts: Sequence[str] | None) -> dict[str, Any]:
    """The answer to some texts, or without them to the question of health; a refusal is a `RuntimeError`."""
    if texts is None:
        connection.request("GET", "/health")
    else:
        connection.request("POST", "/classify", json.dumps({"texts": list(texts)}).encode(), HEADERS)
    response = connection.getresponse()
    reply = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {reply['error']}")
    return reply


def load(address: str, texts: Sequence[str], clients: int, seconds: float, is_health: bool = False) -> dict[str, float]:
    """Requests of one text a second, and milliseconds of each, of clients that wait for their answers, in turn."""
    found: list[list[float]] = [[] for _ in range(clients)]
    failures: list[Exception] = []
    end = time.perf_counter() + seconds

    def run(client: int) -> None:
        connection, place = http.client.HTTPConnection(address), client
        try:
            while (start := time.perf_counter()) < end:
                send(connection, None if is_health else [texts[place % len(texts)]])
                found[client].append(time.perf_counter() - start)
                place += clients
        except Exception as error:  # of any kind: it ends the measurement
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    times = sorted(1000 * each for own in found for each in own)
    cuts = statistics.quantiles(times, n=20, method="inclusive")
    return {"per_second": len(times) / (time.perf_counter() - start), "p50_ms": cuts[9], "p95_ms": cuts[18]}
