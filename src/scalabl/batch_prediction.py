"""Answers for a file of rows: written as they come, finished whole, and resumed where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scalabl.evaluation import choose, describe_method, make_strategy
from scalabl.loading import load_run
from scalabl.predictive import predict as predict_rows
from scalabl.progress import progress_bar
from scalabl.promise import Promise, held_out_rows, threshold_of
from scalabl.run_directory import finished_record, sha256
from scalabl.sampling import PLAIN, Sampling
from scalabl.scoring.prefix import shared_prefix
from scalabl.selective import Threshold
from scalabl.tasks import Example
from scalabl.uncertainty import average, decompose, particles_used


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
    settings; the same call after a kill goes on behind its last whole line.

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
    sampling, adaptive = replace(sampling, threshold=abstain), sampling.confidence is not None
    settings: list[Any] = [predictive or "auto", samples, seed, astuple(sampling), stochastic_layers]
    settings.append(sha256(directory / "adapter_model.safetensors"))
    if promise is not None:
        held_out = held_out_rows(finished_record(directory))
        settings += [promise.as_dict(), [[r.question, r.choices, r.answer] for r in held_out]]
    identity = hashlib.sha256(json.dumps([settings, [[r.id, r.question, r.choices] for r in rows]]).encode())
    unfinished = output.with_name(f".{output.name}.{identity.hexdigest()[:12]}")
    done = _whole_lines(unfinished)
    run = load_run(directory, model=model)
    encoded = run.encode(list(rows))  # refuses what it cannot answer before the first answer is written
    strategy = make_strategy(
        run, predictive, samples=samples, seed=seed, sampling=sampling, stochastic_layers=stochastic_layers
    )
    # the choice is made from all rows, so that a call that goes on makes the same one
    strategy, why = choose(run, strategy, rows, batch_size=batch_size)
    extra = {"predictive": describe_method(run, strategy)} if why else {}
    if why and say is not None:
        say(why[0])
    threshold = None if promise is None else threshold_of(run, promise, strategy, batch_size=batch_size)
    if threshold is not None and tell is not None:
        tell(threshold)

    def answered(log_probs: Tensor) -> NDArray[np.bool_]:
        if promise is not None and threshold is not None:
            return promise.answered(threshold, log_probs)
        return np.asarray(average(log_probs).amax(dim=1) >= (abstain or 0.0))

    prefix = shared_prefix(run.scorer, encoded) if getattr(strategy, "shares_prefix", False) else None
    with progress_bar() as progress, unfinished.open("a", encoding="utf-8") as file:
        bar = progress.add_task("predicting", total=len(rows), completed=done, detail="")
        for start in range(done, len(rows), batch_size):
            chunk = slice(start, start + batch_size)
            log_probs = predict_rows(run.scorer, encoded[chunk], strategy, batch_size=batch_size, prefix=prefix)
            found = answers_of(rows[chunk], log_probs, answered, with_particles=adaptive)
            _write(file, (answer | extra for answer in found))
            progress.advance(bar, len(rows[chunk]))
    os.replace(unfinished, output)
    if not adaptive:
        return None
    with output.open(encoding="utf-8") as file:  # rows answered before a kill too
        return statistics.fmean(json.loads(line)["particles"] for line in file)


def answers_of(
    rows: Sequence[Example],
    log_probs: Tensor,
    answered: Callable[[Tensor], NDArray[np.bool_]],
    *,
    with_particles: bool = False,
) -> Iterator[dict[str, Any]]:
    """One answer a row: id, label, probs (choice -> probability), confidence, entropy, aleatoric, epistemic.

    Args:
        rows: n questions.
        log_probs: (N, n, C) of N particles.
        answered: (N, n, C) -> (n,) whether a row is answered; its label is null where not.
        with_particles: add `particles`, how many the answer is averaged over.
    """
    probs, uncertainty, used = average(log_probs), decompose(log_probs), particles_used(log_probs)
    given = answered(log_probs)
    for i, row in enumerate(rows):
        of_row = probs[i, : len(row.choices)].tolist()
        confidence = max(of_row)
        label = row.choices[of_row.index(confidence)]
        yield {
            "id": row.id,
            "label": label if given[i] else None,
            "probs": dict(zip(row.choices, of_row, strict=True)),
            "confidence": confidence,
            "entropy": uncertainty.total[i].item(),
            "aleatoric": uncertainty.aleatoric[i].item(),
            "epistemic": uncertainty.epistemic[i].item(),
            **({"particles": int(used[i])} if with_particles else {}),
        }


def _write(file: TextIO, answers: Iterator[dict[str, Any]]) -> None:
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
