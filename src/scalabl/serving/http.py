"""JSON over HTTP by httpx: kept connections, time-outs, a bound on answers, and retries that are safe.

Only requests that may be repeated are sent through it: asking for probabilities changes nothing on a server.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from typing import Any

import httpx

from scalabl.core.errors import UserError, first_line

_BUSY = (429, 502, 503, 504)
_FIRST_PAUSE = 0.2  # seconds; doubles with every try
_LOGIN = re.compile(r"//[^/]*@")
MAX_BYTES = 1 << 28  # of an answer: the whole vocabulary's log-probabilities of a prompt's next token are some 20 MB


class HTTPError(Exception):
    """The server's own refusal: its status and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class JSONClient:
    """Requests to one server, from any number of threads.

    Args:
        url: http://HOST:PORT or https://..., with a path in front of all others if there is one.
        timeout: seconds that a connection, each wait for data, and an answer from its first byte to its last may take.
        retries: how often a request is sent again after a lost connection, a time-out or a busy server.
        api_key: sent as a bearer token; None sends none.

    Raises:
        UserError: the address is none, a number is out of range, or the key is none that a header can hold.

    No sentence shows the key, or the user and the password of an address.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 3, api_key: str | None = None) -> None:
        self.url = _LOGIN.sub("//***@", url)
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            raise UserError(f"{self.url} is no address; give one like http://127.0.0.1:8000.") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"{self.url} is no address of a server; give one like http://127.0.0.1:8000.")
        if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
            raise UserError(
                "The key has a character that no header can hold, perhaps the end of a line; give it alone."
            )
        if not timeout > 0 or retries < 0:
            raise UserError(f"timeout is {timeout} and retries {retries}; they must be above 0, and 0 or more.")
        self._timeout, self._retries = timeout, retries
        self._secrets = [secret for secret in (api_key, parts.password) if secret]
        # the address is the server's own: no proxy of the environment stands between, as many connections as threads
        self._client = httpx.Client(
            base_url=parts,
            headers={"Accept": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
            trust_env=False,
        )

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
            UserError: there is no server, it did not answer in time, it stayed busy, it answered no JSON or too much.
        """
        return self._request("POST", path, content, stop or threading.Event())

    def _request(self, method: str, path: str, content: Any, stop: threading.Event) -> Any:
        pause, why = _FIRST_PAUSE, ""
        for attempt in range(self._retries + 1):
            if attempt:
                if stop.wait(pause):
                    break
                pause *= 2
            try:
                status, answer = self._once(method, path, content)
            except httpx.TimeoutException:
                why = f"did not answer within {self._timeout:g} s; raise timeout or lower concurrency"
            except httpx.RequestError as error:
                why = f"cannot be reached ({self._hidden(first_line(error))}); start it or mend the address"
            else:
                if status not in _BUSY:
                    return self._content(status, answer)
                why = f"is busy (status {status}); try later or lower concurrency"
        tries = f" (tried {self._retries + 1} times)" if self._retries else ""
        raise UserError(f"The server at {self.url} {why}{tries}.")

    def _once(self, method: str, path: str, content: Any) -> tuple[int, bytes]:
        found, end = bytearray(), time.monotonic() + self._timeout
        with self._client.stream(method, path, json=content) as response:
            for part in response.iter_bytes():
                found += part
                if len(found) > MAX_BYTES:
                    raise UserError(f"The server at {self.url} answers more than {MAX_BYTES >> 20} MiB; is it vLLM's?")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("an answer without an end")
        return response.status_code, bytes(found)

    def _content(self, status: int, answer: bytes) -> Any:
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            if status != 200:
                raise HTTPError(status, self._hidden(answer[:1000].decode(errors="replace"))[:200]) from error
            raise UserError(f"The server at {self.url} answers something else than JSON; is it vLLM's?") from error
        if status == 200:
            return content
        raise HTTPError(status, self._hidden(_message(content))[:500])

    def _hidden(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _message(content: Any) -> str:
    """An OpenAI-compatible server's words on an error: {"error": {"message": ...}} or older forms of it."""
    inner = content.get("error", content) if isinstance(content, dict) else content
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
