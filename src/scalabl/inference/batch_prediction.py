"""Answers for a file of rows: written as they come, finished whole, and resumed where a killed run stopped.

Rows are answered longest first, in batches of like length, so that little of a batch is padding; the finished file has
them in the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from scalabl.core import processes
from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.files import FEATURES, lock, sha256, write_text
from scalabl.data.example import Example
from scalabl.inference.calibration import calibration_for
from scalabl.inference.predictor import Predictor
from scalabl.inference.promise import held_out_rows
from scalabl.inference.settings import PredictionSettings, is_answered
from scalabl.runs.record import RECORD, RunRecord
from scalabl.runs.stock import Asked
from scalabl.scoring.base import cut_rows_sentence
from scalabl.scoring.scorer import longest_first


@dataclass(frozen=True)
class FileSummary:
    """What a file of answers came to.

    Attributes:
        answered: how many answers are not null.
        error: which share of them is wrong by their own probabilities; None where there are none.
        surest: the highest confidence of a row.
        particles: under adaptive N the mean number of particles a row took, else None.
        cut: a sentence on rows that lost their beginning; None where none did.
    """

    answered: int
    error: float | None
    surest: float
    particles: float | None
    cut: str | None = None


def predict_file(
    directory: Path,
    rows: Sequence[Example],
    output: Path,
    settings: PredictionSettings | None = None,
    *,
    batch_size: int = 8,
    tell: Callable[[PredictionSettings], None] | None = None,
    model: str | None = None,
    asked: Asked | None = None,
) -> FileSummary:
    """Answer rows into a JSONL file.

    While it works, answers stand in a hidden file beside `output`, named after the rows, the adapter and the
    settings; the same call after a kill goes on behind its last whole batch. Several processes share the work
    (`scalabl.predictive.base.predict`); the main one writes.

    Args:
        directory: a finished run.
        rows: what to answer.
        output: the JSONL file; it appears when every row is answered.
        settings: what decides the answers; for a promise, the run's held-out rows are predicted first.
        batch_size: rows at a time.
        tell: called with the resolved settings before rows are answered.
        model: the base model, if it has moved.
        asked: how the rows of an adapter without a record are scored.

    Raises:
        UserError: the run's held-out rows cannot be had, or rows that it cannot answer.
    """
    settings = settings or PredictionSettings()
    unfinished = output.with_name(f".{output.name}.{_identity(directory, rows, settings, asked)}")
    with _alone(unfinished, output) as file:
        predictor = Predictor.load(directory, settings, model=model, batch_size=batch_size, asked=asked)
        encoded = predictor.run.encode(list(rows))  # refuses what it cannot answer before the first answer is written
        # resolved for all rows, so that a call that goes on resolves alike
        settings = predictor.resolve(rows)
        if tell is not None and processes.is_main():
            tell(settings)
        predictor.keep_prefix(encoded)
        order = longest_first(encoded)
        at_once = batch_size * processes.world_size()
        is_adaptive = settings.is_adaptive
        in_order = [rows[i] for i in order]
        done = processes.on_main(lambda: _whole_lines(unfinished, in_order, at_once, is_adaptive))
        with progress_bar() as progress:
            bar = progress.add_task("predicting", total=len(rows), completed=done, detail="")
            for start in range(done, len(rows), at_once):
                chunk = order[start : start + at_once]
                found = list(predictor.answers([rows[i] for i in chunk], [encoded[i] for i in chunk]))
                if file is not None:
                    _write(file, found)
                progress.advance(bar, len(chunk))
        summary = processes.on_main(lambda: asdict(_finish(unfinished, output, order, is_adaptive)))
        if file is not None:
            _remove_open(unfinished, file)
    return FileSummary(**summary | {"cut": cut_rows_sentence(encoded, predictor.run.scorer.scoring)})


@contextmanager
def _alone(unfinished: Path, output: Path) -> Iterator[TextIO | None]:
    """The unfinished file, open behind what it holds and kept from a second call, in the main process.

    What fails within leaves the answers that it has, from which the same call goes on; no file where it has none.

    Raises:
        UserError: another call has it, or it is a link.
    """
    opened: list[TextIO] = []
    processes.on_main(lambda: opened.append(_open(unfinished, output)))
    try:
        yield opened[0] if opened else None
    except BaseException:
        if opened and unfinished.is_file() and b"\n" not in unfinished.read_bytes():
            _remove_open(unfinished, opened[0])
        raise
    finally:
        for file in opened:
            file.close()


def _open(unfinished: Path, output: Path) -> TextIO:
    taken = f"Another call answers these rows into {output}; wait for its end, or choose another --output."
    try:
        number = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if unfinished.is_symlink():
            raise UserError(f"{unfinished}, where answers are collected, is a link; remove it.") from error
        raise
    file = os.fdopen(number, "a", encoding="utf-8", newline="\n")
    try:
        lock(number, taken)
        # the one that had it may have put it in place meanwhile
        if not unfinished.is_file() or not os.path.samestat(os.fstat(number), unfinished.stat()):
            raise UserError(taken)
    except UserError:
        file.close()
        raise
    return file


def _remove_open(unfinished: Path, file: TextIO) -> None:
    """Take the file away before another call can have it; where none is removed that is open, after closing it."""
    if os.name == "nt":
        file.close()
    unfinished.unlink(missing_ok=True)


def _identity(
    directory: Path, rows: Sequence[Example], settings: PredictionSettings, asked: Asked | None = None
) -> str:
    """Of the answers: they go on only under the same settings, adapter and rows."""
    decisive: list[Any] = [settings.to_dict(), sha256(directory / "adapter_model.safetensors")]
    if settings.method is not None:
        decisive += [sha256(path) for path in sorted((directory / "posthoc" / settings.method).glob("*.*"))]
    if (directory / FEATURES).is_file():
        decisive.append(sha256(directory / FEATURES))
    # an adapter of another trainer has none, and so neither a calibration nor held-out rows
    record = RunRecord.read_finished(directory) if (directory / RECORD).is_file() else None
    if record is not None and calibration_for(record, settings) is not None:
        decisive.append(record.calibration)
    if record is not None and settings.has_promise:
        decisive += [row.labelled for row in held_out_rows(record)]
    if asked is not None:
        decisive += [value for value in vars(asked).values() if value is not None]
    whole = json.dumps([decisive, [[r.id, *r.content] for r in rows]])
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def _write(file: TextIO, answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    file.flush()


def _whole_lines(path: Path, rows: Sequence[Example], at_once: int, is_adaptive: bool) -> int:
    """How many lines of whole batches an unfinished file has that are these rows' answers; the rest is cut off."""
    lines = path.read_bytes().split(b"\n")[:-1]
    sound = takewhile(lambda pair: _is_answer(*pair, is_adaptive), zip(lines, rows, strict=False))
    lines = [line for line, _ in sound]
    lines = lines[: len(lines) - len(lines) % at_once]
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _is_answer(line: bytes, row: Example, is_adaptive: bool) -> bool:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(answer, dict) or answer.get("id") != row.id or not isinstance(answer.get("probs"), dict):
        return False
    return answer["probs"].keys() == set(row.choices) and (not is_adaptive or isinstance(answer.get("particles"), int))


def _finish(unfinished: Path, output: Path, order: Sequence[int], is_adaptive: bool) -> FileSummary:
    """Put the answers, a line each in this order of rows, into the order of the rows."""
    lines = unfinished.read_text(encoding="utf-8").split("\n")[:-1]
    by_row = dict(zip(order, lines, strict=True))
    write_text(output, "".join(f"{by_row[i]}\n" for i in range(len(lines))))
    answers = [json.loads(line) for line in lines]  # of a call that was killed too
    given = [answer["confidence"] for answer in answers if is_answered(answer)]
    return FileSummary(
        answered=len(given),
        error=1 - statistics.fmean(given) if given else None,
        surest=max(answer["confidence"] for answer in answers),
        particles=statistics.fmean(answer["particles"] for answer in answers) if is_adaptive else None,
    )
