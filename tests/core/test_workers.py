"""Processes side by side: their order, their cores, and how they end."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from scalabl.core.console import _Lines, progress_bar
from scalabl.core.errors import UserError
from scalabl.core.workers import side_by_side, threads_each

# a shell's background jobs, and what they start, ignore SIGINT
SLEEP = (
    "import signal, time; from scalabl.core.workers import side_by_side\n"
    "if __name__ == '__main__':\n"
    "    signal.signal(signal.SIGINT, signal.default_int_handler)\n    "
)


def test_outcomes_are_in_the_order_of_the_parts() -> None:
    assert side_by_side(math.factorial, [5, 3, 4], workers=2) == [120, 6, 24]
    assert side_by_side(math.factorial, [5, 3, 4], workers=1) == [120, 6, 24]


def test_workers_share_the_cores() -> None:
    assert side_by_side(os.getenv, ["OMP_NUM_THREADS"] * 2, workers=2) == [str(threads_each(2))] * 2
    assert threads_each(10**6) == 1


def test_one_worker_is_this_process() -> None:
    assert side_by_side(os.getpgid, [0], workers=4) == [os.getpgid(0)]


def test_what_fails_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        side_by_side(int, ["1", "x", "3"], workers=2)
    with pytest.raises(UserError, match="A worker was killed"):
        side_by_side(os._exit, [1, 1], workers=2)


def _sleeping() -> tuple[subprocess.Popen[str], list[int]]:
    """A command with two workers that sleep for a minute, and their process ids."""
    command = f"{SLEEP}side_by_side(time.sleep, [60, 60], workers=2)"
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True)
    # those that have left for a session of their own have begun
    for _ in range(600):
        found = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _parent(int(entry)) == process.pid]
        begun = [pid for pid in found if os.getsid(pid) == pid]
        if len(begun) == 2:  # at their part, or just before it
            return process, begun
        time.sleep(0.1)
    raise AssertionError("no workers")


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(_parent(pid) is not None for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_command(number: signal.Signals) -> None:
    process, workers = _sleeping()
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert _gone(workers)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in error and process.returncode != 0


def test_a_worker_writes_its_progress_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, whatever reads the tests
    assert not isinstance(progress_bar(), _Lines)
    monkeypatch.setattr("scalabl.core.console._in_lines", True)
    assert isinstance(progress_bar(), _Lines)
