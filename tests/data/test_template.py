"""How a row becomes a prompt, and rows that are prompts already."""

from pathlib import Path

import pytest
from tiny_base import write_jsonl

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.data.jsonl import load_jsonl_task, load_rows
from scalabl.data.template import AS_IT_IS, Template, template_of_prompts
from scalabl.runs.settings import Settings

TEXT_ROW = Example("t", "a {brace}", ("yes", "no"), 0)
QUESTION = Example("q", "Which?", ("red", "blue"), 1)


def test_fields_are_filled_and_braces_of_its_own_are_written_twice() -> None:
    assert Template("Tweet: {text}\n{{x}}:").render(TEXT_ROW) == "Tweet: a {brace}\n{x}:"
    assert Template("{question}\n{choices}\n=>").render(QUESTION) == "Which?\nA. red\nB. blue\n=>"
    assert Template("no {text}").render(Example("p", "as it is", ("yes", "no"), 0, rendered=True)) == "as it is"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{text", "whose braces do not match"),
        ("{text}}", "whose braces do not match"),
        ("{text} {label}", r"{label} is no field of a row; there are {text} of rows"),
        ("{text.__class__}", r"{text.__class__} is no field of a row"),
        ("{text!r}", "is no field of a row"),
        ("{text:>9}", "is no field of a row"),
        ("{}", r"{} is no field of a row"),
        ("Label:", "which no row would change"),
        ("{choices}", "which no row would change"),
        ("{text}\nLabel: ", "take the one at the end away"),
    ],
)
def test_what_is_no_template_is_refused_with_the_settings(template: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Settings.flat(template=template)


def test_fields_of_the_other_kind_of_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r'a text and its "label" and no {question}; use {text}'):
        Template("{question}:").require_kind(shared=True)
    with pytest.raises(UserError, match=r'"choices" of their own and no {text}; use {question} and {choices}'):
        Template("{text}:").require_kind(shared=False)


def test_rows_of_prompts_have_their_completions_for_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tweet: {i}\nSentiment:", "completion": (" bad", " good")[i % 2], "id": i} for i in range(4)]
    task = load_jsonl_task(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert task.labels == ("bad", "good")
    assert [(row.id, row.answer, row.rendered) for row in task.split("train")[:2]] == [("0", 0, True), ("1", 1, True)]
    assert task.split("train")[0].question == "Tweet: 0\nSentiment:"
    assert task.split("train")[0].content != Example("x", "Tweet: 0\nSentiment:", ("bad", "good"), 0).content
    unlabelled = load_rows(
        write_jsonl(tmp_path / "new.jsonl", [{"prompt": "Tweet\nSentiment:"}]), ("bad", "good"), False
    )
    assert unlabelled[0].rendered and unlabelled[0].answer is None


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "a"}], 'no "completion"; every row needs prompt, completion'),
        ([{"prompt": "a", "completion": " b", "lable": 1}], "unknown key 'lable'"),
        ([{"prompt": [{"role": "user"}], "completion": [{}]}], "is a list of messages, which is not scored here"),
        ([{"prompt": "a", "completion": " b"}, {"text": "a", "label": "b"}], 'rows with "prompt" and rows without'),
        (
            [{"prompt": f"{i}", "completion": f" {i}"} for i in range(60)],
            "60 different completions in 60 rows",
        ),
    ],
)
def test_prompts_that_cannot_be_scored_are_refused(
    tmp_path: Path, rows: list[dict[str, object]], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_jsonl_task(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_the_template_of_prompts_ends_as_they_do() -> None:
    row = Example("p", "Tweet:", ("yes", "no"), 0, rendered=True)
    assert template_of_prompts([row]) == AS_IT_IS
    assert template_of_prompts([Example("p", "### Label:\n", ("yes", "no"), 0, rendered=True)]) == AS_IT_IS + "\n"
