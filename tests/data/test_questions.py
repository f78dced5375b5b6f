"""Questions that Python gives are read as a file's rows are."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalabl.core.errors import UserError
from scalabl.data import Example, load_rows
from scalabl.data.questions import rows_of

LABELS = ("no", "yes")


@pytest.mark.parametrize(
    ("raw", "labels"),
    [
        ({"text": "  is it wet?\n"}, LABELS),
        ({"text": " a ", "text_pair": " b ", "id": 7, "score": 0.1}, LABELS),
        ({"prompt": " is it wet? "}, LABELS),
        ({"question": " which? ", "choices": [" fire ", "water"], "answer": "water"}, None),
    ],
)
def test_a_mapping_is_the_row_that_a_file_has(
    raw: dict[str, Any], labels: tuple[str, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"id": "0"} | raw) + "\n", "utf-8")
    (row,) = load_rows(path, labels, require_answer=False)
    (found,) = rows_of([raw], labels)
    assert (found.id, found.content, found.target) == (row.id, row.content, None)
    assert rows_of({key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}, labels) == [found]


def test_texts_are_stripped_unless_they_are_prompts() -> None:
    assert rows_of(" a ", LABELS) == rows_of({"question": " a "}, LABELS) == [Example("0", "a", LABELS, None)]
    many = tuple(map(str, range(30)))  # more than a question may have
    assert rows_of({"question": "a", "choices": many[::-1], "answer": "3"}, many) == [Example("0", "a", many, None)]
    whole = [Example("0", " a ", LABELS, None, rendered=True)]
    assert rows_of(" a ", LABELS, prompts=True) == rows_of({"question": " a "}, LABELS, prompts=True) == whole


@pytest.mark.parametrize(
    ("raw", "labels", "said"),
    [
        ({"text": "a", "question": "b"}, LABELS, 'question 0: "text" and "question" in one row'),
        ({"prompt": "a", "question": "b"}, LABELS, "question 0: unknown key 'prompt'"),
        ({"text": "a", "choices": ["no", "yes"]}, LABELS, "question 0: unknown key 'choices'"),
        ({"text": "a", "txet_pair": "b"}, LABELS, 'did you mean "text_pair"'),
        ({"question": "a", "choices": ["no", "maybe"]}, LABELS, "Question 0 has choices of its own"),
        ({"text": "a"}, None, "question 0: a text row, but there are no labels"),
    ],
)
def test_what_a_file_may_not_have_is_refused(raw: dict[str, Any], labels: tuple[str, ...] | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rows_of([raw], labels)
