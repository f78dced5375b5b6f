"""The one error a user is meant to read, what it quotes of others, and others in its words."""

from __future__ import annotations

import errno

_FULL = "the disk is full; free some space and run the same command again"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EFBIG: "a file became larger than this disk or its limits (ulimit -f) allow; choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EISDIR: "a directory stands where a file is to be written; choose another name, or move it away",
    errno.ENOTDIR: "a file or a link stands where a directory is needed; choose another name, or move it away",
    errno.ELOOP: "its links lead in a circle; choose another name, or mend them",
    errno.ENOTEMPTY: "another call has written there meanwhile; choose another directory",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EACCES: "permission was denied; choose a directory that you may write",
    errno.EPERM: "permission was denied; choose a directory that you may write",
}


LONGEST = 3000  # characters of a sentence


class UserError(ValueError):
    """Something the user can mend: the message is one sentence that says what is wrong and how to mend it.

    The command line prints it without a traceback and exits with code 2. What it quotes of others may be of any length:
    a long sentence loses its middle, and keeps its mend.
    """

    def __init__(self, sentence: object = "") -> None:
        text = str(sentence)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An error's whole text in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: Exception) -> str | None:
    """What went wrong in one sentence that names the mend; None for what is no user's business (a bug)."""
    if isinstance(error, UserError):
        return str(error)
    if hasattr(error, "format_message"):  # the parser's own: a missing option, a word for a number
        sentence = str(error.format_message()).rstrip(".")
        asked = getattr(getattr(error, "ctx", None), "command_path", None) or "scalabl"
        return f"{sentence}; see {asked} --help." if sentence else ""
    if isinstance(error, OSError) and error.errno in _DISK:
        file = error.filename2 or error.filename  # of a file that was to be put in place, its place
        return f"{f'{file}: ' if file else ''}{_DISK[error.errno]}."
    text = str(error)
    # safetensors and torch.save report a failed write in words of their own
    for number, sentence in _DISK.items():
        if f"(os error {number})" in text:
            return f"{sentence[0].upper()}{sentence[1:]}."
    if any(sign in text for sign in ("inline_container", "file write failed", "iostream error")):
        return f"A checkpoint could not be written, perhaps {_FULL}."
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs)):
        return "Out of memory; lower --batch-size, --max-length or --samples, or load the base with --bits 4."
    return None
