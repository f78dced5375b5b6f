"""What the terminal shows: text of others made harmless, one progress bar for all that takes more than a few seconds,
and no library's own noise.

A console may lack characters, be closed, or have nobody who reads on. None of that is to cost a command its work:
characters become plain ones, and what nobody reads is dropped.
"""

from __future__ import annotations

import codecs
import errno
import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from scalabl.core.processes import is_main

# C0, DEL and C1, with which every escape sequence begins; ends of lines and marks of direction that forge other lines
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text of others as a terminal may show it: what would steer the terminal stands there as JSON writes it.

    JSON stays the same JSON: it has such characters inside its strings alone.
    """
    return _ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str, *, stderr: bool = False, end: str = "\n") -> None:
    """Print a text that may quote a file, a name or a server."""
    print(visible(text), file=sys.stderr if stderr else sys.stdout, end=end, flush=stderr)


class _Words(Console):
    """A console that steers the terminal by itself alone, whatever the texts say that it is given."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def words_console(*, stderr: bool = False) -> Console:
    """A console on which brackets and colons in a path, a name or a row are what they are, and no markup."""
    return _Words(stderr=stderr, markup=False, emoji=False)


_in_lines = False


def progress_in_lines() -> None:
    """From now on this process writes its progress as into a log: it shares the terminal with others."""
    global _in_lines
    _in_lines = True


def progress_bar() -> Progress:
    """A bar on standard error: what, how many of how many, time gone, time left. In a log: a line every ten seconds."""
    console = words_console(stderr=True)
    if _in_lines or not console.is_terminal or not is_main():
        return _Lines(shown=is_main())  # of several processes one shows it
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
    )


SECONDS = 10.0  # between two lines of progress in a log


class _Lines(Progress):
    """Progress as whole lines, for a log: nothing of what is over sooner.

    Args:
        shown: whether lines are written at all.
    """

    def __init__(self, *, shown: bool) -> None:
        super().__init__(disable=True)
        self._shown = shown
        self._last = time.monotonic()

    def stop(self) -> None:
        """Nothing was begun: older Rich would put an empty line into standard output."""

    def update(self, task_id: TaskID, **changed: Any) -> None:
        super().update(task_id, **changed)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if not self._shown or now - self._last < SECONDS:
            return
        self._last = now
        task = self._tasks[task_id]
        total = "" if task.total is None else f" of {task.total:,.0f}"
        detail = task.fields.get("detail")
        say(f"{task.description}: {task.completed:,.0f}{total}{f', {detail}' if detail else ''}", stderr=True)


# what they say while they are imported (kernels that are not there, deprecations of their own), before `quiet`
_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes", "accelerate", "peft")


def quiet_imports() -> None:
    """Call before the first import of torch and transformers; costs nothing itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet() -> None:
    """Call after the first import of torch and transformers."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torch sets its loggers up anew when it is imported
    for name in (*_CHATTY, "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


_PLAIN = {
    "↑": "^", "↓": "v", "±": "+-", "–": "-", "—": "-", "−": "-", "≤": "<=", "≥": ">=", "█": "#", "…": "...", "×": "x",
    "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*",
}  # fmt: skip


def plain(text: str, encoding: str) -> str:
    """A text in the characters of an encoding; what has no plain form there is a question mark."""

    def of(character: str) -> str:
        letters = unicodedata.normalize("NFKD", character)
        for form in (character, _PLAIN.get(character, ""), letters, letters[0]):
            if form and form.encode(encoding, "replace").decode(encoding) == form:
                return form
        return "?"

    return "".join(map(of, text))


class _Stream:
    """A text stream that takes every text.

    Args:
        stream: what it writes to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, in plain characters where the stream has no others."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(plain(text, self._stream.encoding))
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Write to nowhere from now on, what is still buffered too: behind a pipe whose reader has gone.

        Raises:
            OSError: it is something else that is wrong.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if error.errno != errno.EPIPE:
            raise error


@contextmanager
def any_console() -> Iterator[None]:
    """Context in which standard output and standard error take every text."""
    for number in range(3):  # a closed one would be the next file that is opened, and libraries print into it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (_Stream(nowhere if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def is_utf8(stream: Any) -> bool:
    """Whether a text stream writes UTF-8."""
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
