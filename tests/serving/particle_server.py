"""A small server of the OpenAI completions protocol, with vLLM's fields, over real HTTP on the loopback address.

It serves a real model with exported particles as PEFT adapters: whatever waits at a moment is one mixed batch
(`adapter_names`), as it is in vLLM. Of classifiers with a head it gives the logits, at vLLM's /classify. `faults` makes
it behave badly.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_base import loaded
from torch import Tensor
from transformers import PreTrainedModel

_MAX_BATCH = 64


@dataclass
class Faults:
    """How the server behaves.

    Attributes:
        names_tokens: whether it knows `logprob_token_ids`; older ones pass over it.
        max_logprobs: the most of `logprobs` that it gives.
        drop: so many requests lose their connection.
        busy: so many requests are answered with status 503.
        delay: seconds before an answer.
        answer: what it answers instead of a completion.
        key: the bearer token that it wants.
    """

    names_tokens: bool = True
    max_logprobs: int = 20
    drop: int = 0
    busy: int = 0
    delay: float = 0.0
    answer: Any = None
    key: str | None = None


@dataclass
class ParticleServer:
    """What a running server is made of, and what it has seen.

    Attributes:
        url: its address.
        faults: its behaviour, to be changed.
        bodies: the completion requests that it has got.
        batches: the adapters of every mixed batch.
        under_way: the most requests that were there at a time.
    """

    model: PeftModel
    url: str = ""
    faults: Faults = field(default_factory=Faults)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    under_way: int = 0
    present: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    jobs: queue.Queue[tuple[str, list[int], queue.Queue[Tensor]] | None] = field(default_factory=queue.Queue)

    def work(self) -> None:
        """Answer whatever waits as one batch, until there is a None."""
        while (job := self.jobs.get()) is not None:
            batch = [job]
            time.sleep(0.01)  # for those that come at the same time
            while len(batch) < _MAX_BATCH and not self.jobs.empty():
                if (job := self.jobs.get()) is None:
                    return
                batch.append(job)
            self.batches.append([adapter for adapter, _, _ in batch])
            for (_, _, reply), log_probs in zip(batch, self.forward(batch), strict=True):
                reply.put(log_probs)

    @torch.no_grad()
    def forward(self, batch: Sequence[tuple[str, list[int], Any]]) -> list[Tensor]:
        """Log-probabilities (T, V) behind every token of every prompt, or logits (C,), each under its own adapter."""
        length = max(len(ids) for _, ids, _ in batch)
        ids = torch.tensor([[0] * (length - len(row)) + row for _, row, _ in batch])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for _, row, _ in batch])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        names = [adapter for adapter, _, _ in batch]
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, adapter_names=names).logits
        if logits.dim() == 2:
            return list(logits)
        return [row[length - len(own) :].log_softmax(-1) for row, (_, own, _) in zip(logits, batch, strict=True)]

    def completion(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content for the body of POST /v1/completions."""
        adapter, prompts = body["model"], body["prompt"]
        if adapter not in self.model.peft_config:
            return 404, _error(f"The model `{adapter}` does not exist.", 404)
        if (body.get("logprobs") or 0) > self.faults.max_logprobs >= 0:
            return 400, _error(f"Requested sample logprobs of {body['logprobs']}, which is greater than allowed.", 400)
        prompts = [prompts] if isinstance(prompts[0], int) else prompts
        replies: list[queue.Queue[Tensor]] = [queue.Queue() for _ in prompts]
        for ids, reply in zip(prompts, replies, strict=True):
            self.jobs.put((adapter, ids, reply))
        choices = []
        for index, (ids, reply) in enumerate(zip(prompts, replies, strict=True)):
            log_probs = reply.get(timeout=30)
            choices.append({"index": index, "text": "?", **self._asked(body, ids, log_probs)})
        return 200, {"object": "text_completion", "model": adapter, "choices": choices[::-1]}  # `index` tells the order

    def classify(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content for the body of POST /classify."""
        assert body["use_activation"] is False
        [ids] = body["input"]
        reply: queue.Queue[Tensor] = queue.Queue()
        self.jobs.put((body["model"], ids, reply))
        logits = reply.get(timeout=30).tolist()
        return 200, {"data": [{"index": 0, "label": None, "probs": logits, "num_classes": len(logits)}]}

    def _asked(self, body: dict[str, Any], ids: list[int], log_probs: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"logprobs": None, "prompt_logprobs": None}
        if body.get("logprobs") is not None:
            last, number = log_probs[-1], body["logprobs"]
            chosen = last.topk(len(last) if number == -1 else number).indices.tolist()
            if self.faults.names_tokens and body.get("logprob_token_ids"):
                chosen = [int(last.argmax()), *body["logprob_token_ids"]]
            assert body["return_tokens_as_token_ids"]
            found["logprobs"] = {"top_logprobs": [{f"token_id:{token}": last[token].item() for token in chosen}]}
        if body.get("prompt_logprobs") is not None:
            rest = [{str(token): {"logprob": log_probs[at, token].item()}} for at, token in enumerate(ids[1:])]
            found["prompt_logprobs"] = [None, *rest]
        return found


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code}}


def _handler(server: ParticleServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(200, {"data": [{"id": name} for name in ["base", *server.model.peft_config]]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.present += 1
                server.under_way = max(server.under_way, server.present)
                server.bodies.append(body)
                drop, busy = server.faults.drop > 0, server.faults.busy > 0
                server.faults.drop -= drop
                server.faults.busy -= busy and not drop
            try:
                if drop:
                    self.close_connection = True
                    return
                time.sleep(server.faults.delay)
                if busy:
                    self._say(503, _error("overloaded", 503))
                elif server.faults.answer is not None:
                    self._say(200, server.faults.answer)
                else:
                    self._say(*(server.classify if self.path == "/classify" else server.completion)(body))
            finally:
                with server.lock:
                    server.present -= 1

        def _say(self, status: int, content: Any) -> None:
            if server.faults.key and self.headers.get("Authorization") != f"Bearer {server.faults.key}":
                status, content = 401, _error("Unauthorized", 401)
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that left is no error of the server's."""


@contextmanager
def serving(
    particles: Path, names: Sequence[str], architecture: str = "llama", base: PreTrainedModel | None = None
) -> Iterator[ParticleServer]:
    """A server of the exported particles in a directory, under these names; on a tiny model, or on a given one."""
    model = PeftModel.from_pretrained(base or loaded(architecture)[0], str(particles / "0"), adapter_name=names[0])
    for k, name in enumerate(names[1:], start=1):
        model.load_adapter(str(particles / str(k)), adapter_name=name)
    server = ParticleServer(model.eval())
    listener = _Server(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    threads = [threading.Thread(target=listener.serve_forever, daemon=True), threading.Thread(target=server.work)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        server.jobs.put(None)
        for thread in threads:
            thread.join(timeout=10)
