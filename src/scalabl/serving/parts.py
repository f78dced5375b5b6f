"""Parts: what is answered already, a Parquet file a block, written by Ray Data as its tasks come to them.

A part is its own mark. Parquet has its end written last, and nothing of it is read without: a file is whole, or a kill
has left it, on a file system or on a store that shows what is being written. Imports no torch and no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalabl.core.files import remove
from scalabl.core.locations import Location, StorePath, for_arrow

if TYPE_CHECKING:
    import numpy.typing as npt

    Keys = npt.NDArray[np.int64]


def done(parts: Location) -> Keys:
    """Sorted keys of the rows whose answers are written."""
    found = [table["key"].to_numpy() for table in _tables(parts, ["key"])]
    keys = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    return keys[keys > 0]


def answers_in(parts: Location) -> dict[int, str]:
    """Key -> answer in the parts of a shard, by ascending key; what two parts have is there once."""
    tables = list(_tables(parts, ["key", "answer"]))
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    keys, at = np.unique(table["key"].to_numpy(), return_index=True)
    return dict(zip(keys.tolist(), table["answer"].take(at).to_pylist(), strict=True))


def _tables(parts: Location, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of all parts that are whole; what a kill has left of others is taken away."""
    for path in sorted(_files(parts), key=str):
        try:
            with pq.ParquetFile(for_arrow(path)) as file:
                table = file.read(columns=list(columns))
        except FileNotFoundError:
            continue
        except pa.ArrowInvalid:
            remove(path)
            continue
        yield table


def _files(directory: Location) -> Iterator[Location]:
    if isinstance(directory, StorePath):
        return (path for path in directory.iterdir(recursive=True) if path.suffix == ".parquet")
    return directory.rglob("*.parquet")
