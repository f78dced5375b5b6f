"""Files of a model that Transformers reads: without the code that they bring along, and in a sentence where they fail.

Code that a model's own files name (`auto_map` in a config.json) is run only where the user has typed so.

Transformers asks on the terminal otherwise, and whatever answers there decides. Nothing that is read (a recipe, a run,
an adapter) can allow it: the option is of one command, and goes on to the processes that this command starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from scalabl.core.errors import UserError, first_line, one_line

OPTION = "--trust-remote-code"
_VARIABLE = "SCALABL_TRUST_REMOTE_CODE"


def trust_remote_code() -> bool:
    """What every `from_pretrained` and `from_config` of Transformers is given."""
    return os.environ.get(_VARIABLE) == "1"


def allow_remote_code() -> None:
    """Let models run code of their own in this process and in those that it starts."""
    os.environ[_VARIABLE] = "1"


def why_refused(error: Exception) -> str | None:
    """The sentence for a model that Transformers cannot read without its code; None for any other error."""
    if trust_remote_code() or "custom code" not in str(error):
        return None
    return (
        "it names Python code of its own (auto_map), which is not run; where you trust it, put the option in front of "
        f"the command (scalabl {OPTION} COMMAND ..., in Python {_VARIABLE}=1), or convert it to a model that "
        "Transformers knows"
    )


@contextmanager
def reading_model(what: str, mend: str = "") -> Iterator[None]:
    """Context in which Transformers reads files of a model: whatever fails on them is one sentence.

    Its readers raise what their parsers do, a bare Exception among it. A lack of memory stays what it is.

    Args:
        what: the beginning of the sentence, "The model x cannot be loaded".
        mend: its end, where the files are to be mended by something else than the code that they name.

    Raises:
        UserError: the files cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        # a value of another type than its field's shows only further down in the text
        why = one_line(error) if type(error).__name__.startswith("StrictDataclass") else first_line(error)
        raise UserError(f"{what}: {why_refused(error) or f'{why[:1000]}{mend}'}") from error
