"""The program on rows of text: trained, described, and refused by what scores choices."""

import json
from pathlib import Path

import pytest
from program import Program, train_arguments
from tiny_base import write_jsonl


@pytest.fixture
def text_rows(tmp_path: Path) -> Path:
    """Prompts and completions as JSONL."""
    rows = [{"prompt": f"Question: which word {i}?\nAnswer:", "completion": " red" * (1 + i % 3)} for i in range(12)]
    return write_jsonl(tmp_path / "text.jsonl", rows)


def test_train_says_what_is_trained_on_and_scores_refuse(program: Program, text_rows: Path, tmp_path: Path) -> None:
    run, record = tmp_path / "run", tmp_path / "record.json"
    said = program(*train_arguments(text_rows, run, "--max-length", 16, "--kl-normalization", "sequence",
                                    "--json", record))  # fmt: skip
    assert said.code == 0, said.err
    tokens = json.loads(record.read_text())["tokens"]
    assert f"{tokens['trained']} trained on of {tokens['all']}" in said.out
    assert f"{tokens['cut_rows']} rows longer than 16 lost the beginning" in " ".join(said.out.split())
    answers = tmp_path / "answers.jsonl"
    for command in (
        ("evaluate", run, "--data", text_rows),
        ("predict", run, "--input", text_rows, "--output", answers),
        ("acquire", text_rows, run, "-k", 2, "--output", answers),
    ):
        assert f"has no choices to score; use scalabl generate {run}" in program(*command).sentence()
    assert not answers.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": " b"}, {"messages": []}], "keep to one kind of row"),
        ([{"prompt": "a"}], 'text.jsonl:1: no "completion"'),
        ([{"input": "a"}], "text.jsonl:1: no row that can be trained on"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4,
         "messages need a chat template"),
    ],
)  # fmt: skip
def test_bad_rows_leave_nothing_behind(
    program: Program, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    data, output = write_jsonl(tmp_path / "text.jsonl", rows), tmp_path / "run"
    assert message in program(*train_arguments(data, output)).sentence()
    assert not output.exists()


def test_open_tasks_are_listed(program: Program) -> None:
    assert {"arc-easy", "nq-open", "triviaqa", "sciq"} <= set(program("data", "list").out.split())
