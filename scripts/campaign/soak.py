"""A server under clients that leave, send halves, floods and nonsense, while good ones ask.

Every good answer is that of a process without a server; a bad request is answered with a refusal or not at all; the
server's memory stays where it was; at the end it stops when it is told to, and has printed nothing. Results:
docs/results/campaign/soak.json and .md.

    python scripts/campaign/soak.py --minutes 10
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parts import ROOT, offline, tiny_run, write

from harness import options, table  # isort: skip

ROUNDING = 1e-5  # of probabilities and nats, as docs/serving.md has it
GROWTH = 48.0  # MiB that memory may grow by behind the first quarter: allocators keep what they had at their busiest
TOKENS = 12
BODY = 50_000  # bytes that the server takes
PROMPTS = ["red", "which word is blue?", "a long answer", "yes no yes no"]


class Server:
    """`scalabl serve` in a process of its own.

    Args:
        run: a run's directory.
    """

    def __init__(self, run: Path) -> None:
        arguments = ("serve", f"run={run}", "--port", 0, "--predictive", "mc", "--samples", 4, "--max-body", BODY)
        self.made = subprocess.Popen(
            [sys.executable, "-P", "-m", "scalabl", *map(str, arguments)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        assert self.made.stdout is not None
        line = next((line for line in self.made.stdout if line.startswith("listening")), "")
        self.port = int(line.rpartition(":")[2])

    def memory(self) -> float:
        """Resident memory of the process, MiB."""
        import psutil

        return float(psutil.Process(self.made.pid).memory_info().rss) / 2**20

    def end(self) -> list[str]:
        """What was wrong with its end."""
        alive = self.made.poll() is None
        self.made.send_signal(signal.SIGTERM)
        try:
            code = self.made.wait(60)
        except subprocess.TimeoutExpired:
            self.made.kill()
            return ["the server did not end"]
        assert self.made.stderr is not None
        said = self.made.stderr.read().strip()
        faults = [] if alive and code == 0 else [f"the server ended with {code}{'' if alive else ' by itself'}"]
        return faults + ([f"the server printed: {said.splitlines()[-1][:200]}"] if said else [])


class Soak:
    """Clients of one server until the time is over.

    Args:
        server: whom they ask.
        rows: good rows.
        answers: what each of them is answered.
        texts: what each prompt is continued by.
        seed: of what is sent.
    """

    def __init__(
        self, server: Server, rows: list[dict[str, Any]], answers: list[dict[str, Any]], texts: list[str], seed: int
    ) -> None:
        self.server, self.rows, self.answers, self.texts, self.seed = server, rows, answers, texts, seed
        self.over = threading.Event()
        self.calls: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def note(self, name: str, fault: str | None, status: str = "") -> None:
        """Count a call, and keep what was wrong with it."""
        with self._lock:
            self.calls[name] += 1
            if status:
                self.statuses[status] += 1
            if fault:
                self.faults.append(f"{name}: {fault}")

    def good(self, number: int) -> None:
        """Ask rightly until the time is over."""
        import httpx

        generator = random.Random(f"{self.seed} good {number}")
        asked = (self.classify, self.classify, self.complete, self.stream)
        with httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=120) as client:
            while not self.over.is_set():
                ask = generator.choice(asked)
                try:
                    self.note(ask.__name__, ask(client, generator))
                except Exception as error:
                    self.note(ask.__name__, f"{type(error).__name__}: {error}")

    def classify(self, client: Any, generator: random.Random) -> str | None:
        """Some rows at once."""
        chosen = [generator.randrange(len(self.rows)) for _ in range(generator.choice((1, 1, 1, 5)))]
        said = client.post("/v1/classify", json={"input": [self.rows[i] for i in chosen]})
        if said.status_code != 200:
            return f"status {said.status_code}: {said.text[:100]}"
        found = said.json()["data"]
        same = [_same(answer, self.answers[i]) for answer, i in zip(found, chosen, strict=True)]
        return None if all(same) else f"another answer: {found}"

    def complete(self, client: Any, generator: random.Random) -> str | None:
        """A text at once."""
        i = generator.randrange(len(PROMPTS))
        said = client.post("/v1/completions", json={"model": "run", "prompt": PROMPTS[i], "max_tokens": TOKENS})
        if said.status_code != 200:
            return f"status {said.status_code}: {said.text[:100]}"
        text = said.json()["choices"][0]["text"]
        return None if text == self.texts[i] else f"another text: {text!r}"

    def stream(self, client: Any, generator: random.Random) -> str | None:
        """A text in pieces."""
        i = generator.randrange(len(PROMPTS))
        asked = {"model": "run", "prompt": PROMPTS[i], "max_tokens": TOKENS, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as said:
            events = [line.removeprefix("data: ") for line in said.iter_lines() if line]
        if said.status_code != 200 or events[-1] != "[DONE]":
            return f"status {said.status_code}, behind {events[-1][:100]}"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        return None if text == self.texts[i] else f"another text: {text!r}"

    def bad(self, number: int) -> None:
        """Ask wrongly until the time is over."""
        generator = random.Random(f"{self.seed} bad {number}")
        while not self.over.is_set():
            name = generator.choice(list(BAD))
            try:
                status = self.sent(*BAD[name](generator))
                wrong = status.startswith("5") and status != "503"
                # what is whole may be refused by what it says, and is answered where it says nothing wrong
                self.note(name, f"status {status}" if wrong or (status == "200" and name not in LEFT) else None, status)
            except Exception as error:
                self.note(name, f"{type(error).__name__}: {error}")

    def sent(self, text: bytes, leaves: float) -> str:
        """Send bytes, read for `leaves` seconds at most, and break the connection off; the status, if there was one."""
        found = b""
        with (
            contextlib.suppress(ConnectionError, TimeoutError),
            socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as raw,
        ):
            # no last words: the connection is reset
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(ConnectionError):
                raw.sendall(text)
            raw.settimeout(max(leaves, 0.001))
            while b"\r\n" not in found and (part := raw.recv(4096)):
                found += part
        return found[9:12].decode(errors="replace") or "none"


def request(body: bytes, path: str = "/v1/classify", length: int | None = None) -> bytes:
    """A request as bytes."""
    size = len(body) if length is None else length
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


def _good(generator: random.Random) -> bytes:
    row = {"question": "which?", "choices": ["red", "blue", f"number {generator.randrange(99)}"]}
    return json.dumps({"input": row}).encode()


def _text(generator: random.Random, stream: bool) -> bytes:
    asked = {"model": "run", "prompt": "red", "max_tokens": 200, "stream": stream}
    return request(json.dumps(asked).encode(), "/v1/completions")


def _nonsense(generator: random.Random) -> bytes:
    whole = bytearray(_good(generator))
    for _ in range(generator.randrange(1, 6)):
        at = generator.randrange(len(whole))
        whole[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
    return b"{" + bytes(whole) + b"]"


def _deep(generator: random.Random) -> bytes:
    kind, depth = generator.choice((b"[]", b'{"a":}')), generator.randrange(100, 20_000)
    opened, closed = (b"[", b"]") if kind == b"[]" else (b'{"a":', b"}")
    return (b'{"input":' + opened * depth + b"1" + closed * depth + b"}")[:BODY]


_PATHS = ("/v1/classify", "/v1/completions", "/v1/chat/completions")
_WRONG: tuple[Any, ...] = (
    {}, [], 3, None, {"input": None}, {"input": {}}, {"input": [[]]}, {"input": "text"}, {"input": [{"text": 3}]},
    {"input": {"question": "?", "choices": []}}, {"input": {"question": "?", "choices": "ab"}},
    {"input": {"question": "?", "choices": ["a", "a"]}}, {"input": {"question": " ", "choices": ["a", "b"]}},
    {"input": {"question": "?", "choices": ["a", "b"], "image": "/etc/passwd"}}, {"input": [1] * 5000},
    {"input": {"question": "?", "choices": ["a", "b"]}, "model": "../../etc"}, {"input": "x", "model": "x" * 9999},
    {"input": {"question": "\ud800", "choices": ["a", "b"]}}, {"input": {"question": "?", "choices": ["a", {}]}},
)  # fmt: skip

Sent = tuple[bytes, float]
BAD: dict[str, Callable[[random.Random], Sent]] = {
    "a client that leaves before its answer": lambda g: (request(_good(g)), g.choice((0, 0.02, 0.3))),
    "one that leaves its text": lambda g: (_text(g, False), g.choice((0, 0.02, 0.3))),
    "one that leaves its stream": lambda g: (_text(g, True), g.choice((0, 0.02, 0.5))),
    "half a body": lambda g: (request(_good(g)[: g.randrange(1, 40)], length=200), g.choice((0, 0.2, 30))),
    "half a head": lambda g: (request(_good(g))[: g.randrange(1, 90)], g.choice((0, 0.2, 30))),
    "a huge body": lambda g: (request(b'{"input": "' + b"x" * g.randrange(BODY, 40 * BODY)), 10),
    "a length without an end": lambda g: (request(b"{", length=10 ** g.randrange(6, 30)), 10),
    "chunks without an end": lambda g: (
        b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 20, 10,
    ),
    "malformed JSON": lambda g: (request(_nonsense(g)), 10),
    "deep JSON": lambda g: (request(_deep(g)), 10),
    "JSON that is no request": lambda g: (
        request(json.dumps(g.choice(_WRONG)).encode(), g.choice(_PATHS)), 10,
    ),
    "bytes that are no HTTP": lambda g: (g.randbytes(g.randrange(1, 3000)) + b"\r\n\r\n", 1),
}  # fmt: skip
LEFT = ("a client that leaves before its answer", "one that leaves its text", "one that leaves its stream")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= ROUNDING
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def expected(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Rows, their answers and the texts of the prompts, of this process."""
    from tiny_base import questions

    import scalabl
    from scalabl.inference.predictor import Predictor
    from scalabl.inference.settings import PredictionSettings

    examples = questions(40)
    answers = list(Predictor.load(run, PredictionSettings("mc", samples=4)).answers(examples))
    rows = [{"id": row.id, "question": row.question, "choices": list(row.choices)} for row in examples]
    texts = scalabl.generate(run, PROMPTS, samples=4, max_new_tokens=TOKENS, chat=False)
    # the token that ends a text is none of its letters
    return rows, answers, ["".join(t.text for t in text.tokens if t.text != "</s>") for text in texts]


