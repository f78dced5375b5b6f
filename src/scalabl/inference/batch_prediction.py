"""Answers for a file of rows: written as they come, finished whole, and resumed where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from scalabl.core import processes
from scalabl.core.files import sha256
from scalabl.core.progress import progress_bar
from scalabl.data.example import Example
from scalabl.inference.answering import Answering, Asked, decide, promised
from scalabl.inference.promise import Promise, held_out_rows
from scalabl.metrics.selective import Threshold
from scalabl.predictive.sampling import PLAIN, Sampling
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord


def predict_file(
    directory: Path,
    rows: Sequence[Example],
    output: Path,
    *,
    predictive: str | None = None,
    samples: int = 10,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    stochastic_layers: str | None = None,
    batch_size: int = 8,
    abstain: float | None = None,
    promise: Promise | None = None,
    tell: Callable[[Threshold], None] | None = None,
    say: Callable[[str], None] | None = None,
    model: str | None = None,
) -> float | None:
    """Answer rows into a JSONL file.

    While it works, answers stand in a hidden file beside `output`, named after the rows, the adapter and the
    settings; the same call after a kill goes on behind its last whole line. Several processes share the work
    (`scalabl.predictive.over_ranks`); the main one writes.

    Args:
        directory: a finished run.
        rows: what to answer.
        output: the JSONL file; it appears when every row is answered.
        predictive: "mean", "mc", "linearized" or "auto"; None is what the record says, else auto.
        samples: N of mc.
        seed: of the particles.
        sampling: the kind of draws, and adaptive N; the threshold of adaptive N is `abstain`.
        stochastic_layers: draw s in these alone, as in `Run.predictive`.
        batch_size: rows at a time.
        abstain: answer null where the highest probability is below this.
        promise: answer null where an answer would break it; the run's held-out rows are predicted first.
        tell: called with the threshold that keeps the promise, before rows are answered.
        say: called with the sentence of what auto chose and why, before rows are answered.
        model: the base model, if it has moved.

    Returns:
        under adaptive N the mean number of particles a row took, else None.

    Raises:
        UserError: the run's held-out rows cannot be had, or rows that it cannot answer.
    """
    asked = Asked(predictive, samples, seed, sampling, stochastic_layers, abstain, promise)
    settings: list[Any] = [*asked.as_list(), sha256(directory / "adapter_model.safetensors")]
    if promise is not None:
        held_out = held_out_rows(RunRecord.read_finished(directory))
        settings += [promise.as_dict(), [[r.question, r.choices, r.answer, *r.content[2:]] for r in held_out]]
    identity = hashlib.sha256(json.dumps([settings, [[r.id, *r.content] for r in rows]]).encode())
    unfinished = output.with_name(f".{output.name}.{identity.hexdigest()[:12]}")
    done = processes.on_main(lambda: _whole_lines(unfinished))
    run = load_run(directory, model=model)
    encoded = run.encode(list(rows))  # refuses what it cannot answer before the first answer is written
    # decided from all rows, so that a call that goes on decides alike
    decision = decide(run, asked, rows, batch_size=batch_size)
    if decision.why is not None and say is not None and processes.is_main():
        say(decision.why)
    decision = promised(run, asked, decision, batch_size=batch_size)
    if decision.threshold is not None and tell is not None and processes.is_main():
        tell(decision.threshold)
    answering = Answering(run, asked, decision)
    prefix = answering.prefix(encoded)
    at_once = batch_size * processes.world_size()
    writing: AbstractContextManager[Any] = (
        unfinished.open("a", encoding="utf-8") if processes.is_main() else nullcontext()
    )
    with progress_bar() as progress, writing as file:
        bar = progress.add_task("predicting", total=len(rows), completed=done, detail="")
        for start in range(done, len(rows), at_once):
            chunk = slice(start, start + at_once)
            found = list(answering.answers(rows[chunk], encoded[chunk], batch_size=batch_size, prefix=prefix))
            if processes.is_main():
                _write(file, found)
            progress.advance(bar, len(rows[chunk]))

    def finish() -> float | None:
        os.replace(unfinished, output)
        if not asked.adaptive:
            return None
        with output.open(encoding="utf-8") as written:  # rows answered before a kill too
            return statistics.fmean(json.loads(line)["particles"] for line in written)

    return processes.on_main(finish)


def _write(file: TextIO, answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    file.flush()


def _whole_lines(path: Path) -> int:
    """How many whole lines an unfinished file has; half a line at its end is cut off."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content[:whole].count(b"\n")
