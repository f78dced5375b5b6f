"""Normalised rows on disk: ``<folder>/<split>.jsonl`` (or ``.jsonl.xz``) and ``meta.json``, written all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from scalabl.core.errors import UserError
from scalabl.data.example import Example, Splits, Task, check

S = TypeVar("S", bound=Splits[Any])
_OF_VALUES = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # where JSON is of another form
FORMAT = 1  # raised when the rows or rules change: an older cache is then read as absent


def task_folder(cache_dir: Path, name: str) -> Path:
    """Where the rows of a benchmark lie in the cache."""
    return cache_dir / "tasks" / name


def write_task(task: Splits[Any], folder: Path, compress: bool = False) -> None:
    """Write ``folder`` in one step: an interrupted writer leaves what was there before.

    Raises:
        UserError: the disk is full or read-only.
    """
    with writing_below(folder.parent), tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        fresh.mkdir()
        for split, rows in task.splits.items():
            text = "".join(_line(row) for row in rows).encode()
            if compress:
                (fresh / f"{split}.jsonl.xz").write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
            else:
                (fresh / f"{split}.jsonl").write_bytes(text)
        counts = {split: len(rows) for split, rows in task.splits.items()}
        meta = {
            "format": FORMAT,
            "name": task.name,
            "rows": counts,
            "labels": task.labels,
            "source": task.source,
            "licence": task.licence,
        }
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process has just written the same rows
                raise


def read_task(folder: Path | Traversable) -> Task | None:
    """The task of choice questions that :func:`write_task` wrote; as :func:`read_splits`."""
    return read_splits(folder, Task, _example)


def read_splits(folder: Path | Traversable, kind: type[S], parse: Callable[[dict[str, Any], str], Any]) -> S | None:
    """The task that :func:`write_task` wrote; ``None`` if there is none of this format.

    Args:
        folder: where it was written.
        kind: of the task.
        parse: the row of a JSON object, given its place.

    Raises:
        UserError: the folder was altered: a split is missing, broken, or has another number of rows.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (*_OF_VALUES, OSError) as error:
        raise UserError(f"{folder}/meta.json is broken ({error}); delete its folder and fetch again.") from None
    try:
        splits = {split: tuple(_rows(folder, split, parse)) for split in meta["rows"]}
        counts = {split: len(rows) for split, rows in splits.items()}
        if counts != meta["rows"]:
            raise ValueError(f"{counts} rows where {meta['rows']} were written")
        if not {"name", "labels", "source", "licence"} <= meta.keys():
            raise ValueError("meta.json lacks fields")
        labels = None if meta["labels"] is None else tuple(meta["labels"])
        return kind(meta["name"], splits, labels, meta["source"], meta["licence"])
    except (*_OF_VALUES, OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{folder} is broken ({error}); delete that folder and fetch the rows again.") from None


@contextlib.contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """Make ``folder``; an operating system's refusal while writing in it becomes a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); free some space or set SCALABL_CACHE to "
            "a directory that can be."
        ) from None


def _line(row: Any) -> str:
    fields = dataclasses.asdict(row)
    fields.pop("images", None)  # no benchmark known by name has any
    if fields.get("pair", "") is None:
        del fields["pair"]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _example(row: dict[str, Any], where: str) -> Example:
    example = Example(row["id"], row["question"], tuple(row["choices"]), row["answer"], pair=row.get("pair"))
    return check(example, where)


def _rows(folder: Path | Traversable, split: str, parse: Callable[[dict[str, Any], str], Any]) -> Iterator[Any]:
    packed = folder / f"{split}.jsonl.xz"
    data = lzma.decompress(packed.read_bytes()) if packed.is_file() else (folder / f"{split}.jsonl").read_bytes()
    for number, line in enumerate(data.decode().split("\n")[:-1], start=1):
        yield parse(json.loads(line), f"{folder}/{split}.jsonl:{number}")
