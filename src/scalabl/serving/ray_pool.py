"""Ray actors that do jobs until every job is done once, though workers are killed.

A worker is an actor with the methods `ready` (load what jobs need) and those that jobs name. Ray is not asked to
restart actors or to repeat their tasks: a job whose worker died goes to whoever is free first, a new worker comes in
the dead one's place, and a job that costs `ATTEMPTS` workers their life is named instead of being repeated for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scalabl.core.errors import UserError

ATTEMPTS = 3
_WAIT = 1.0  # seconds, after which Ctrl-C is heard


@dataclass(frozen=True)
class Job:
    """A call of a worker.

    Attributes:
        method: of the worker.
        argument: what it gets.
        key: what the job is called by, one of a kind.
        title: how a sentence names it.
    """

    method: str
    argument: Any
    key: tuple[Any, ...]
    title: str


class Pool:
    """Workers that come as the cluster has room for them.

    Args:
        ray: the module, connected.
        start: makes a worker; it may wait for room in the cluster as long as it likes.

    Attributes:
        lost: how many workers have died.
    """

    def __init__(self, ray: Any, start: Callable[[], Any]) -> None:
        self._ray = ray
        self._start = start
        self._idle: list[Any] = []
        self._pending: dict[Any, tuple[Any, Job | None]] = {}  # what was asked -> (worker, job); no job: it gets ready
        self._deaths: Counter[tuple[Any, ...]] = Counter()
        self.lost = 0

    @property
    def working(self) -> int:
        """How many workers have a job now."""
        return sum(job is not None for _, job in self._pending.values())

    def do(self, jobs: deque[Job], workers: int) -> Iterator[tuple[Job, Any]]:
        """Yield every job with its result, or with the `UserError` that it ended in, as they end.

        Args:
            jobs: taken from the left; more may be put in while this is iterated.
            workers: how many at once.

        Raises:
            UserError: workers cannot get ready, or die of one job again and again.
        """
        exceptions = self._ray.exceptions
        died = (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError)
        while jobs or self.working:
            for _ in range(min(workers, len(jobs) + self.working) - len(self._idle) - len(self._pending)):
                worker = self._start()
                self._pending[worker.ready.remote()] = (worker, None)
            while jobs and self._idle:
                worker, given = self._idle.pop(), jobs.popleft()
                self._pending[getattr(worker, given.method).remote(given.argument)] = (worker, given)
            ended, _ = self._ray.wait([*self._pending], num_returns=1, timeout=_WAIT)
            for reference in ended:
                worker, job = self._pending.pop(reference)
                try:
                    result = self._ray.get(reference)
                except died as error:
                    self._bury(worker, job, error)
                    if job is not None:
                        jobs.appendleft(job)
                    continue
                except exceptions.RayTaskError as error:
                    cause = error.cause
                    if job is None or not isinstance(cause, UserError):
                        raise cause from None
                    result = cause
                self._idle.append(worker)
                if job is not None:
                    yield job, result

    def close(self) -> None:
        """End all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._pending.values())]:
            self._ray.kill(worker)
        self._idle, self._pending = [], {}

    def _bury(self, worker: Any, job: Job | None, error: Exception) -> None:
        if getattr(error, "actor_init_failed", False):  # before its own code was reached
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"Workers cannot start ({reason}); install the same scalabl on every machine.") from error
        self._ray.kill(worker)  # it may only be out of reach
        self.lost += 1
        key = () if job is None else job.key
        self._deaths[key] += 1
        if self._deaths[key] >= ATTEMPTS:
            during = "loading the model" if job is None else job.title
            raise UserError(
                f"{ATTEMPTS} workers died at {during}, perhaps out of memory; lower --batch-size, and run the same "
                "command again to go on."
            ) from error
