"""Rows in a request -> the answers that `scalabl predict` writes, in batches that requests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import KEY, Example
from scalabl.data.jsonl import row_of
from scalabl.data.load import with_labels
from scalabl.inference.settings import is_answered
from scalabl.scoring.base import Encoded
from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.metrics import Metrics
from scalabl.serving.server.worker import Job

GATHERED = 4  # batches of the model that requests share at once: of rows of like length, so that little is padding


def rows_asked(adapter: ServedAdapter, given: Sequence[str | dict[str, Any]]) -> list[Example]:
    """The rows of a request: texts, or the fields of a row as JSONL has them.

    Raises:
        UserError: a row that is none, names an image (a file of the server's), or has a pair where others have not.
    """
    labels = adapter.run.record.labels
    rows = []
    for i, each in enumerate(given):
        where = f"input[{i}]"
        raw = {"text": each} if isinstance(each, str) else each
        if KEY in raw:
            raise UserError(f'{where}: "{KEY}" names a file, and the server reads none for a request; leave it out.')
        row = replace(row_of(raw, labels, where=where, name=str(i)), answer=None, answers=None)
        rows += with_labels([row], labels, where, whole=True)
    if len({row.pair is None for row in rows}) > 1:
        raise UserError('The rows of a request are with and without "text_pair"; give all of them one, or none.')
    return rows


class Classify:
    """Jobs of rows for one server.

    Args:
        metrics: where rows are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def job(self, adapter: ServedAdapter, rows: list[Example]) -> Job:
        """What gives the rows' answers, one dict each."""

        def work(jobs: Sequence[Job]) -> list[Any]:
            return self._answers(adapter, [job.given for job in jobs])

        # a batch holds the kinds of tokens of its first row, so that pairs stand with pairs
        key = ("rows", adapter.name, rows[0].pair is None)
        assert adapter.predictor is not None
        return Job(key, len(rows), GATHERED * adapter.predictor.batch_size, work, rows)

    def _answers(self, adapter: ServedAdapter, asked: Sequence[list[Example]]) -> list[Any]:
        """For each list of rows their answers, or why they have none."""
        predictor = adapter.predictor
        assert predictor is not None
        found: list[Any] = []
        rows: list[Example] = []
        encoded: list[Encoded] = []
        for own in asked:
            try:
                tokens = predictor.run.encode(own)
            except UserError as error:
                found.append(error)
                continue
            found.append(slice(len(rows), len(rows) + len(own)))
            rows += own
            encoded += tokens
        answers = list(predictor.answers(rows, encoded)) if rows else []
        for answer in answers:
            reason = "" if is_answered(answer) else answer["reason"]
            self.metrics.rows.labels(adapter.name, reason).inc()
        return [answers[each] if isinstance(each, slice) else each for each in found]
