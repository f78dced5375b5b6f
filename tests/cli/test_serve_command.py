"""`scalabl serve`: what it refuses before it loads a model, and a server of its own process from start to end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from program import Program

from scalabl.runs.record import RunRecord


def test_refusals_in_a_sentence(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    for arguments, words in {
        ("missing",): "There is no run directory",
        (tmp_path,): "holds no scalabl.json",
        (scalabl_run, scalabl_run): "Two adapters are called scalabl",
        (f"={scalabl_run}",): "write NAME=DIR",
        (scalabl_run, "--host", "0.0.0.0"): "set a token in the environment (SCALABL_TOKEN), or say --anonymous",
        (scalabl_run, "--host", "192.0.2.7", "--anonymous"): "192.0.2.7:8000 cannot be listened at",
        (scalabl_run, "--confidence", 0.9): "--confidence is of --max-error",
        (scalabl_run, "--abstain", 2): "--abstain is 2",
        (scalabl_run, "--timeout", 0): "--timeout is 0",
        (scalabl_run, "--queue", 255): "--queue is 255, but a request may have 256 rows (--max-rows)",
        (scalabl_run, "--max-tokens", 0): "--max-tokens is 0",
        (scalabl_run, "--max-prompt", 0): "--max-prompt is 0",
        (scalabl_run, "--batch-size", 0): "--batch-size is 0",
    }.items():
        assert words in program("serve", *arguments).sentence(), arguments


def test_options_of_labels_are_refused_where_all_adapters_write_texts(
    program: Program, scalabl_run: Path, tmp_path: Path
) -> None:
    """Numbers out of range too, before the base is loaded."""
    writer = shutil.copytree(scalabl_run, tmp_path / "writer")
    record = RunRecord.read(scalabl_run)
    replace(record, kind="language", scoring={"scoring": "text", "chat": False, "max_length": 64}).write(writer)
    for option in (
        ("--predictive", "mean"), ("--raw",), ("--abstain", 0.5), ("--max-error", 0.1), ("--max-false-alarms", 0.1),
        ("--coverage", 0.9),
    ):  # fmt: skip
        assert f"{option[0]} is for adapters that give labels" in program("serve", writer, *option).sentence()
    assert "--batch-size is 0" in program("serve", writer, "--batch-size", 0).sentence()
    assert "--samples is -1" in program("serve", writer, "--samples", -1).sentence()


def test_a_taken_port_is_refused_before_a_model_is_loaded(program: Program, scalabl_run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at" in program("serve", scalabl_run, "--port", port).sentence()


@pytest.mark.parametrize("token", ["", " ours", "\u00fcber", "a\tb"])
def test_a_token_is_one_that_a_header_can_have(
    program: Program, scalabl_run: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("SCALABL_TOKEN", token)
    assert "SCALABL_TOKEN in the environment is no token" in program("serve", scalabl_run).sentence()


def test_without_the_extra_it_says_what_to_install(
    program: Program, scalabl_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert program("serve", scalabl_run).sentence().endswith('pip install "scalabl[serve]"')


def test_a_process_answers_until_it_is_told_to_end(scalabl_run: Path, mle_run: Path, tmp_path: Path) -> None:
    named = Path(shutil.copytree(mle_run, tmp_path / "of=name"))
    command = [sys.executable, "-P", "-m", "scalabl", "serve", scalabl_run, f"plain={mle_run}", named, "--port", "0"]
    environment = os.environ | {"SCALABL_TOKEN": "ours"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None and made.stderr is not None
        lines = [made.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("scalabl: labels and texts; ScalaBL, N = 10"), lines
        assert lines[1:3] == ["plain: labels and texts; plain LoRA\n", "of=name: labels and texts; plain LoRA\n"]
        url = lines[3].removeprefix("listening at ").strip()
        row = {"question": "which?", "choices": ["red", "blue"]}
        for model in ("scalabl", "plain", "of=name"):
            asked = {"input": row, "model": model}
            said = httpx.post(f"{url}/v1/classify", json=asked, headers={"authorization": "Bearer ours"}, timeout=60)
            assert said.status_code == 200 and said.json()["data"][0]["label"] in ("red", "blue"), said.text
        made.send_signal(signal.SIGTERM)
        assert made.wait(60) == 0 and made.stderr.read() == ""
