"""Prompts of a JSONL or Parquet file: ``{"prompt"}``, taken as it is, or ``{"question"}``, put as an open question."""

from __future__ import annotations

from pathlib import Path

from scalabl.errors import UserError
from scalabl.tasks.jsonl import read_fields
from scalabl.tasks.jsonl_fields import unstripped_text
from scalabl.tasks.open_question import OpenQuestion


def load_prompts(path: str | Path) -> list[str]:
    """The prompts, in the file's order; what else a row holds is read over.

    Raises:
        UserError: the file cannot be read, or a row has neither key, both, or a blank text.
    """
    path = Path(path)
    prompts = []
    for _, line, raw in read_fields(path):
        where = f"{path}:{line}"
        if ("prompt" in raw) == ("question" in raw):
            raise UserError(f'{where}: a row needs "prompt" or "question", one of the two.')
        key = "prompt" if "prompt" in raw else "question"
        text = unstripped_text(raw[key], f'"{key}"', where)
        if not text.strip():
            raise UserError(f'{where}: "{key}" is blank; write what is asked.')
        prompts.append(text if key == "prompt" else OpenQuestion("", text.strip(), ("",)).prompt)
    return prompts
