"""Strict JSON Lines: one object a line, UTF-8, read as a stream; every refusal names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from scalabl.errors import UserError


def read_objects(path: Path, *, place: int = 0, line: int = 1) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (byte offset, line number, object) for every non-blank line.

    Args:
        path: the file.
        place: the byte offset to begin at, where a line begins.
        line: the number of that line.

    Raises:
        UserError: the file is missing, unreadable, empty, not UTF-8, or has a line that is not a JSON object
            (NaN, infinities and repeated keys are refused too).
    """
    rows = 0
    try:
        with path.open("rb") as file:
            file.seek(place)
            for number, content in enumerate(file, start=line):
                where = f"{path}:{number}"
                text = _decode(content, where, first=number == 1)
                if text.strip():
                    rows += 1
                    yield place, number, _parse(text, where)
                place += len(content)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .jsonl file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give the path of a .jsonl file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
    if rows == 0:
        raise UserError(f"{path} is empty; write one JSON object a line.")


def _decode(line: bytes, where: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8.") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    def refuse_constant(word: str) -> NoReturn:
        raise UserError(f"{where}: {word} is not JSON; write a text or a whole number.")

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            raise UserError(f"{where}: a key is there twice; keep one of them.")
        return row

    try:
        row = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repeats)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply or a number too long")
        raise UserError(f"{where}: not JSON ({reason}); write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: not a JSON object; write {{"question": ..., "choices": [...], "answer": ...}}.')
    return row
