"""``load_training_task``: whatever can be trained on, told apart by its name or by the keys of its first row."""

from __future__ import annotations

from pathlib import Path

from scalabl.errors import UserError
from scalabl.tasks.jsonl import load_jsonl_task
from scalabl.tasks.load import is_path, load_task
from scalabl.tasks.open_question import load_open_jsonl
from scalabl.tasks.open_tasks import OPEN_BENCHMARKS, find_any, load_open_task
from scalabl.tasks.registry import BENCHMARKS
from scalabl.tasks.task import Task
from scalabl.tasks.text_rows import FORMS, TextTask, first_row, load_text_task, text_keys


def load_training_task(name_or_path: str) -> Task | TextTask:
    """A classification task, or rows of text: prompts with completions, conversations, open questions.

    Args:
        name_or_path: a benchmark's or an open question answering set's name, a JSONL file or a directory of them. What
            a file holds is told by its first row: ``{"question", "choices", "answer"}``, ``{"text", "label"}``,
            ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"question", "answers"}``; all its rows are of one kind.

    Raises:
        UserError: no such data, rows of no or of several kinds, bad rows; the message names file and line.
    """
    if name_or_path in OPEN_BENCHMARKS:
        return load_open_task(name_or_path).as_text()
    if name_or_path in BENCHMARKS or not is_path(name_or_path):
        return load_task(find_any(name_or_path).name)
    path = Path(name_or_path).expanduser()
    where, first = first_row(path)
    if text_keys(first) is not None:
        return load_text_task(path)
    if "answers" in first:
        return load_open_jsonl(path).as_text()
    if not {"question", "text"} & first.keys():
        raise UserError(
            f'{where}: no row that can be trained on; write {FORMS}, {{"question", "answers"}}, '
            '{"question", "choices", "answer"} or {"text", "label"}.'
        )
    return load_jsonl_task(path)
