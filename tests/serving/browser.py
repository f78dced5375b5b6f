"""Headless Chromium, spoken with over the two pipes of its debugging protocol: a page, its keyboard and its text."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
KEYS = {"Tab": 9, "Enter": 13, "ArrowDown": 40, " ": 32}


class Page:
    """One page of a browser.

    Args:
        into: where commands are written.
        out: where answers are read.
    """

    def __init__(self, into: int, out: int) -> None:
        self.into, self.out = into, out
        self.left, self.number = b"", 0
        self.session: str | None = None
        self.errors: list[str] = []  # of the console
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Log.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command's result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": given}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.errors.append(json.dumps(said["params"]))
            if said.get("id") == self.number:
                assert "error" not in said, said
                found: dict[str, Any] = said["result"]
                return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            part = os.read(self.out, 1 << 16)
            assert part, "the browser has ended"
            self.left += part
        one, _, self.left = self.left.partition(b"\0")
        said: dict[str, Any] = json.loads(one)
        return said

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What an expression of the page's is."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true."""
        ends = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < ends, (script, self.value("document.body.innerText"), self.errors)
            time.sleep(0.05)
        return found

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Press a key."""
        code = KEYS[key]
        text = {"text": "\r"} if key == "Enter" and not ctrl else {"text": " "} if key == " " else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser of its own, which ends with the context."""
    assert CHROMIUM is not None
    to_read, into = os.pipe()
    out, to_write = os.pipe()

    def place() -> None:  # the protocol's pipes are 3 and 4
        first, second = os.dup(to_read), os.dup(to_write)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,1200",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        made = subprocess.Popen(command, preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(into, out)
        finally:
            made.terminate()
            made.wait(30)
            os.close(into)
            os.close(out)
