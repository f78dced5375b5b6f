"""Files of answers, JSONL or Parquet: a block's, and a shard's made of its blocks. Each appears whole or not at all.

A block's file is the proof that the block is done, a shard's file that the shard is: doing either again writes the same
rows into the same file, so that every row is answered once however often workers die. Imports no torch and no Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scalabl.core.errors import UserError

FORMATS = ("jsonl", "parquet")


@dataclass(frozen=True)
class Receipt:
    """What a file of answers holds.

    Attributes:
        rows: how many answers.
        answered: how many of them are not null.
        particles: over how many particles they are averaged, all rows together; None where that is not counted.
    """

    rows: int
    answered: int
    particles: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_answers(answers: Sequence[dict[str, Any]], path: Path, format: str) -> None:
    """Write the answers of a block (`scalabl.inference.answering`: id, label, probs, ...)."""
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {
            "id": pa.string(), "label": pa.string(), "probs": pa.map_(pa.string(), pa.float64()),
            "particles": pa.int64(), "predictive": pa.string(),
        }  # fmt: skip
        schema = pa.schema([(name, types.get(name, pa.float64())) for name in answers[0]])
        table = pa.Table.from_pylist([answer | {"probs": [*answer["probs"].items()]} for answer in answers], schema)
        _whole(path, lambda file: pq.write_table(table, file))
    else:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()
        _whole(path, lambda file: file.write(lines))


def join(blocks: Sequence[Path], path: Path, format: str) -> None:
    """Put the files of a shard's blocks behind each other, in their order."""
    if format == "parquet":
        import pyarrow.parquet as pq

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, pq.read_schema(blocks[0])) as writer:
                for block in blocks:
                    writer.write_table(pq.read_table(block))
    else:

        def write(file: BinaryIO) -> None:
            for block in blocks:
                with block.open("rb") as part:
                    shutil.copyfileobj(part, file)

    _whole(path, write)


def receipt_of(path: Path, format: str, rows: int) -> Receipt:
    """Count a shard's answers.

    Args:
        path: the file.
        format: "jsonl" or "parquet".
        rows: how many it must have.

    Raises:
        UserError: it has other rows, or cannot be read.
    """
    found = answered = particles = 0
    adaptive = False
    for answer in _read(path, format):
        found += 1
        answered += answer["label"] is not None
        adaptive = "particles" in answer
        particles += answer.get("particles", 0)
    if found != rows:
        raise UserError(f"{path} has {found:,} answers for {rows:,} rows; delete it and run the same command again.")
    return Receipt(found, answered, particles if adaptive else None)


def _read(path: Path, format: str) -> Iterator[dict[str, Any]]:
    """The answers of a file, of Parquet only what `receipt_of` counts."""
    try:
        if format == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                columns = [name for name in ("label", "particles") if name in file.schema_arrow.names]
                for batch in file.iter_batches(columns=columns):
                    yield from batch.to_pylist()
        else:
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} is no longer what was written; delete it and run the same command again.") from error


def _whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside, to the disk, and put in place; two writers of one file do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
