"""Rows to train and test on: benchmarks by name, and the user's own JSONL. Nothing here imports torch."""

from __future__ import annotations

from scalabl.tasks.example import LETTERS, Example
from scalabl.tasks.get import get
from scalabl.tasks.holdout import holdout
from scalabl.tasks.jsonl import load_rows
from scalabl.tasks.load import load_task
from scalabl.tasks.registry import BENCHMARKS, find
from scalabl.tasks.task import Task

__all__ = ["BENCHMARKS", "LETTERS", "Example", "Task", "find", "get", "holdout", "load_rows", "load_task"]
