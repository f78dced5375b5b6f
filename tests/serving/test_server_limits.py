"""What a server refuses, how soon, and in which words; and its end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from answering import Answering, adapters, answering

from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.limits import LOOPBACK, Limits
from scalabl.serving.server.worker import Job

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> dict[str, ServedAdapter]:
    return adapters(words=runs["words"])


@pytest.fixture(scope="module")
def running(served: dict[str, ServedAdapter]) -> Iterator[Answering]:
    with answering(served, Limits(body=20_000, rows=8, seconds=5, body_seconds=0.5), most_waiting=8) as found:
        yield found


class Held:
    """The model's thread at a job of ours, until the context ends."""

    def __init__(self, running: Answering) -> None:
        self.worker = running.server.worker
        self.begun, self.over = threading.Event(), threading.Event()

    def _work(self, jobs: Sequence[Job]) -> list[Any]:
        self.begun.set()
        self.over.wait(30)
        return [None] * len(jobs)

    def __enter__(self) -> Held:
        self.worker.submit(Job("held", 1, 1, self._work, None))
        assert self.begun.wait(10)
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()


MALFORMED = {
    "no JSON": b"{",
    "another kind": b"[1, 2]",
    "nothing": b"",
    "no input": b"{}",
    "a number": b'{"input": 3}',
    "numbers": b'{"input": [3]}',
    "an unknown field": b'{"input": "red", "top": 1}',
    "deep": b'{"input": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "deep rows": b'{"input": {"text": ' + b"[" * 9000 + b"]" * 9000 + b"}}",
    "a huge number": b'{"input": {"text": "red", "id": ' + b"9" * 9000 + b"}}",
    "NaN": b'{"input": {"text": NaN}}',
    "no UTF-8": b'{"input": "\xff"}',
    "a zero byte": b'\x00{"input": "red"}',
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_what_is_no_request_is_refused_in_a_sentence(running: Answering, kind: str) -> None:
    assert running.refused("/v1/classify", 400, content=MALFORMED[kind], headers=JSON)
    assert running.classify("red")


def test_a_request_has_a_size(running: Answering) -> None:
    large = json.dumps({"input": "red " * 10_000}).encode()
    assert "20,000 bytes" in running.refused("/v1/classify", 413, content=large, headers=JSON)

    def parts() -> Iterator[bytes]:  # without a length beforehand
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    assert "20,000 bytes" in running.refused("/v1/classify", 413, content=parts(), headers=JSON)
    assert "1 to 8" in running.refused("/v1/classify", 400, json={"input": ["red"] * 9})


def sent(running: Answering, text: bytes) -> tuple[bytes, float]:
    """What comes back for bytes until the server closes the connection, and after how many seconds it does."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as raw:
        raw.sendall(text)
        found = b""
        while part := raw.recv(65536):
            found += part
    return found, time.monotonic() - begun


def test_half_a_request_is_waited_for_no_longer_than_the_limit(running: Answering) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n"
    found, seconds = sent(running, head + b'\r\n{"input": ')
    assert found.startswith(b"HTTP/1.1 408 ") and seconds < 5
    for part in (head, b"", b"POST /v1/cl"):  # headers that do not end have no answer
        found, seconds = sent(running, part)
        assert not found and seconds < 5


def test_a_form_of_a_page_is_no_json(running: Answering) -> None:
    """What a page of another origin may send without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        running.refused("/v1/classify", 415, content=b'{"input": "red"}', headers={"content-type": kind})


def test_a_server_without_a_token_answers_by_names_of_this_machine(running: Answering) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "[::2]", "", "localhost.evil"):
        assert running.client.get("/v1/models", headers={"host": host}).status_code == 403
    for name in LOOPBACK:
        host = f"[{name}]:8000" if ":" in name else f"{name}:8000"
        assert running.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_token_is_asked_of_all_but_the_page_and_health(served: dict[str, ServedAdapter]) -> None:
    with answering(served, Limits(token="of ours", hosts=None)) as running:
        for path in ("/metrics", "/v1/models", "/openapi.json", "/v1/nothing"):
            said = running.client.get(path)
            assert said.status_code == 401 and said.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer of our", "Basic of ours", "Bearer", "of ours", "Bearer \xe9"):
            sent = {"json": {"input": "red"}, "headers": {"authorization": wrong.encode("latin-1")}}
            running.refused("/v1/classify", 401, **sent)
        assert running.client.get("/healthz").json() == {"status": "ok"}
        right = {"authorization": "Bearer of ours", "host": "any.example"}
        assert running.client.post("/v1/classify", json={"input": "red"}, headers=right).status_code == 200


def test_what_waits_is_bounded(running: Answering) -> None:
    with ThreadPoolExecutor(8) as threads:
        with Held(running):
            waiting = [threads.submit(running.classify, "red") for _ in range(8)]
            while running.metric("scalabl_waiting_rows") < 8:
                time.sleep(0.01)
            said = running.client.post("/v1/classify", json={"input": "red"})
            assert said.status_code == 429 and 1 <= int(said.headers["retry-after"]) <= 60
            assert said.json()["error"]["type"] == "rate_limit_error"
            assert running.client.get("/healthz").status_code == 200  # what needs no model is answered meanwhile
        assert all(len(future.result()) == 1 for future in waiting)
    assert running.metric("scalabl_waiting_rows") == 0


def test_an_answer_that_takes_too_long_is_not_waited_for(served: dict[str, ServedAdapter]) -> None:
    with answering(served, Limits(seconds=0.3)) as running:
        with Held(running):
            said = running.client.post("/v1/classify", json={"input": "red"})
            assert said.status_code == 503 and said.headers["retry-after"]
        assert running.classify("red")
        assert running.metric("scalabl_rows_total") == 1  # what nobody waits for any more is not worked on


def test_a_client_that_left_costs_no_pass(running: Answering) -> None:
    before = running.metric("scalabl_rows_total")
    body = json.dumps({"input": "red"}).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with Held(running):
        with socket.create_connection(("127.0.0.1", running.port)) as raw:
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            while not running.metric("scalabl_waiting_rows"):
                time.sleep(0.01)
        time.sleep(0.3)
    assert running.classify("red") and running.metric("scalabl_rows_total") == before + 1


def test_a_fault_of_the_server_says_nothing_of_it(running: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("/tmp/secret.py cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(running.server.adapters["words"].predictor, "answers", fails)
        assert running.refused("/v1/classify", 500, json={"input": "red"}).startswith("The server failed")
    assert running.classify("red")


def test_paths_and_methods_that_are_not_there(running: Answering) -> None:
    assert running.refused("/v1/embeddings", 404, json={})
    assert running.refused("/metrics", 405, json={})
    assert running.client.get("/v1/..%2f..%2fetc/passwd").status_code == 404


def test_a_server_at_its_end_says_so(served: dict[str, ServedAdapter]) -> None:
    with answering(served) as running:
        running.server.worker.close(timeout=10)
        said = running.refused("/v1/classify", 503, json={"input": "red"})
        assert said == "The server is ending and takes nothing more; ask it when it is back."


def test_an_end_answers_what_was_taken(served: dict[str, ServedAdapter]) -> None:
    with ThreadPoolExecutor(4) as threads:
        with answering(served) as running, Held(running) as held:
            url = f"http://127.0.0.1:{running.port}/v1/classify"
            taken = [threads.submit(httpx.post, url, json={"input": "red"}, timeout=30) for _ in range(4)]
            while running.metric("scalabl_waiting_rows") < 4:
                time.sleep(0.01)
            running.runs.should_exit = True
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.post(url, json={"input": "red"})
            held.over.set()
        assert [future.result().status_code for future in taken] == [200] * 4
