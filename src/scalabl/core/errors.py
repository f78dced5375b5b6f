"""The one error a user is meant to read, and what it quotes of others."""


class UserError(ValueError):
    """Something the user can mend: the message is one sentence that says what is wrong and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An error's whole text in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
