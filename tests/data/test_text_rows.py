"""Rows of text as files: what is read, what is refused and where, and how they are told from other rows."""

from pathlib import Path
from typing import Any

import pytest
from tiny_base import write_jsonl

from scalabl.core.errors import UserError
from scalabl.data import Message, OpenTask, Task, TextRow, TextTask, load_open_task, load_training_task
from scalabl.data.assemble import holdout

PAIR = {"prompt": "Question: a?\nAnswer:", "completion": " red"}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
PAIR_OF_CHATS = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
OPEN = {"question": "Which colour?", "answers": ["red", " red ", "crimson"]}
CHOICES = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}


def test_texts_are_kept_with_their_blanks(tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "  a:\n", "completion": " red\n"}
    task = load_training_task(str(write_jsonl(tmp_path / "rows.jsonl", [row, PAIR])))
    assert isinstance(task, TextTask)
    assert task.split("train") == (
        TextRow("7", "  a:\n", " red\n"),
        TextRow("rows:2", PAIR["prompt"], PAIR["completion"]),
    )


def test_messages_are_a_prompt_and_a_completion_or_a_whole_conversation(tmp_path: Path) -> None:
    user, assistant = Message("user", "hello"), Message("assistant", "good day")
    pair = load_training_task(str(write_jsonl(tmp_path / "pair.jsonl", [PAIR_OF_CHATS])))
    whole = load_training_task(str(write_jsonl(tmp_path / "chat.jsonl", [CHAT])))
    assert pair.split("train") == (TextRow("pair:1", (user,), (assistant,)),)
    assert whole.split("train") == (TextRow("chat:1", (), (user, assistant)),)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [([PAIR], TextTask), ([CHAT], TextTask), ([OPEN], TextTask), ([CHOICES], Task),
     ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], Task)],
)  # fmt: skip
def test_the_keys_tell_what_a_file_holds(tmp_path: Path, rows: list[dict[str, Any]], kind: type) -> None:
    directory = tmp_path / "data"
    write_jsonl(directory / "train.jsonl", rows)
    write_jsonl(directory / "test.jsonl", rows)
    task = load_training_task(str(directory))
    assert type(task) is kind and set(task.splits) == {"train", "test"} and task.name == "data"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (CHAT, "keep to one kind of row"),
        (CHOICES, "keep to one kind of row"),
        ({"messages": [], **PAIR}, "keep to one kind of row"),
        ({"prompt": "a"}, 'no "completion"'),
        (PAIR | {"answer": "x"}, "unknown key 'answer'"),
        (PAIR | {"completion": " "}, '"completion" is blank'),
        (PAIR | {"completion": "\ud800"}, "lone surrogate"),
        (PAIR | {"prompt": 3}, '"prompt" is not a list of messages'),
        (PAIR | {"prompt": CHAT["messages"]}, "a text and messages in one row"),
        (PAIR_OF_CHATS | {"completion": CHAT["messages"][:1]}, 'no message of the role "assistant"'),
        (PAIR_OF_CHATS | {"prompt": CHAT["messages"][1:]}, "begins with the assistant"),
        (PAIR_OF_CHATS | {"prompt": [{"role": "user"}]}, "keys role and content alone"),
        (PAIR_OF_CHATS | {"prompt": [{"role": "user", "content": ""}]}, "is blank"),
        (PAIR | {"id": "rows:1"}, "the id 'rows:1' is also that of"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [PAIR_OF_CHATS if "prompt" in bad and isinstance(bad["prompt"], list) else PAIR, bad])
    with pytest.raises(UserError) as refusal:
        load_training_task(str(path))
    assert said in str(refusal.value) and str(refusal.value).startswith(f"{path}:2: ")


def test_a_first_row_of_no_known_kind_names_all_of_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match=r'rows.jsonl:1: .*"prompt", "completion".*"messages".*"answers".*"choices"'):
        load_training_task(str(path))
    mixed = write_jsonl(tmp_path / "choices.jsonl", [CHOICES, PAIR])
    with pytest.raises(UserError, match="choices.jsonl:2: "):
        load_training_task(str(mixed))


def test_a_held_out_part_does_not_depend_on_names_or_order(tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": f"Question: {i}?"} for i in range(20)]
    forth = load_training_task(str(write_jsonl(tmp_path / "forth.jsonl", rows))).split("train")
    back = load_training_task(str(write_jsonl(tmp_path / "back.jsonl", rows[::-1]))).split("train")
    held = [{row.prompt for row in holdout(part, 0.3)[1]} for part in (forth, back)]
    assert held[0] == held[1] and len(held[0]) == 6


def test_open_questions_become_prompts_with_their_first_answer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [OPEN, {"id": "x", "question": "Why?", "answers": ["because"]}])
    task = load_open_task(str(path))
    assert isinstance(task, OpenTask)
    assert [row.answers for row in task.split("train")] == [("red", "crimson"), ("because",)]
    assert load_training_task(str(path)).split("train")[0] == TextRow(
        "own:1", "Question: Which colour?\nAnswer:", " red"
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"question": "a?"}, 'no "answers"'),
        ({"question": "a?", "answers": []}, "not a list of texts"),
        ({"question": "a?", "answers": "red"}, "not a list of texts"),
        ({"question": "a?", "answers": ["red", " "]}, "answer 1 is blank"),
        ({"question": " ", "answers": ["red"]}, '"question" is blank'),
        ({"question": "a?", "answers": ["red"], "choices": []}, "unknown key 'choices'"),
        ({"id": "own:1", "question": "a?", "answers": ["red"]}, "is also that of"),
    ],
)
def test_a_bad_open_question_is_refused_with_file_and_line(tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [OPEN, bad])
    with pytest.raises(UserError) as refusal:
        load_training_task(str(path))
    assert said in str(refusal.value) and str(refusal.value).startswith(f"{path}:2: ")
