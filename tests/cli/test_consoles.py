"""Consoles without the characters that are printed, closed, or behind a pipe that nobody reads: no work is lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import Program
from tiny_base import as_json, questions, write_jsonl

from scalabl.cli import main
from scalabl.core.console import plain

Console = Callable[[pytest.MonkeyPatch], Callable[[], bytes]]


def of_encoding(encoding: str) -> Console:
    def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bytes]:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
        return written.getvalue

    return make


def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bytes]:
    monkeypatch.setattr(sys, "stdout", None)
    return lambda: b""


def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bytes]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1, encoding="utf-8"))
    return lambda: b""


CONSOLES = {"cp1252": of_encoding("cp1252"), "ascii": of_encoding("ascii"), "closed": closed, "unread": unread}


@pytest.fixture(params=CONSOLES)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, program: Program) -> Callable[..., bytes]:
    """Runs a command to its end with exit code 0; what it printed."""

    def call(*arguments: object) -> bytes:
        with monkeypatch.context() as patch:
            printed = CONSOLES[request.param](patch)
            patch.setattr(sys, "argv", ["scalabl", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 0
            return printed()

    call.console = request.param  # type: ignore[attr-defined]
    return call


def test_every_file_is_written_whatever_the_console(
    run: Any, rows: Path, scalabl_run: Path, tmp_path: Path, program: Program
) -> None:
    figures, page, layers = tmp_path / "figures.json", tmp_path / "report.html", tmp_path / "layers.json"
    printed = run("evaluate", scalabl_run, "--data", rows, "--samples", 2, "--json", figures, "--report", page)
    assert json.loads(figures.read_text(encoding="utf-8"))["n"] == 20 and "<html" in page.read_text(encoding="utf-8")
    if run.console in ("cp1252", "ascii"):
        table = printed.decode(run.console)
        assert "^" in table and "?" not in table
        assert ("±" if run.console == "cp1252" else "+-") in table
    run("inspect", scalabl_run, "--variance", "--rows", 4, "--json", layers)
    assert json.loads(layers.read_text(encoding="utf-8"))["variance_top"]


def test_chosen_rows_are_the_same_rows_on_any_console(run: Any, scalabl_run: Path, tmp_path: Path) -> None:
    pool = write_jsonl(tmp_path / "pool.jsonl", [as_json(row) | {"id": f"é↑{i}"} for i, row in enumerate(questions(4))])
    printed = run("acquire", pool, scalabl_run, "-k", 3, "--by", "random")
    if run.console in ("cp1252", "ascii"):
        # a file of what was printed can be read by the commands that take rows: it is UTF-8
        chosen = [json.loads(line) for line in printed.decode("utf-8").splitlines()]
        assert len(chosen) == 3 and {row["id"] for row in chosen} < {f"é↑{i}" for i in range(4)}


def test_what_an_encoding_lacks_becomes_plain() -> None:
    assert plain("0.5 ± 0.1 ↑ é – █ 日", "ascii") == "0.5 +- 0.1 ^ e - # ?"
    assert plain("0.5 ± 0.1 ↑ é – █ 日", "cp1252") == "0.5 ± 0.1 ^ é – # ?"


@pytest.mark.parametrize("redirected", [">&-", ">&- 2>&-", "2>&- | true", "| true"])
def test_a_process_ends_without_a_traceback(redirected: str, tmp_path: Path) -> None:
    """A shell's own redirections, on commands that do not load torch."""
    said = tmp_path / "said"
    for arguments, code in (("data list", 0), ("evaluate nowhere --data arc-easy", 2)):
        command = f"{sys.executable} -m scalabl {arguments} {redirected}"
        if "2>&-" not in redirected:
            command = f"{{ {command}; }} 2>{said}"
        made = subprocess.run(["bash", "-o", "pipefail", "-c", command], timeout=120, env=dict(os.environ))
        assert made.returncode == code
        if "2>&-" not in redirected:
            text = said.read_text(encoding="utf-8")
            assert text == "" if code == 0 else text.startswith("scalabl: There is no run") and text.count("\n") == 1
