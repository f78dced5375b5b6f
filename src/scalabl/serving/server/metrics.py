"""What Prometheus reads of a server; one registry a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The figures of a server.

    Attributes:
        requests: by path and status.
        seconds: of a request, by path.
        waiting: rows in the queue.
        batches: rows of a batch.
        rows: rows that were classified, by adapter and why they have no label ("" for one that has).
        tokens: tokens that were written, by adapter.
    """

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("scalabl_requests", "Requests that were answered.", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "scalabl_request_seconds",
            "From a request to its answer's last byte.",
            ["path"],
            buckets=_SECONDS,
            registry=own,
        )
        self.waiting = Gauge("scalabl_waiting_rows", "Rows that wait for the model.", registry=own)
        self.batches = Histogram("scalabl_batch_rows", "Rows that shared a batch.", buckets=_ROWS, registry=own)
        self.rows = Counter("scalabl_rows", "Rows, and why they have no label.", ["model", "reason"], registry=own)
        self.tokens = Counter("scalabl_tokens", "Tokens that were written.", ["model"], registry=own)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
