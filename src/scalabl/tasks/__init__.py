"""Rows to train and test on: benchmarks by name, and the user's own JSONL. Nothing here imports torch."""

from __future__ import annotations

from scalabl.tasks.example import LETTERS, Example
from scalabl.tasks.get import get
from scalabl.tasks.holdout import holdout
from scalabl.tasks.jsonl import load_rows
from scalabl.tasks.load import load_task
from scalabl.tasks.open_question import OpenQuestion, OpenTask, load_open_questions
from scalabl.tasks.open_tasks import OPEN_BENCHMARKS, load_open_task
from scalabl.tasks.registry import BENCHMARKS, find
from scalabl.tasks.task import Task
from scalabl.tasks.text_rows import Message, TextRow, TextTask, load_text_rows
from scalabl.tasks.training_data import load_training_task

__all__ = [
    "BENCHMARKS",
    "Example",
    "LETTERS",
    "Message",
    "OPEN_BENCHMARKS",
    "OpenQuestion",
    "OpenTask",
    "Task",
    "TextRow",
    "TextTask",
    "find",
    "get",
    "holdout",
    "load_open_questions",
    "load_open_task",
    "load_rows",
    "load_task",
    "load_text_rows",
    "load_training_task",
]
