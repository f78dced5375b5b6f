"""Code that a model's own files bring along (`auto_map` in a config.json): run only where the user has typed so.

Transformers asks on the terminal otherwise, and whatever answers there decides. Nothing that is read (a recipe, a run,
an adapter) can allow it: the option is of one command, and goes on to the processes that this command starts.
"""

from __future__ import annotations

import os

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
