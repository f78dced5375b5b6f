"""One raw row in its Hub layout -> one Example. The Hub and the wheel both go through here, so they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scalabl.data.example import Example

RawRow = Mapping[str, Any]
Normaliser = Callable[[RawRow, str], Example]  # (raw row, the id it gets if it has none of its own)

NO_YES = ("no", "yes")


def arc(row: RawRow, name: str) -> Example:
    """``{"id", "question", "choices": {"text", "label"}, "answerKey"}``; labels are A.. or 1.. ."""
    choices = row["choices"]
    return _example(row["id"], row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def openbookqa(row: RawRow, name: str) -> Example:
    """Like ARC, with the question under ``"question_stem"``."""
    return arc({**row, "question": row["question_stem"]}, name)


def boolq(row: RawRow, name: str) -> Example:
    """SuperGLUE's ``{"passage", "question", "label"}``: the question follows its passage on a new line."""
    return _example(name, f"{row['passage'].strip()}\n{row['question'].strip()}?", NO_YES, int(row["label"]))


def winogrande(row: RawRow, name: str) -> Example:
    """``{"sentence", "option1", "option2", "answer": "1" | "2"}``: the sentence keeps its blank ``_``."""
    return _example(name, row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def mmlu(row: RawRow, name: str) -> Example:
    """``{"question", "choices", "answer": 0..3}``."""
    return _example(name, row["question"], row["choices"], int(row["answer"]))


def _example(name: str, question: str, choices: Sequence[str], answer: int) -> Example:
    """Strip the texts and list a choice that repeats an earlier one once.

    Three OpenBookQA and thirteen MMLU rows print the same choice twice: the row stays, so that counts are the
    official ones, and the answer stays with its text.
    """
    texts = [choice.strip() for choice in choices]
    distinct = tuple(dict.fromkeys(texts))
    return Example(str(name), question.strip(), distinct, distinct.index(texts[answer]))
