"""How many rows a second `scalabl serve` answers for 1, 8 and 64 clients, beside one row at a time without a server.

    python benchmarks/serve.py

One by one: `Predictor.answers` of single rows in a process of its own, as `scalabl predict --batch-size 1` without
reading and writing. The server is a process too, under its own defaults. Each client sends a row and waits for its
answer before it sends the next one, over a connection that stays open; all clients are in this process. All ways are
measured once a round, in an order drawn anew; throughput is given as ratios of the same round. Rows are the task's
questions, and their first ten words, as short as messages are. The model's thread has one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

ALONE = "one by one"
ROWS = {ALONE: 16, "1 client": 16, "8 clients": 32, "64 clients": 128}  # of each way in a round
WORDS = 10  # of a short row
SETTINGS: dict[str, Any] = {
    "model": "minilm-l6", "data": "mmlu-subjects", "steps": 30, "batch_size": 16, "layers": "last:3",
    "train_rows": 400, "validation_rows": 100,
}  # fmt: skip

# answers a list of rows a line, one by one, and says how long each took
_ONE_BY_ONE = """
import json, sys, time
from pathlib import Path
from scalabl.core.console import quiet, quiet_imports
quiet_imports()
from scalabl.data.example import Example
from scalabl.inference.predictor import Predictor
quiet()
predictor = Predictor.load(Path(sys.argv[1]))
predictor.resolve()
labels = predictor.whole_run().record.labels
for line in sys.stdin:
    found = []
    for text in json.loads(line):
        begun = time.perf_counter()
        list(predictor.answers([Example("0", text, labels, None)]))
        found.append(time.perf_counter() - begun)
    print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Timed:
    """How long each answer took, and all of them together, in seconds."""

    each: list[float]
    together: float


class Alone:
    """One row at a time, in a process of its own.

    Args:
        run: a run's directory.
    """

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-c", _ONE_BY_ONE, str(run)]
        self.made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, texts: Sequence[str]) -> Timed:
        """Answer rows."""
        assert self.made.stdin is not None and self.made.stdout is not None
        self.made.stdin.write(json.dumps(texts) + "\n")
        self.made.stdin.flush()
        each = json.loads(self.made.stdout.readline())
        return Timed(each, sum(each))

    def close(self) -> None:
        """End the process."""
        assert self.made.stdin is not None
        self.made.stdin.close()
        self.made.wait()


class Served:
    """Clients of a server in a process of its own.

    Args:
        run: a run's directory.
    """

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-P", "-m", "scalabl", "serve", f"run={run}", "--port", "0"]
        self.made = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.made.stdout is not None
        line = next(line for line in self.made.stdout if line.startswith("listening"))
        self.port = int(line.rpartition(":")[2])

    def answer(self, texts: Sequence[str], clients: int) -> Timed:
        """Answer rows, asked by so many clients."""
        return asyncio.run(self._answer(texts, clients))

    async def _answer(self, texts: Sequence[str], clients: int) -> Timed:
        left, found = iter(texts), list[float]()

        async def client() -> None:
            into, out = await asyncio.open_connection("127.0.0.1", self.port)
            for text in left:
                begun = time.perf_counter()
                await post(into, out, {"input": text})
                found.append(time.perf_counter() - begun)
            out.close()

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return Timed(found, time.perf_counter() - begun)

    def close(self) -> None:
        """End the process."""
        self.made.terminate()
        self.made.wait()


