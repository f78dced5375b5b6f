"""Shards to answer, what was written for them, and the processes that do it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_base import as_json, questions, write_jsonl

from scalabl.data import Example

SIZES = {"a": 7, "day=1/part-0": 12, "day=2/part-0": 5}  # rows by shard, in their order


def all_rows(seed: int = 5) -> list[Example]:
    """The rows of all shards, in their order."""
    return questions(sum(SIZES.values()), seed=seed)


def write_shards(directory: Path, suffix: str, seed: int = 5) -> Path:
    """The rows cut into three files at two depths; answers of some rows are missing."""
    rows = [as_json(row) for row in all_rows(seed)]
    for row in rows[::2]:
        del row["answer"]
    for name, size in SIZES.items():
        path, own, rows = directory / f"{name}.{suffix}", rows[:size], rows[size:]
        if suffix == "jsonl":
            write_jsonl(path, own)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(own), path, row_group_size=5)
    return directory


def address_of(path: Path) -> str:
    """The same place as a store's, reached through pyarrow alone."""
    return f"fsspec+file://{path}"


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Answers as they stand in a file, `probs` as a dictionary."""
    if path.suffix == ".parquet":
        return [row | {"probs": dict(row["probs"])} for row in pq.read_table(path).to_pylist()]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_in(output: Path, suffix: str) -> list[dict[str, Any]]:
    """The answers of all shards, in the order of their rows."""
    return [answer for name in SIZES for answer in read_answers(output / f"{name}.{suffix}")]


def titles(pid: int) -> dict[int, str]:
    """What the processes below one call themselves, by Linux's tables."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:  # ended meanwhile
            continue
        for child in children:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            found |= titles(child)
    return found