@contextlib.contextmanager
def threads(*works: tuple[Callable[[int], None], int], over: threading.Event) -> Iterator[None]:
    """Each work in as many threads as it says, until the context ends."""
    made = [threading.Thread(target=work, args=(number,)) for work, number_of in works for number in range(number_of)]
    for thread in made:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in made:
            thread.join()


def main() -> None:
    """Ask for some time, and write what came of it."""
    chosen = options(
        __doc__, minutes=(10.0, "how long"), good=(4, "clients that ask rightly"), bad=(6, "clients that do not"),
        seed=(0, "of what is sent"), results=("yes", "write them", ("yes", "no")),
    ).parse_args()  # fmt: skip
    with tempfile.TemporaryDirectory() as name, offline(Path(name)):
        run = tiny_run(Path(name))
        known = expected(run)
        server = Server(run)
        soak = Soak(server, *known, seed=chosen.seed)
        memory = []
        with threads((soak.good, chosen.good), (soak.bad, chosen.bad), over=soak.over):
            ends = time.monotonic() + 60 * chosen.minutes
            while time.monotonic() < ends and server.made.poll() is None:
                time.sleep(max(0.5, 60 * chosen.minutes / 200))
                memory.append(server.memory() if server.made.poll() is None else 0.0)
        faults = soak.faults + server.end()
    quarter = max(1, len(memory) // 4)
    early, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    if late - early > GROWTH:
        faults.append(f"memory grew from {early:,.0f} to {late:,.0f} MiB")
    good = [name for name in soak.calls if name not in BAD]
    rows = [{"of": of, "calls": soak.calls[of]} for of in (*sorted(good), *BAD)]
    statuses = ", ".join(f"{status} {count:,}" for status, count in sorted(soak.statuses.items()))
    page = f"""# A server under bad clients

{chosen.good} clients that ask rightly and {chosen.bad} that do not, for {chosen.minutes:g} minutes, of a tiny model
behind `scalabl serve`: every good answer is that of a process without a server, to {ROUNDING:g}. Faults: {len(faults)}.
The server's memory: {early:,.0f} MiB in the second quarter, {late:,.0f} MiB in the last ({late - early:+.1f} MiB).
Statuses of bad requests (none: left, or closed without an answer): {statuses}.

{table(rows, ("of", "{of}"), ("calls", "{calls:,}"))}
"""
    if chosen.results == "yes":
        content = {
            "calls": dict(soak.calls), "statuses": dict(soak.statuses), "faults": faults,
            "memory_mib": [round(each, 1) for each in memory],
        }  # fmt: skip
        write("soak", content, page)
    else:
        print(page)
    for fault in faults[:5]:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
