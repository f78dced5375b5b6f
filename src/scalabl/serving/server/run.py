"""A server from its socket to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from scalabl.core.console import say
from scalabl.core.errors import UserError
from scalabl.serving.server.app import Server

_CONNECTIONS = 1000  # at once; the next is answered 503


class _Terminal(logging.Handler):
    """Shows what is logged, where texts of requests cannot steer the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), stderr=True)


class _TimedHeaders(H11Protocol):
    """uvicorn's protocol, in which a request's headers must be whole in time."""

    seconds = 15.0
    _headers: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._wait_for_headers()
        elif self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._headers is not None:
            self._headers.cancel()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        if self._headers is None:
            self._headers = self.loop.call_later(self.seconds, self.transport.abort)


def bound(host: str, port: int) -> socket.socket:
    """A socket that is the server's alone, before anything is loaded.

    Raises:
        UserError: the address is none of this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{host}:{port} cannot be listened at ({why}); choose another --host or --port.") from error
    return made


def made(server: Server, *, grace: float = 30.0) -> uvicorn.Server:
    """What runs a server's app, and at its end waits `grace` seconds for what it took.

    Args:
        server: the adapters and their routes.
        grace: as above.
    """

    class Protocol(_TimedHeaders):
        seconds = server.limits.body_seconds

    config = uvicorn.Config(
        server.app, http=Protocol, ws="none", lifespan="on", log_config=None, log_level="error", access_log=False,
        server_header=False, date_header=False, limit_concurrency=_CONNECTIONS, proxy_headers=False,
        timeout_graceful_shutdown=round(grace),
    )  # fmt: skip
    return uvicorn.Server(config)


def run(server: Server, at: socket.socket, *, grace: float = 30.0) -> None:
    """Answer at a socket until SIGINT or SIGTERM, and then what was taken before."""
    for name in ("uvicorn.error", "scalabl.serving.server"):
        logging.getLogger(name).addHandler(_Terminal())
        logging.getLogger(name).propagate = False
    with _ends_quietly():
        made(server, grace=grace).run(sockets=[at])


@contextlib.contextmanager
def _ends_quietly() -> Iterator[None]:
    """Context in which the signals that uvicorn raises anew behind its end do nothing more."""
    before = {sign: signal.signal(sign, lambda *_: None) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
