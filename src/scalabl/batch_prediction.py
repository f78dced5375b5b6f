"""Answers for a file of rows: written as they come, finished whole, and resumed where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from scalabl.evaluation import default_predictive
from scalabl.loading import load_run
from scalabl.predictive import predict as predict_rows
from scalabl.progress import progress_bar
from scalabl.run_directory import sha256
from scalabl.tasks import Example
from scalabl.uncertainty import average, decompose


def predict_file(
    directory: Path,
    rows: Sequence[Example],
    output: Path,
    *,
    predictive: str | None = None,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    abstain: float | None = None,
    model: str | None = None,
) -> None:
    """Answer rows into a JSONL file.

    While it works, answers stand in a hidden file beside `output`, named after the rows, the adapter and the
    settings; the same call after a kill goes on behind its last whole line.

    Args:
        directory: a finished run.
        rows: what to answer.
        output: the JSONL file; it appears when every row is answered.
        predictive: "mean" or "mc"; None takes mc where there is a posterior.
        samples: N of mc.
        seed: of the particles.
        batch_size: rows at a time.
        abstain: answer null where the highest probability is below this.
        model: the base model, if it has moved.
    """
    settings = [predictive, samples, seed, abstain, sha256(directory / "adapter_model.safetensors")]
    identity = hashlib.sha256(json.dumps([settings, [[r.id, r.question, r.choices] for r in rows]]).encode())
    unfinished = output.with_name(f".{output.name}.{identity.hexdigest()[:12]}")
    done = _whole_lines(unfinished)
    run = load_run(directory, model=model)
    encoded = run.encode(list(rows))  # refuses what it cannot answer before the first answer is written
    strategy = run.predictive(predictive or default_predictive(run), samples=samples, seed=seed)
    with progress_bar() as progress, unfinished.open("a", encoding="utf-8") as file:
        bar = progress.add_task("predicting", total=len(rows), completed=done, detail="")
        for start in range(done, len(rows), batch_size):
            chunk = slice(start, start + batch_size)
            log_probs = predict_rows(run.scorer, encoded[chunk], strategy, batch_size=batch_size)
            _write(file, answers_of(rows[chunk], log_probs, abstain))
            progress.advance(bar, len(rows[chunk]))
    os.replace(unfinished, output)


def answers_of(rows: Sequence[Example], log_probs: Tensor, abstain: float | None) -> Iterator[dict[str, Any]]:
    """One answer a row: id, label, probs (choice -> probability), confidence, entropy, aleatoric, epistemic.

    Args:
        rows: n questions.
        log_probs: (N, n, C) of N particles.
        abstain: label null where the confidence is below this.
    """
    probs, uncertainty = average(log_probs), decompose(log_probs)
    for i, row in enumerate(rows):
        of_row = probs[i, : len(row.choices)].tolist()
        confidence = max(of_row)
        label = row.choices[of_row.index(confidence)]
        yield {
            "id": row.id,
            "label": None if abstain is not None and confidence < abstain else label,
            "probs": dict(zip(row.choices, of_row, strict=True)),
            "confidence": confidence,
            "entropy": uncertainty.total[i].item(),
            "aleatoric": uncertainty.aleatoric[i].item(),
            "epistemic": uncertainty.epistemic[i].item(),
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
