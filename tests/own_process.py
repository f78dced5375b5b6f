"""Processes of a test's own that do not import torch again: forks of a server that has imported it once.

What a library says or does while it is imported happens in the server, so a test of that starts Python itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["transformers.trainer", "peft", "scalabl.training.run", "scalabl.predictive.auto"])


class OwnProcess(_SERVER.Process):  # type: ignore[name-defined]
    """`function(*arguments)` in this test's environment and directory; a `subprocess.Popen` in what it answers to.

    Args:
        function: of a module, so that another process can import it; a `SystemExit` is the exit code.
        stdout, stderr: files for what it writes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        stdout: str | Path = os.devnull,
        stderr: str | Path = os.devnull,
    ) -> None:
        place = (dict(os.environ), os.getcwd(), str(stdout), str(stderr))
        super().__init__(target=_in_place, args=(place, function, arguments))
        self.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it."""
        return self.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.exitcode

    def send_signal(self, sign: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, sign)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end.

        Raises:
            TimeoutExpired: it has not ended; it is killed.
        """
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.name), timeout or 0)
        return self.exitcode


def run(function: Callable[..., Any], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Its exit code and what it wrote, once it has ended."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        code = OwnProcess(function, *arguments, stdout=out, stderr=err).wait(600)
        assert code is not None
        return subprocess.CompletedProcess([function.__name__, *arguments], code, out.read_text(), err.read_text())


def ranks(
    function: Callable[..., Any], *arguments: Any, directory: Path, environment: dict[str, str]
) -> list[OwnProcess]:
    """Two processes of a group, as a launcher starts them but for its imports and theirs.

    Args:
        function, arguments: as of `OwnProcess`.
        directory: for what each writes: "rank0 out.txt", "rank0 err.txt" and those of rank 1.
        environment: beside what tells a process its place.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    before, started = dict(os.environ), []
    try:
        os.environ.update(environment | place | {"LOCAL_WORLD_SIZE": "2"})
        for rank in "01":
            os.environ.update({"RANK": rank, "LOCAL_RANK": rank})
            out, err = (directory / f"rank{rank} {stream}.txt" for stream in ("out", "err"))
            started.append(OwnProcess(function, *arguments, stdout=out, stderr=err))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return started


def written(directory: Path, stream: str) -> list[str]:
    """What each of `ranks` wrote to "out" or "err"."""
    return [(directory / f"rank{rank} {stream}.txt").read_text() for rank in "01"]


def program(*arguments: object) -> None:
    """The command line."""
    from scalabl.cli import main

    sys.argv = ["scalabl", *map(str, arguments)]
    main()


def _in_place(place: tuple[dict[str, str], str, str, str], function: Callable[..., Any], arguments: Any) -> None:
    environment, directory, stdout, stderr = place
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    # a shell's background jobs, and what they start, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        stream.flush()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream.fileno())
        os.close(file)
    function(*arguments)
