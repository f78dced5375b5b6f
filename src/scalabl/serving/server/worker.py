"""The one thread that passes the model, and what waits for it.

A batch is what waits for the same adapter when the thread is free, first come first served: while one batch is under
way the next one gathers, and a request that comes alone is answered at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from scalabl.serving.server.metrics import Metrics

log = logging.getLogger(__name__)
_LONGEST_WAIT = 60  # seconds, of `retry_after`


class Busy(Exception):
    """What waits has reached its bound.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("too much waits")
        self.retry_after = retry_after


class ModelFailed(Exception):
    """The model, and not what it was asked, is at fault; what happened is in the log."""


class Closing(Exception):
    """Nothing more is taken: the server is at its end."""


@dataclass(eq=False)
class Job:
    """What one request asks of the model.

    Attributes:
        key: jobs with the same one may share a batch.
        size: its rows.
        most: rows that its batch may gather; a job with more is a batch of its own.
        work: answers a batch of such jobs: for each its result, or a `UserError` that says what is wrong with it.
        given: what it is asked.
        again: whether a batch that failed may be answered anew, job by job; not where a part of it was told already.
        answer: the result.
        gone: set where nobody waits for it any more.
    """

    key: Hashable
    size: int
    most: int
    work: Callable[[Sequence[Job]], Sequence[Any]]
    given: Any
    again: bool = True
    answer: Future[Any] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)

    def give_up(self) -> None:
        """Let the worker pass over it, or end it where it is under way."""
        self.gone.set()
        self.answer.cancel()


class ModelWorker:
    """The thread and its queue.

    Args:
        metrics: where batches and the queue's length are counted.
        most_waiting: rows that may wait.
    """

    def __init__(self, metrics: Metrics, *, most_waiting: int = 1024) -> None:
        self.metrics = metrics
        self.most_waiting = most_waiting
        self._waiting: deque[Job] = deque()
        self._rows = 0  # that wait
        self._seconds_a_row = 0.05  # of late
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scalabl-model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> Future[Any]:
        """Put a job behind those that wait.

        Raises:
            Busy: too many rows do.
            Closing: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise Closing
            if self._rows + job.size > self.most_waiting:
                wait = math.ceil(self._rows * self._seconds_a_row)
                raise Busy(min(max(wait, 1), _LONGEST_WAIT))
            self._waiting.append(job)
            self._rows += job.size
            self.metrics.waiting.set(self._rows)
            self._changed.notify()
        return job.answer

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, and answer what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while batch := self._next():
            begun = time.perf_counter()
            self._answer(batch)
            rows = sum(job.size for job in batch)
            self.metrics.batches.observe(rows)
            self._seconds_a_row += 0.2 * ((time.perf_counter() - begun) / rows - self._seconds_a_row)

    def _next(self) -> list[Job]:
        """The jobs of the next batch, once there are any; none when the queue is closed and empty."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                batch: list[Job] = []
                rows = 0
                kept: deque[Job] = deque()
                for job in self._waiting:
                    fits = not batch or (job.key == batch[0].key and rows + job.size <= batch[0].most)
                    if not fits:
                        kept.append(job)
                        continue
                    self._rows -= job.size
                    if job.answer.set_running_or_notify_cancel():
                        batch.append(job)
                        rows += job.size
                self._waiting = kept
                self.metrics.waiting.set(self._rows)
                if batch or (self._closed and not kept):
                    return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            results = batch[0].work(batch)
        except Exception:
            if len(batch) > 1 and batch[0].again:  # one of them may be at fault, or all of them too much
                for job in batch:
                    self._answer([job])
                return
            log.exception("The model failed.")
            results = [ModelFailed()] * len(batch)
        for job, result in zip(batch, results, strict=True):
            if job.answer.done():  # before the others of its batch
                continue
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)
