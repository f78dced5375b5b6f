"""JSON over HTTP with the standard library: one kept connection a thread, time-outs, and retries that are safe.

Only requests that may be repeated are sent through it: asking for probabilities changes nothing on a server.
"""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

from scalabl.core.errors import UserError

_BUSY = (429, 502, 503, 504)
_FIRST_PAUSE = 0.2  # seconds; doubles with every try


class HTTPError(Exception):
    """The server's own refusal: its status and what it says."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class JSONClient:
    """Requests to one server, from any number of threads.

    Args:
        url: http://HOST:PORT or https://..., with a path in front of all others if there is one.
        timeout: seconds that a connection, and each wait for data, may take.
        retries: how often a request is sent again after a lost connection, a time-out or a busy server.
        api_key: sent as a bearer token; None sends none.

    Raises:
        UserError: the address is none, or a number is out of range.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 3, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{url} is no address ({error}); give one like http://127.0.0.1:8000.") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise UserError(f"{url} is no address of a server; give one like http://127.0.0.1:8000.")
        if not timeout > 0 or retries < 0:
            raise UserError(f"timeout is {timeout} and retries {retries}; they must be above 0, and 0 or more.")
        self.url = url
        self._secure, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self._timeout, self._retries = timeout, retries
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._local = threading.local()

    def get(self, path: str) -> Any:
        """The JSON at a path; raises as `post`."""
        return self._request("GET", path, None, threading.Event())

    def post(self, path: str, content: Any, stop: threading.Event | None = None) -> Any:
        """The JSON that answers some JSON.

        Args:
            path: behind the address.
            content: the question.
            stop: once it is set, nothing is sent again.

        Raises:
            HTTPError: the server refused the request itself.
            UserError: there is no server, it did not answer in time, it stayed busy, or it answered no JSON.
        """
        return self._request("POST", path, json.dumps(content).encode(), stop or threading.Event())

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _request(self, method: str, path: str, body: bytes | None, stop: threading.Event) -> Any:
        pause, why = _FIRST_PAUSE, ""
        for attempt in range(self._retries + 1):
            if attempt:
                if stop.wait(pause):
                    break
                pause *= 2
            try:
                status, answer = self._once(method, path, body)
            except TimeoutError:
                why = f"did not answer within {self._timeout:g} s; raise timeout or lower concurrency"
            except (OSError, http.client.HTTPException) as error:
                why = f"cannot be reached ({error or type(error).__name__}); start it or mend the address"
            else:
                if status not in _BUSY:
                    return self._content(status, answer)
                why = f"is busy (status {status}); try later or lower concurrency"
            self.close()
        tries = f" (tried {self._retries + 1} times)" if self._retries else ""
        raise UserError(f"The server at {self.url} {why}{tries}.")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = kind(self._host or "", self._port, timeout=self._timeout)
            self._local.connection = connection
        connection.request(method, self._path + path, body=body, headers=self._headers)
        response = connection.getresponse()
        return response.status, response.read()

    def _content(self, status: int, answer: bytes) -> Any:
        try:
            content = json.loads(answer)
        except ValueError as error:
            if status != 200:
                raise HTTPError(status, answer[:200].decode(errors="replace")) from error
            raise UserError(f"The server at {self.url} answers something else than JSON; is it vLLM's?") from error
        if status == 200:
            return content
        raise HTTPError(status, _message(content))


def _message(content: Any) -> str:
    """What an OpenAI-compatible server says of an error: {"error": {"message": ...}} or older forms of it."""
    inner = content.get("error", content) if isinstance(content, dict) else content
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:500]
