"""Shards: the files that a large prediction reads, what each one holds, and the blocks of rows they are worked in.

A shard has a name, its path below the directory that all shards share, without the suffix. Its answers go to one file
of that name below the output directory, so that the tree of answers is the tree of rows. It is worked in blocks of a
fixed number of rows, which a worker can begin to read in the middle of the file. A row is known everywhere by its key,
an integer made of its shard's index and its line. Imports no torch and no Ray.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.locations import Location, StorePath, locate
from scalabl.data.example import Example
from scalabl.data.jsonl import PlacedRow, stream_rows
from scalabl.data.load import with_labels

SUFFIXES = (".jsonl", ".parquet")
_LINE_BITS = 40

NamedRow = tuple[str, Example]  # "file:line", the row


@dataclass(frozen=True)
class ShardSource:
    """A file of rows and its name.

    Attributes:
        name: its path below the shards' common directory, without the suffix.
        path: the file, absolute, or of a store.
    """

    name: str
    path: Location

    @property
    def format(self) -> str:
        """ "parquet" or "jsonl"."""
        return "parquet" if self.path.suffix == ".parquet" else "jsonl"

    def stamp(self) -> tuple[int, int]:
        """Size and time of the last change (ns): cheap to compare.

        Raises:
            UserError: the file is not there.
        """
        if isinstance(self.path, StorePath):
            info = self.path.info()
            if not info.is_file:
                raise UserError(f"{self.path} is no longer there; restore it, or run the same command again.")
            return info.size, info.mtime_ns or 0
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); every machine has to see it.") from error
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """What a source holds.

    Attributes:
        name: as in `ShardSource`.
        sha256: of the file.
        rows: how many.
        index: of this content alone: a shard that has changed gets another, so that its rows have other keys.
    """

    name: str
    sha256: str
    rows: int
    index: int


@dataclass(frozen=True)
class Block:
    """Rows of a shard that follow each other.

    Attributes:
        source: the file.
        stamp: of the file when it was examined.
        shard: the index of the shard.
        place: where its first row begins, as `PlacedRow` has it.
        first: the line or row of its first row.
        last: of its last one.
        rows: how many.
    """

    source: ShardSource
    stamp: tuple[int, int]
    shard: int
    place: int
    first: int
    last: int
    rows: int

    @property
    def keys(self) -> tuple[int, int]:
        """The keys of its first and its last row."""
        return key_of(self.shard, self.first), key_of(self.shard, self.last)

    def read(self, labels: Sequence[str] | None) -> list[tuple[int, Example]]:
        """Its rows and their keys.

        Raises:
            UserError: the file has changed since it was examined.
        """
        stream = read_rows(self.source, labels, place=self.place, number=self.first)
        found = list(itertools.islice(stream, self.rows)) if self.source.stamp() == self.stamp else []
        if len(found) != self.rows:
            raise UserError(f"{self.source.path} has changed since the work began; run the same command again.")
        return [(key_of(self.shard, row.number), row.example) for row in found]


def key_of(shard: int, number: int) -> int:
    """The key of a row: 63 bits, of which its line or row in the file, counted from 1, has the lower 40."""
    return (shard << _LINE_BITS) + number


def place_of(key: int) -> tuple[int, int]:
    """(index of the shard, line or row) of a key."""
    return key >> _LINE_BITS, key & ((1 << _LINE_BITS) - 1)


def find_sources(given: str | Path | StorePath) -> list[ShardSource]:
    """The shards that a path names, in the order of their names.

    Args:
        given: a path or an address of a file, of a directory (its .jsonl or .parquet files at any depth; names that
            begin with a dot or an underscore are left out), or a glob pattern, in which ** is any depth.

    Raises:
        UserError: there are none, or they are of two kinds, or two have one name.
    """
    location = locate(given)
    text = str(location)
    files: list[tuple[str, Location]]  # path below the common directory, file
    if isinstance(location, StorePath):
        files = _in_store(location)
    elif os.path.isfile(text):
        files = [(location.name, location)]
    elif os.path.isdir(text):
        found = [path for path in location.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
        files = [(str(path.relative_to(text)), path) for path in found if _is_data(path.relative_to(text).parts)]
    elif glob.has_magic(text):
        names = [path for path in glob.glob(text, recursive=True) if os.path.isfile(path)]
        root = os.path.commonpath([os.path.dirname(path) for path in names]) if names else ""
        files = [(os.path.relpath(name, root), Path(name)) for name in names]
    else:
        raise UserError(f"{given} does not exist; give a file, a directory of shards, or a pattern in quotes.")
    if not files and (os.path.isdir(text) or (isinstance(location, StorePath) and not _split(location)[1])):
        raise UserError(f"{given} holds no .jsonl and no .parquet file; give the directory of the shards.")
    if not files:
        raise UserError(f"No file matches {given}; give a file, a directory of shards, or another pattern.")
    sources = sorted((ShardSource(os.path.splitext(name)[0], file) for name, file in files), key=lambda s: s.name)
    if len({source.format for source in sources}) > 1:
        raise UserError(f"{given} has JSONL and Parquet files; give a pattern for one kind, such as '*.parquet'.")
    for one, other in itertools.pairwise(sources):
        if one.name == other.name:
            raise UserError(f"{one.path} and {other.path} would have one file of answers; rename one of them.")
    return sources


def _in_store(given: StorePath) -> list[tuple[str, Location]]:
    """The files of a store that an address or a pattern names, each with its path below their common directory."""
    root, pattern = _split(given)
    if not pattern:
        if given.is_file():
            return [(given.name, given)]
        below = [path for path in given.iterdir(recursive=True) if path.suffix in SUFFIXES]
        return [(path.below, path) for path in below if _is_data(path.below.split("/"))]
    found = [path for path in root.iterdir(recursive=True) if _matches(path.below.split("/"), pattern)]
    common = posixpath.commonpath([posixpath.dirname(path.below) for path in found]) if found else ""
    return [(posixpath.relpath(path.below, common or "."), path) for path in found]


def _split(given: StorePath) -> tuple[StorePath, list[str]]:
    """The directory in front of the first part that has a * or a [ in it, and the parts from there on."""
    base, mark, options = given.address.partition("?")
    parts = base.split("/")
    first = next((i for i, part in enumerate(parts) if "*" in part or "[" in part), len(parts))
    return StorePath("/".join(parts[:first]) + mark + options), parts[first:]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path is of a pattern, as `glob` has it: ** is any depth, and a name that begins with a dot is meant."""
    if not parts or not pattern:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (not hidden and _matches(parts[1:], pattern))
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def searched(given: str | Path | StorePath) -> Location | None:
    """The directory at any depth of which files are taken for shards; None where that is one directory alone."""
    text = locate(given)
    if isinstance(text, StorePath):
        root, pattern = _split(text)
        if not pattern:
            return None if text.is_file() else text
        return root if len(pattern) > 1 else None
    if text.is_dir():
        return text
    parts = [] if text.is_file() else [glob.has_magic(part) for part in text.parts[:-1]]
    return Path(*text.parts[: parts.index(True)]) if any(parts) else None


def _is_data(parts: Sequence[str]) -> bool:
    return not any(part.startswith((".", "_")) for part in parts)


def read_rows(
    source: ShardSource, labels: Sequence[str] | None, *, place: int = 0, number: int = 1
) -> Iterator[PlacedRow]:
    """The rows of a source from a place on, with the run's class words as choices where it has any.

    Raises:
        UserError: a bad row, named by file and line, or a file that is empty, truncated or of another kind.
    """
    for row in stream_rows(source.path, labels, name=source.name, place=place, number=number):
        (example,) = with_labels([row.example], labels, f"{source.path}:{row.number}", whole=True)
        yield PlacedRow(row.place, row.number, example)


def examine(
    source: ShardSource, stamp: tuple[int, int], labels: Sequence[str] | None, shard: int, block_rows: int
) -> list[Block]:
    """Read a source from end to end, and cut it; its last block may be shorter.

    Args:
        source: the file.
        stamp: of it.
        labels: the run's class words, None where its rows bring their own choices.
        shard: the index of the shard.
        block_rows: rows of a block.

    Raises:
        UserError: a bad row, named by file and line, or a file that is empty, truncated or of another kind.
    """
    blocks = []
    stream = read_rows(source, labels)
    while rows := list(itertools.islice(stream, block_rows)):
        blocks.append(Block(source, stamp, shard, rows[0].place, rows[0].number, rows[-1].number, len(rows)))
    return blocks


def first_rows(sources: Sequence[ShardSource], labels: Sequence[str] | None, number: int) -> list[NamedRow]:
    """The first rows of the shards together, at most so many."""
    stream = ((f"{source.path}:{row.number}", row.example) for source in sources for row in read_rows(source, labels))
    return list(itertools.islice(stream, number))
