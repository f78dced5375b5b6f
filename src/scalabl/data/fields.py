"""The fields of one row, each read strictly: what could be meant in two ways is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import KEY, LETTERS, first_duplicate
from scalabl.data.records import LONGEST

_QUESTION_KEYS = ("question", "choices", "answer")
_TEXT_KEYS = ("text", "label")
SEVERAL = "labels"  # of a text row: all that it has, in the place of its one label
PAIR = "text_pair"  # of a text row: its second text
PROMPT, COMPLETION = "prompt", "completion"  # of a row that is a prompt already: itself, and its label
_IGNORED = ("score",)  # what `scalabl acquire` adds to a row


def is_text_row(raw: dict[str, Any], where: str) -> bool:
    """Whether the row is ``{"text", "label"}`` (True) or ``{"question", "choices", "answer"}`` (False)."""
    text, question = "text" in raw, "question" in raw
    forms = '{"question", "choices", "answer"} or {"text", "label"}'
    if text and question:
        raise UserError(f'{where}: "text" and "question" in one row; write {forms}.')
    if not text and not question:
        raise UserError(f'{where}: no "question" and no "text"; write {forms}.')
    return text


def check_keys(raw: dict[str, Any], where: str, text_row: bool, require_answer: bool) -> None:
    """Refuse missing and unknown keys; the last key of a kind is its answer."""
    keys = _TEXT_KEYS if text_row else _QUESTION_KEYS
    if text_row and SEVERAL in raw:
        if "label" in raw:
            raise UserError(f'{where}: "label" and "{SEVERAL}" in one row; write one of them.')
        keys = ("text", SEVERAL)
    known = (*keys, PAIR) if text_row else keys
    for key in raw:
        if key not in (*known, *_IGNORED, KEY, "id"):
            close = difflib.get_close_matches(key, [k for k in known if k not in raw], n=1)
            mend = f'did you mean "{close[0]}"?' if close else f"leave it out; a row has {', '.join(keys)} and id."
            raise UserError(f"{where}: unknown key {key!r}; {mend}")
    for key in keys if require_answer else keys[:-1]:
        if key not in raw:
            raise UserError(f'{where}: no "{key}"; every row needs {", ".join(keys)}.')


def is_prompt_row(raw: Mapping[str, Any]) -> bool:
    """Whether a row to be scored is a prompt already, ``{"prompt", "completion"}``, which goes through no template."""
    return PROMPT in raw and not {"text", "question"} & raw.keys()


def check_prompt_keys(raw: Mapping[str, Any], where: str, require_answer: bool) -> None:
    """Refuse unknown keys of such a row, and one without a completion where it needs one."""
    for key in raw:
        if key not in (PROMPT, COMPLETION, *_IGNORED, "id"):
            raise UserError(f"{where}: unknown key {key!r}; leave it out, a row has {PROMPT}, {COMPLETION} and id.")
    if require_answer and COMPLETION not in raw:
        raise UserError(f'{where}: no "{COMPLETION}"; every row needs {PROMPT}, {COMPLETION}.')


def require_keys(raw: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a row that lacks one of the keys, or has others beside them and its id."""
    for key in raw:
        if key not in (*keys, "id"):
            raise UserError(f"{where}: unknown key {key!r}; leave it out, a row has {', '.join(keys)} and id.")
    for key in keys:
        if key not in raw:
            raise UserError(f'{where}: no "{key}"; every row needs {", ".join(keys)}.')


def text_of(raw: Mapping[str, Any], key: str, where: str) -> str:
    """The text of one key, stripped; blank or not a text: refused."""
    return _text(raw[key], f'"{key}"', where)


def row_id(raw: Mapping[str, Any], where: str, name: str) -> str:
    """The row's own id, else `name`; a whole number is a fair id, everything else has to be a text."""
    if "id" not in raw:
        return name
    return str(raw["id"]) if type(raw["id"]) is int else _text(raw["id"], '"id"', where)


def label_of(raw: dict[str, Any], where: str) -> str:
    """The label word of a text row."""
    if raw["label"] is None:
        raise UserError(f"{where}: the label is null; give the row its label.")
    return text_of(raw, "label", where)


def several_of(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """The labels of a text row that may have several, or none."""
    labels = raw[SEVERAL]
    if not isinstance(labels, list):
        raise UserError(
            f'{where}: "{SEVERAL}" is {_kind(labels)}, not a list; write ["first", "second"], or [] for none.'
        )
    found = tuple(_text(label, f"label {i}", where) for i, label in enumerate(labels))
    twice = first_duplicate(found)
    if twice is not None:
        raise UserError(f"{where}: the label {twice!r} is there twice; name each label of a row once.")
    return found


def choices_of(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """The choices of a question row as stripped texts."""
    choices = raw["choices"]
    if not isinstance(choices, list):
        raise UserError(f'{where}: "choices" is not a list; write ["first", "second"].')
    return tuple(_text(choice, f"choice {i}", where) for i, choice in enumerate(choices))


def answer_index(answer: Any, choices: tuple[str, ...], where: str) -> int:
    """Index of the right choice, given as its text, its letter ("A" is the first) or its 0-based index (a number).

    A text that is a choice means that choice, also where it looks like a number. Refused: a letter that is
    the text of one choice and the letter of another, and a number that is the index of one and the text of another.
    """
    last = len(choices) - 1
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise UserError(f"{where}: the answer is {_kind(answer)}; write the choice's text, its letter or its index.")
    if isinstance(answer, int):
        if not 0 <= answer <= last:
            raise UserError(f"{where}: the answer {answer} is outside the choices; use an index from 0 to {last}.")
        if str(answer) in choices and choices.index(str(answer)) != answer:
            raise UserError(
                f"{where}: the answer {answer} is the index of {choices[answer]!r} and the text of another choice; "
                f'write the letter, or "{answer}" in quotes for the text.'
            )
        return answer
    answer = answer.strip()
    letter = LETTERS.find(answer) if len(answer) == 1 else -1
    if answer in choices:
        index = choices.index(answer)
        if 0 <= letter <= last and letter != index:
            raise UserError(
                f"{where}: the answer {answer!r} is the text of choice {index} and the letter of choice {letter}; "
                "write the index as a number."
            )
        return index
    if 0 <= letter <= last:
        return letter
    hint = " (an index is a number without quotes)" if answer.isdigit() else ""
    raise UserError(
        f"{where}: the answer {answer!r} is none of the choices{hint}; write a choice's text, "
        f"its letter A to {LETTERS[last]}, or its index 0 to {last}."
    )


def _text(value: Any, what: str, where: str) -> str:
    return unstripped_text(value, what, where).strip()


def unstripped_text(value: Any, what: str, where: str) -> str:
    """A text as it stands; blank or not a text: refused."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} is {_kind(value)}, not a text; write it in quotes.")
    if len(value) > LONGEST:
        raise UserError(f"{where}: {what} is longer than {LONGEST >> 20} MiB; shorten it.")
    if not value.strip():
        raise UserError(f"{where}: {what} is blank; write its text or take the row out.")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, \ud800, which no tokenizer can read
        raise UserError(f"{where}: {what} has half a character (a lone surrogate); write it as UTF-8.") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{value}".lower()
    return {int: "a number", float: "a number", list: "a list", dict: "an object"}.get(type(value), "text")
