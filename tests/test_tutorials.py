"""Every block of the tutorials is run as it stands, on tiny models and rows and for a few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from program import Program
from tiny_base import as_json, questions, tiny_base, tiny_encoder, write_jsonl, write_texts

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "tutorials").glob("*.md"))]


def stand_ins() -> dict[str, str]:
    """What a page says -> what is run in its place: the size of models and runs, and nothing else."""
    return {
        "sentence-transformers/all-MiniLM-L6-v2": str(tiny_encoder()),
        "--model minilm-l6": f"--model {tiny_encoder()}",
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tiny_base("llama", chat=True)),
        "Qwen/Qwen2.5-7B-Instruct": str(tiny_base("qwen2")),
        "--bits 4": "",
        "--rank 8": "--rank 4",
        "last:3": "last:2",
        "--steps 240": "--steps 12",
        "--steps 200": "--steps 4",
        "max_steps=240": "max_steps=12",
        "max_steps=200": "max_steps=2",
        "-k 50": "-k 5",
    }


def rows_in(directory: Path) -> None:
    (directory / "tickets").mkdir()
    write_texts(directory / "tickets", train=60, validation=30, test=12)
    write_texts(directory, train=240, validation=30, test=12)
    (directory / "train.jsonl").rename(directory / "tickets.jsonl")
    (directory / "validation.jsonl").rename(directory / "deployed.jsonl")
    for name in ("new", "pool"):
        write_jsonl(directory / f"{name}.jsonl", [{"id": str(i), "text": f"red bee {i}"} for i in range(8)])
    write_jsonl(directory / "strangers.jsonl", [{"text": f"wide open stone {i}"} for i in range(8)])
    answers = [{"prompt": f"red or blue {i}?", "completion": " red"} for i in range(16)]
    write_jsonl(directory / "answers.jsonl", answers)
    write_jsonl(directory / "questions.jsonl", map(as_json, questions(40)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    if page.stem == "trl":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    rows_in(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert any(kind in ("console", "python") for kind, _ in blocks)
    for said, run in stand_ins().items():
        blocks = [(kind, block.replace(said, run)) for kind, block in blocks]
    names: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, page.name, "exec"), names)
        elif kind == "console":
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("scalabl "):
                    made = program(*shlex.split(line)[1:])
                    assert made.code == 0, (line, made.err)
                else:
                    assert line.startswith("pip install "), line


def test_no_block_is_overlooked() -> None:
    """What is fenced on a tutorial's page is run, or data."""
    for page in PAGES:
        kinds = set(re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert kinds <= {"console", "python", "json", ""}, page
