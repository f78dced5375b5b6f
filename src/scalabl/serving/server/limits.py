"""Who may ask, and what a request may be: settled before its body is read as JSON.

Refusals have the form of OpenAI's, and say nothing of the server's files.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalabl.serving.server.metrics import Metrics

OPEN = ("/", "/healthz")  # without a token: they say nothing of the adapters
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PATHS = ("/", "/healthz", "/metrics", "/v1/models", "/v1/classify", "/v1/chat/completions", "/v1/completions")
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        body: bytes of a request.
        rows: of a request.
        tokens: that a text may have.
        prompt: tokens that a prompt may have.
        seconds: from a request's last byte to its answer.
        body_seconds: from a request's headers to its last byte, and for a part of an answer to be taken.
        token: that requests bear; None asks for none.
        hosts: names by which requests call the server, where no token keeps pages of others out; None is any.
    """

    body: int = 1 << 20
    rows: int = 256
    tokens: int = 512
    prompt: int = 4096
    seconds: float = 120.0
    body_seconds: float = 15.0
    token: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK


def error_body(status: int, sentence: str, code: str | None = None) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}


class _Refused(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Gone(Exception):
    """The client left before its request was whole."""


class Guard:
    """The outermost layer: counts every request, and hands on those that may be answered, read whole.

    Args:
        app: what is guarded.
        limits: its bounds.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # the client left

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self.limits.body_seconds):  # a client that takes nothing
                await send(message)

        try:
            self._admit(scope)
            body = await self._body(receive)
            await self.app(scope, _replayed(body, receive), sent)
        except _Refused as error:
            await _refuse(sent, error)
        except _Gone:
            pass
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    def _admit(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.limits.hosts is not None and name not in self.limits.hosts:
            raise _Refused(403, "This server answers by its own names alone; set a token to call it by another.")
        if self.limits.token is not None and scope["path"] not in OPEN:
            kind, _, token = headers.get(b"authorization", "").partition(" ")
            sound = hmac.compare_digest(token.strip().encode(), self.limits.token.encode())
            if kind.lower() != "bearer" or not sound:
                raise _Refused(401, "This server asks for its token; send it as Authorization: Bearer TOKEN.")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > self.limits.body:
            raise self._too_large()
        form = headers.get(b"content-type", "").partition(";")[0].strip()
        if scope["method"] == "POST" and form != "application/json":  # which no page of others may send
            raise _Refused(415, "A request is JSON; send it with Content-Type: application/json.")

    def _too_large(self) -> _Refused:
        return _Refused(413, f"A request has at most {self.limits.body:,} bytes; send fewer rows at a time.")

    async def _body(self, receive: Receive) -> bytes:
        """All of it.

        Raises:
            _Refused: too long, or too slow.
            _Gone: its end will not come.
        """
        parts = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts += message.get("body", b"")
                    if len(parts) > self.limits.body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(parts)
        except TimeoutError:
            raise _Refused(408, f"The request was not whole after {self.limits.body_seconds:g} s.") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, error: _Refused) -> None:
    body = json.dumps(error_body(error.status, str(error))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413):  # what is left of the request is not read
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
