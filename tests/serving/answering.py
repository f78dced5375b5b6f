"""A server in this process, on a free port, and how it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from scalabl.inference.settings import PredictionSettings
from scalabl.runs.record import CHOICES, LANGUAGE, RunRecord
from scalabl.runs.stock import read_classifier
from scalabl.serving.server.adapters import ServedAdapter, load_adapters
from scalabl.serving.server.app import Server
from scalabl.serving.server.limits import Limits
from scalabl.serving.server.run import bound, made


def adapters(settings: PredictionSettings | None = None, **directories: Path) -> dict[str, ServedAdapter]:
    """Adapters as `scalabl serve` loads them, those that give labels under the same settings."""
    records = {name: _record(directory) for name, directory in directories.items()}
    of_each = {name: settings or PredictionSettings() for name, record in records.items() if record.kind == CHOICES}
    return load_adapters(directories, records, of_each)


def _record(directory: Path) -> RunRecord:
    text = (directory / "scalabl.json").is_file() and RunRecord.read(directory).kind == LANGUAGE
    return RunRecord.read_generating(directory) if text else read_classifier(directory)


class Answering:
    """A server that runs.

    Attributes:
        server: its inside.
        runs: uvicorn's.
        port: where it listens.
        client: of httpx, for its address.
    """

    def __init__(self, server: Server, runs: uvicorn.Server, port: int) -> None:
        self.server, self.runs, self.port = server, runs, port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def classify(self, given: Any, model: str | None = None) -> list[dict[str, Any]]:
        """The answers to rows that must be answered."""
        said = self.client.post("/v1/classify", json={"input": given} | ({"model": model} if model else {}))
        assert said.status_code == 200, said.text
        data: list[dict[str, Any]] = said.json()["data"]
        return data

    def refused(self, path: str, status: int, **sent: Any) -> str:
        """The sentence of a request that must be refused: it has OpenAI's form, and no path and no trace."""
        said = self.client.post(path, **sent)
        assert said.status_code == status, said.text
        error = said.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in said.text and "/tmp" not in said.text and ".py" not in said.text
        message: str = error["message"]
        return message

    def metric(self, name: str) -> float:
        """The sum of a figure over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name)


@contextmanager
def answering(served: Mapping[str, ServedAdapter], limits: Limits | None = None, **options: Any) -> Iterator[Answering]:
    """A server that answers until the context ends."""
    server = Server(served, limits or Limits(), **options)
    with bound("127.0.0.1", 0) as at:
        runs = made(server)
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            while not runs.started:
                time.sleep(0.01)
            running = Answering(server, runs, at.getsockname()[1])
            with running.client:
                yield running
        finally:
            runs.should_exit = True
            thread.join()
