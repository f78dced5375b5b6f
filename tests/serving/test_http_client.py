"""The client of a server that nobody knows: its key stays its own, and no answer lasts for ever."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scalabl.core.errors import UserError
from scalabl.serving.http import HTTPError, JSONClient

KEY, PASSWORD = "sk-very-secret", "pass-word"


@contextmanager
def serving(answer: bytes, *, status: int = 200, pause: float = 0.0) -> Iterator[str]:
    """The host and port of a server that answers everything alike, byte by byte where it pauses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            for part in [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]:
                try:
                    self.wfile.write(part)
                except OSError:
                    return
                time.sleep(pause)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_server_that_repeats_the_key_is_quoted_without_it(as_json: bool) -> None:
    words = f"wrong key {KEY} of me:{PASSWORD}"
    answer = json.dumps({"error": {"message": words}}) if as_json else words
    with serving(answer.encode(), status=401) as address:
        client = JSONClient(f"http://me:{PASSWORD}@{address}", api_key=KEY, retries=0)
        with pytest.raises(HTTPError) as caught:
            client.get("/v1/models")
    assert str(caught.value) == "wrong key *** of me:***"
    assert client.url == f"http://***@{address}"


@pytest.mark.parametrize("rest", ["127.0.0.1:1", "127.0.0.1:port", ""])
def test_an_address_is_quoted_without_its_login(rest: str) -> None:
    with pytest.raises(UserError) as caught:
        JSONClient(f"http://me:{PASSWORD}@{rest}", retries=0).get("/")
    assert f"http://***@{rest}" in str(caught.value)
    assert PASSWORD not in str(caught.value) and "me" not in str(caught.value).split("//")[1].split("@")[0]


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f"é{KEY}"])
def test_a_key_that_no_header_holds_is_refused_unquoted(key: str) -> None:
    with pytest.raises(UserError, match="The key has a character that no header can hold") as caught:
        JSONClient("http://127.0.0.1:1", api_key=key)
    assert "secret" not in str(caught.value)


def test_an_answer_that_trickles_ends() -> None:
    with serving(b" " * 1000, pause=0.05) as address:
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"did not answer within 0\.4 s"):
            JSONClient(f"http://{address}", timeout=0.4, retries=0).get("/")
        assert time.monotonic() - begin < 3
