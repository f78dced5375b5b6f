"""What is written is there whole or not at all, and what a killed writer left is taken away by the next one."""

import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scalabl.core.files import require_place, write_text, writing

MACHINE = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
_DIES = """
import os, pathlib, signal, sys
from scalabl.core.files import writing
with writing(pathlib.Path(sys.argv[1])) as unfinished:
    if sys.argv[2] == "directory":
        unfinished.mkdir()
        unfinished /= "inside"
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_next_writer_takes_away_what_a_killed_one_left(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "a.json", tmp_path / ".b.json.elsewhere.1.0123abcd"
    other.write_text("of another file")
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", _DIES, str(target), kind])
        assert ended.returncode == -signal.SIGKILL
    # the second one has taken away the first's
    assert len(list(tmp_path.glob(".a.json.*"))) == 1 and not target.exists()
    with writing(target) as unfinished:
        with writing(target) as second:  # a writer that is alive keeps its own
            second.write_text("second")
        unfinished.write_text("first")
    assert target.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a.json"]


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / f".probe.{MACHINE}.{2**22 + 1}.0123abcd"
    left.touch()
    require_place(tmp_path / "x" / "y")
    assert not list(tmp_path.iterdir())
    write_text(tmp_path / "x.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
