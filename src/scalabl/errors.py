"""The one error a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: the message is one sentence that says what is wrong and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """
