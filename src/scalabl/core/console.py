"""What the terminal shows: one progress bar for all that takes more than a few seconds, and no library's own noise."""

from __future__ import annotations

import logging
import os
import warnings

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scalabl.core.processes import is_main


def words_console(*, stderr: bool = False) -> Console:
    """A console on which brackets and colons in a path, a name or a row are what they are, and no markup."""
    return Console(stderr=stderr, markup=False, emoji=False)


def progress_bar() -> Progress:
    """A bar on standard error: what, how many of how many, time gone, time left."""
    console = words_console(stderr=True)
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
        # a log file would be left an empty line; of several processes one shows it
        disable=not console.is_terminal or not is_main(),
    )


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