async def post(into: asyncio.StreamReader, out: asyncio.StreamWriter, content: dict[str, Any]) -> dict[str, Any]:
    """Ask for labels over an open connection; a client as light as can be, since it shares the machine."""
    body = json.dumps(content).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    out.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    said = (await into.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(said.partition("content-length: ")[2].partition("\r\n")[0])
    answer: dict[str, Any] = json.loads(await into.readexactly(length))
    assert said.startswith("http/1.1 200 ") and len(answer["data"]) == 1, answer
    return answer


def measure(run: Path, kinds: dict[str, list[str]], rounds: int, seed: int) -> dict[str, dict[str, list[Timed]]]:
    """Kind of rows -> way -> what each round took."""
    with contextlib.ExitStack() as ends:
        alone, served = Alone(run), Served(run)
        ends.callback(served.close)
        ends.callback(alone.close)

        def answer(name: str, rows: int | None = None) -> Timed:
            kind, way = name.split(": ")
            texts = list(itertools.islice(itertools.cycle(kinds[kind]), rows or ROWS[way]))
            return alone.answer(texts) if way == ALONE else served.answer(texts, int(way.split()[0]))

        names = [f"{kind}: {way}" for kind in kinds for way in ROWS]
        for name in names:
            answer(name, 8)  # before any is timed
        found = harness.interleaved(names, rounds, seed, answer)
    return {kind: {way: found[f"{kind}: {way}"] for way in ROWS} for kind in kinds}


def figures(found: dict[str, list[Timed]]) -> dict[str, dict[str, Any]]:
    """Way -> rows a second beside one by one, and percentiles of an answer's time beside the median of one by one."""
    rate = {way: [len(each.each) / each.together for each in rounds] for way, rounds in found.items()}
    times = {way: sorted(itertools.chain(*(each.each for each in rounds))) for way, rounds in found.items()}
    unit = statistics.median(times[ALONE])
    return {
        way: {
            "throughput": harness.ratios(rate[way], rate[ALONE], 3),
            "p50": statistics.median(times[way]) / unit,
            "p99": times[way][int(0.99 * (len(times[way]) - 1))] / unit,
            "answers": len(times[way]),
        }
        for way in found
    }


def page(made: dict[str, dict[str, dict[str, Any]]], known: dict[str, str]) -> str:
    """The tables."""
    tables = [
        f"## {kind}\n\n" + harness.table(
            [{"way": way, **each} for way, each in of_kind.items()], ("", "{way}"),
            ("rows a second", "{throughput[median]:.2f} ({throughput[low]:.2f} to {throughput[high]:.2f})"),
            ("p50", "{p50:.2f}"), ("p99", "{p99:.2f}"), ("answers", "{answers:,}"),
        )
        for kind, of_kind in made.items()
    ]  # fmt: skip
    between = "\n\n"
    return f"""# A server's throughput

`scalabl serve` and one row at a time without a server: rows a second beside those of one by one in the same round
(median over rounds, 95 % bootstrap interval), and the median and 99th percentile of the time to an answer, in units of
the median time of one by one. Of 64 clients that are served 4 times as fast each waits 16 times as long.

{between.join(tables)}

{harness.markdown_facts(known)}
"""


def main() -> None:
    """Train a short run if there is none, measure, and write docs/results/serve.json and .md."""
    chosen = harness.options(
        __doc__, run=("", "a run with a head over texts; a short one is trained if left out"),
        rounds=(3, "how many"), seed=(0, "of the order"), results=("yes", "write them", ("yes", "no")),
    ).parse_args()  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    from scalabl.data.load import rows_of
    from scalabl.runs.record import RunRecord

    run = Path(chosen.run) if chosen.run else trained(Path("runs") / "serve")
    record = RunRecord.read_classifier(run)
    texts = [row.question for row in rows_of(record.recipe["data"], split="test", limit=192)]
    kinds = {"Whole questions": texts, "Their first ten words": [" ".join(text.split()[:WORDS]) for text in texts]}
    made = {kind: figures(found) for kind, found in measure(run, kinds, chosen.rounds, chosen.seed).items()}
    labels, data = len(record.labels or ()), record.recipe["data"]
    known = harness.facts(
        model=record.model, data=f"{len(texts)} test rows of {data}, {labels} labels", load=harness.load_average()
    )
    if chosen.results == "yes":
        harness.write_results(harness.RESULTS, "serve", {"facts": known, "rows": made}, page(made, known))
    else:
        print(page(made, known))


def trained(directory: Path) -> Path:
    """A short run, trained once."""
    from scalabl.core.console import quiet
    from scalabl.runs.settings import Settings
    from scalabl.training.run import train

    quiet()
    train(Settings.flat(**SETTINGS), directory)
    return directory


if __name__ == "__main__":
    main()
