"""The files that a user's rows lie in, and their rows as mappings, read as a stream; refusals name file and line.

JSON Lines are read strictly: one object a line, UTF-8. A row of a Parquet file has the fields of a JSONL row; a null
is a field that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from scalabl.core.errors import UserError
from scalabl.core.files import RepeatedKeyError, each_key_once
from scalabl.core.locations import Location, expanded, for_arrow

SPLITS = ("train", "validation", "test")
# what else the validation rows are called, and would not be read under
_KINDS = (".jsonl", ".parquet")
_NEARLY = ("val", "valid", "dev", "eval")


def is_path(text: str) -> bool:
    """Whether a text is meant as a path rather than as a name."""
    path = expanded(text)
    if path.suffix in {".jsonl", ".json"} or "/" in text or "\\" in text:
        return True
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file name, or with a null character
        return False


def split_files(path: Path) -> dict[str, Path]:
    """The file of each split that there is; a file alone is the train split.

    Raises:
        UserError: there is nothing, none of the splits, one of them twice, or validation rows under another name.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .jsonl file or a directory that holds train.jsonl.")
    if not path.is_dir():
        return {"train": path}
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [file for kind in _KINDS if (file := path / f"{split}{kind}").exists()]
        if len(found) > 1:
            raise UserError(f"{path} holds {found[0].name} and {found[1].name}; keep one of them.")
        if found:
            files[split] = found[0]
    nearly = [file for name in _NEARLY for kind in _KINDS if (file := path / f"{name}{kind}").exists()]
    if nearly and "validation" not in files:
        raise UserError(f"{nearly[0]} would not be read; call it validation{nearly[0].suffix}.")
    if not files:
        raise UserError(
            f"{path} holds none of train.jsonl, validation.jsonl, test.jsonl (or .parquet); name your files so."
        )
    return files


def name_of(path: Path) -> str:
    """What the user's data are called: after their directory, or their file."""
    return path.resolve().name if path.is_dir() else path.stem


def first_row(path: Path) -> tuple[str, dict[str, Any]]:
    """Place and fields of the first row of a file, or of the first split in a directory.

    Raises:
        UserError: the data is missing, empty or unreadable.
    """
    file = next(iter(split_files(path).values()))
    _, number, raw = next(iter(read_fields(file)))  # an empty file is refused
    return f"{file}:{number}", raw


def rows_in(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (how a message names it, the id it gets if it has none, fields) of every row of a file.

    Raises:
        UserError: see `read_fields`.
    """
    for _, number, raw in read_fields(path):
        yield f"{path}:{number}", f"{path.stem}:{number}", raw


def read_fields(path: Location, *, place: int = 0, line: int = 1) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (place, number, fields) of every row of a ``.jsonl`` or ``.parquet`` file, unchecked.

    Raises:
        UserError: the file cannot be read, or is empty, truncated or of another kind.
    """
    if path.suffix == ".parquet":
        return read_parquet_objects(path, place=place)
    return read_objects(path, place=place, line=line)


LONGEST = 1 << 24  # bytes of a row


class Ids:
    """The ids of a file's rows, each of which must be a row's own."""

    def __init__(self) -> None:
        self._place: dict[str, str] = {}

    def add(self, name: str, where: str) -> None:
        """Take note of a row's id.

        Raises:
            UserError: an earlier row has it.
        """
        if name in self._place:
            raise UserError(f"{where}: the id {name!r} is also that of {self._place[name]}; give every row its own.")
        self._place[name] = where


def read_objects(path: Location, *, place: int = 0, line: int = 1) -> Iterator[tuple[int, int, dict[str, Any]]]:
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
            for number, content in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=line):
                where = f"{path}:{number}"
                if len(content) > LONGEST:
                    raise UserError(f"{where}: the line is longer than {LONGEST >> 20} MiB; shorten the row.")
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

    try:
        row = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=each_key_once)
    except UserError:
        raise
    except RepeatedKeyError as error:
        raise UserError(f"{where}: {error}; keep one of them.") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply or a number too long")
        raise UserError(f"{where}: not JSON ({reason}); write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: not a JSON object; write {{"question": ..., "choices": [...], "answer": ...}}.')
    return row


_AT_ONCE = 1000  # rows


def read_parquet_objects(path: Location, *, place: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
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
        with pq.ParquetFile(for_arrow(path)) as file:
            if file.metadata.num_rows == 0:
                raise UserError(f"{path} has no rows; give a Parquet file that has some.")
            # pandas writes the index of a filtered table as a column
            columns = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]
            if len(set(columns)) < len(columns):
                twice = next(name for name in columns if columns.count(name) > 1)
                raise UserError(f"{path}: the column {twice!r} is there twice; keep one of them.")
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
