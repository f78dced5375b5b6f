"""Rows of text to train a language model on: ``{"prompt", "completion"}`` or ``{"messages"}``, TRL's formats.

Prompt and completion are texts, or lists of messages ``{"role", "content"}``. Texts are kept as they are, blanks
included: they are what the tokens are made of. Either kind may carry an ``"id"``; one file holds one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import Splits
from scalabl.data.fields import require_keys, row_id, unstripped_text
from scalabl.data.records import Ids, name_of, rows_in, split_files

PAIR, CONVERSATION = ("prompt", "completion"), ("messages",)
FORMS = '{"prompt", "completion"} or {"messages"}'
ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content}


Words = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextRow:
    """What a language model is trained on.

    Attributes:
        id: name of the row, unique within a split.
        prompt: what is given and not trained on, a text or messages; none for a whole conversation.
        completion: what is trained on: the text, or the assistant's turns of the messages.
    """

    id: str
    prompt: Words
    completion: Words

    @property
    def content(self) -> tuple[Any, ...]:
        """What the row says, without its name."""
        return tuple(
            words if isinstance(words, str) else [[message.role, message.content] for message in words]
            for words in (self.prompt, self.completion)
        )

    @property
    def labelled(self) -> tuple[Any, ...]:
        """The same: what is trained on is part of it."""
        return self.content


class TextTask(Splits[TextRow]):
    """Rows of text of one data set."""


def load_text_rows(path: str | Path) -> tuple[TextRow, ...]:
    """Read one JSONL or Parquet file.

    Raises:
        UserError: see :func:`load_text_task`.
    """
    path = Path(path)
    rows: list[TextRow] = []
    ids = Ids()
    first: tuple[str, ...] | None = None
    for where, name, raw in rows_in(path):
        keys = text_keys(raw)
        if keys is None or (first is not None and keys != first):
            raise UserError(f"{where}: not a row of {_form(first)} as those before it; keep to one kind of row.")
        first = keys
        rows.append(_parse(raw, keys, where, name))
        ids.add(rows[-1].id, where)
    return tuple(rows)


def load_text_task(path: str | Path) -> TextTask:
    """Read a user's rows of text: one file, whose rows are the ``"train"`` split, or a directory of them.

    Raises:
        UserError: missing or empty data, a line that is not a JSON object, missing or unknown keys, rows of several
            kinds, a blank text, a conversation without a turn of the assistant.
    """
    path = Path(path)
    splits = {split: load_text_rows(file) for split, file in split_files(path).items()}
    return TextTask(name_of(path), splits, None, str(path), "unknown")


def text_keys(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys of the kind that a row is of, ``PAIR`` or ``CONVERSATION``; None for a row of another kind."""
    if "messages" in raw and not any(key in raw for key in PAIR):
        return CONVERSATION
    if any(key in raw for key in PAIR) and "messages" not in raw:
        return PAIR
    return None


def _form(keys: tuple[str, ...] | None) -> str:
    return FORMS if keys is None else "{" + ", ".join(f'"{key}"' for key in keys) + "}"


def _parse(raw: Mapping[str, Any], keys: tuple[str, ...], where: str, name: str) -> TextRow:
    require_keys(raw, keys, where)
    name = row_id(raw, where, name)
    if keys == CONVERSATION:
        row = TextRow(name, (), _messages(raw["messages"], '"messages"', where))
    else:
        prompt, completion = (
            unstripped_text(raw[key], f'"{key}"', where)
            if isinstance(raw[key], str)
            else _messages(raw[key], f'"{key}"', where)
            for key in PAIR
        )
        if isinstance(prompt, str) != isinstance(completion, str):
            raise UserError(
                f"{where}: a text and messages in one row; write both as texts or both as lists of messages."
            )
        row = TextRow(name, prompt, completion)
    if not isinstance(row.completion, str):
        _check_turns(row, where)
    return row


def _check_turns(row: TextRow, where: str) -> None:
    assert not isinstance(row.prompt, str) and not isinstance(row.completion, str)
    if not any(message.role == ASSISTANT for message in row.completion):
        raise UserError(
            f'{where}: no message of the role "{ASSISTANT}" to train on; write what it should have answered.'
        )
    if (*row.prompt, *row.completion)[0].role == ASSISTANT:
        raise UserError(f"{where}: the conversation begins with the {ASSISTANT}; give what it answers to.")


def _messages(value: Any, what: str, where: str) -> tuple[Message, ...]:
    form = 'write [{"role": "user", "content": "..."}, ...]'
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} is not a list of messages; {form}.")
    return tuple(_message(message, f"message {i} of {what}", where, form) for i, message in enumerate(value))


def _message(value: Any, what: str, where: str, form: str) -> Message:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise UserError(f"{where}: {what} does not have the keys role and content alone; {form}.")
    return Message(
        unstripped_text(value["role"], f"the role of {what}", where), unstripped_text(value["content"], what, where)
    )
