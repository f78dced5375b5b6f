"""One template for every entry point: announced, kept in the record, and read by what predicts later."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import Program, train_arguments
from tiny_base import tiny_base, tiny_encoder, tiny_tokenizer, write_jsonl

import scalabl
from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.runs.loading import load_run
from scalabl.scoring import Letters

TEMPLATE = "Words: {text}\nColour:"
LABELS = ("no", "red", "yes")


def rows_of(number: int) -> list[dict[str, Any]]:
    return [{"text": f"{LABELS[i % 3]} and {i}", "label": LABELS[i % 3]} for i in range(number)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    write_jsonl(directory / "train.jsonl", rows_of(12))
    write_jsonl(directory / "validation.jsonl", rows_of(6))
    return directory


@pytest.mark.parametrize("scoring", ["letters", "continuation"])
def test_a_template_is_told_kept_and_read_by_all(program: Program, texts: Path, tmp_path: Path, scoring: str) -> None:
    run = tmp_path / "run"
    typed = TEMPLATE.replace("\n", "\\n")  # as a shell hands it on
    said = program(*train_arguments(texts, run, "--scoring", scoring, "--template", typed))
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert f"template: {typed}" in lines
    assert 'first row: "<s>Words: no and 0\\nColour:" answered by " no"' in lines
    record = json.loads((run / "scalabl.json").read_text())
    assert record["recipe"]["template"] == record["scoring"]["template"] == TEMPLATE
    assert f"behind the prompt `{typed}`" in (run / "README.md").read_text()

    write_jsonl(tmp_path / "new.jsonl", [{"text": row["text"]} for row in rows_of(4)])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": TEMPLATE.format(**row)} for row in rows_of(4)])
    expected = None
    for given in ("new", "prompts"):
        answers = tmp_path / f"{given}.answers.jsonl"
        said = program("predict", run, "--input", tmp_path / f"{given}.jsonl", "--output", answers)
        assert said.code == 0, said.err
        found = [json.loads(line)["probs"] for line in answers.read_text().splitlines()]
        probs = [[row[label] for label in LABELS] for row in found]
        expected = probs if expected is None else expected
        np.testing.assert_allclose(probs, expected, atol=1e-5)
    classifier = scalabl.Classifier.from_pretrained(run)
    ways: list[Any] = [
        [row["text"] for row in rows_of(4)],
        rows_of(4),
        [{"prompt": TEMPLATE.format(**row)} for row in rows_of(4)],
        [Example("x", row["text"], LABELS, None) for row in rows_of(4)],
    ]
    for questions in ways:
        np.testing.assert_allclose(classifier(questions).probs, expected, atol=1e-4)
    named = scalabl.Classifier.from_pretrained(run, labels=LABELS)(ways[0])
    np.testing.assert_allclose(named.probs, expected, atol=1e-4)
    other = classifier([{"prompt": row["text"]} for row in rows_of(4)])
    assert np.abs(other.probs - expected).max() > 1e-3
    with pytest.raises(UserError, match="labels are the run's own, in the order no, red, yes; leave them out"):
        scalabl.Classifier.from_pretrained(run, labels=LABELS[::-1])
    with pytest.raises(UserError, match="template is the run's own"):
        scalabl.Classifier.from_pretrained(run, template="{text}:")


def test_other_labels_are_asked_behind_the_runs_own_template(texts: Path, program: Program, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert program(*train_arguments(texts, run, "--template", TEMPLATE, "--scoring", "letters")).code == 0
    other = scalabl.Classifier.from_pretrained(run, labels=["blue", "green"], samples=0)
    assert isinstance(other.scorer.scoring, Letters) and other.scorer.scoring.template.text == TEMPLATE
    text = "no and 1"
    np.testing.assert_allclose(other(text).probs, other([{"prompt": TEMPLATE.format(text=text)}]).probs, atol=1e-6)


def test_a_record_of_an_older_run_means_what_it_meant(texts: Path, program: Program, tmp_path: Path) -> None:
    run, old = tmp_path / "run", tmp_path / "old"
    assert program(*train_arguments(texts, run, "--scoring", "letters")).code == 0
    shutil.copytree(run, old)
    record = json.loads((old / "scalabl.json").read_text())
    assert record["scoring"].pop("template") == "{text}\nLabel:"
    del record["recipe"]["template"]
    record["scoring"]["raw_prompt"] = False
    (old / "scalabl.json").write_text(json.dumps(record))
    scoring: Any = load_run(old).scoring
    assert scoring.template.text == "{text}\nLabel:"
    answers = [scalabl.Classifier.from_pretrained(place)(["red", "no"]).probs for place in (run, old)]
    np.testing.assert_array_equal(*answers)
    said = program(*train_arguments(texts, old, "--scoring", "letters"))  # the same run still
    assert said.code == 0, said.err


def test_a_prompt_may_end_a_line_and_its_label_then_has_no_space() -> None:
    tokenizer = tiny_tokenizer()
    scoring = Letters(tokenizer, labels=("A", "B"), template="{text}\n")
    assert [tokenizer.decode([i]) for i in scoring.label_ids.tolist()] == ["A", "B"]
    scoring.encode(Example("x", "text", ("A", "B"), 0))
    with pytest.raises(UserError, match="does not end in a line's end"):
        scoring.encode(Example("x", "text", ("A", "B"), 0, rendered=True))
    with pytest.raises(UserError, match="ends in white space"):
        Letters(tokenizer, labels=("A", "B")).encode(Example("x", "text\n", ("A", "B"), 0, rendered=True))


def test_heads_rows_of_text_and_other_rows_refuse_it(
    texts: Path, task_directory: Path, program: Program, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        return program(*arguments).sentence()

    out = tmp_path / "run"
    with_template = ("--template", TEMPLATE)
    assert "a classification head reads a text as it is" in refused(
        *train_arguments(texts, out, *with_template, "--scoring", "head")
    )
    encoder = ("train", "--model", tiny_encoder(), "--data", texts, "--output", out, "--steps", 2, *with_template)
    assert "a classification head reads a text as it is" in refused(*encoder)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i}:", "completion": " red"} for i in range(9)])
    assert "has rows of text; leave it out" in refused(*train_arguments(pairs, out, *with_template))
    assert '"choices" of their own and no {text}' in refused(*train_arguments(task_directory, out, *with_template))
    assert "without the {choices} that letters stand for" in refused(
        *train_arguments(task_directory, out, "--template", "{question}:", "--scoring", "letters")
    )
    assert not out.exists() and tiny_base().is_dir()
