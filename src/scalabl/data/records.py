"""Strict JSON Lines: one object a line, UTF-8, read as a stream; every refusal names file and line.

Rows of a Parquet file, with the fields of a JSONL row; a null is a field that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from scalabl.core.errors import UserError


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


_AT_ONCE = 1000  # rows


def read_parquet_objects(path: Path, *, place: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (0-based row, 1-based row, fields) for every row, one row group in memory at most.

    Args:
        path: the file.
        place: the 0-based row to begin at; row groups in front of it are not read.

    Raises:
        UserError: the file is missing, unreadable, truncated, or has no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; give the path of a .parquet file.")
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                raise UserError(f"{path} has no rows; give a Parquet file that has some.")
            # pandas writes the index of a filtered table as a column
            columns = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]
            end = 0
            for group in range(file.num_row_groups):
                number, end = end, end + file.metadata.row_group(group).num_rows
                if end <= place:
                    continue
                for batch in file.iter_batches(_AT_ONCE, row_groups=[group], columns=columns):
                    for fields in batch.to_pylist():
                        if number >= place:
                            yield number, number + 1, {k: v for k, v in fields.items() if v is not None}
                        number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{path} is no whole Parquet file ({reason}); write it again.") from error
