"""Rows of a Parquet file, with the fields of a JSONL row; a null is a field that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalabl.errors import UserError

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
