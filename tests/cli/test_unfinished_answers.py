"""Answers of `predict` that a call has begun: kept from a second call, and looked at before they are gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import Program, batches_of
from tiny_base import as_json, questions, write_jsonl

_HOLDER = """
import sys
from pathlib import Path
from scalabl.inference.batch_prediction import _open
file = _open(Path(sys.argv[1]), Path("answers.jsonl"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def begun(
    program: Program, scalabl_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Any, ...], Path, Path]:
    """A call that was stopped behind four of nine rows, its unfinished file, and what the whole call writes."""
    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(9)))
    arguments = ("predict", scalabl_run, "--input", rows, "--batch-size", 2, "--samples", 2, "--output")
    assert program(*arguments, tmp_path / "whole.jsonl").code == 0
    with batches_of(monkeypatch, killed_at=3):
        assert program(*arguments, tmp_path / "answers.jsonl").code == 130
    (unfinished,) = tmp_path.glob(".answers.jsonl.*")
    return (*arguments, tmp_path / "answers.jsonl"), unfinished, tmp_path / "whole.jsonl"


def test_a_second_call_does_not_write_into_the_answers_of_the_first(program: Program, begun: Any) -> None:
    arguments, unfinished, whole = begun
    before = unfinished.read_bytes()
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(unfinished)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        said = program(*arguments).sentence()
        assert said.startswith("Another call answers these rows into") and "wait for its end" in said
        assert unfinished.read_bytes() == before and not arguments[-1].exists()
        other.send_signal(signal.SIGKILL)
    finally:
        other.kill()
        other.communicate()
    assert program(*arguments).code == 0  # the lock died with it
    assert arguments[-1].read_bytes() == whole.read_bytes() and not unfinished.exists()


@pytest.mark.parametrize(
    "bad", ["not json", "[]", "{}", '{"id": "nobody", "probs": {}}', "[" * 5000, "swapped", "more"]
)
def test_lines_that_are_no_answers_of_these_rows_are_answered_anew(
    program: Program, begun: Any, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, unfinished, whole = begun
    lines = unfinished.read_text(encoding="utf-8").splitlines()
    if bad == "swapped":
        lines[2], lines[3] = lines[3], lines[2]
    elif bad == "more":
        lines = lines[:2] + ["not json"] * 20
    else:
        lines[2] = bad
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with batches_of(monkeypatch) as calls:
        assert program(*arguments).code == 0
    assert calls == [2, 2, 2, 1]  # the first batch stands
    assert arguments[-1].read_bytes() == whole.read_bytes()
    assert [json.loads(line)["id"] for line in whole.read_text(encoding="utf-8").splitlines()] == [
        row.id for row in questions(9)
    ]


def test_answers_are_not_written_through_a_link(program: Program, begun: Any, tmp_path: Path) -> None:
    arguments, unfinished, _ = begun
    (tmp_path / "mine").write_text("mine")
    unfinished.unlink()
    os.symlink(tmp_path / "mine", unfinished)
    assert "is a link; remove it" in program(*arguments).sentence()
    assert (tmp_path / "mine").read_text() == "mine" and not arguments[-1].exists()
