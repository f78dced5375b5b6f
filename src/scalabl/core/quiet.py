"""Libraries' own bars and warnings, turned down so that the terminal holds progress and tables alone."""

from __future__ import annotations

import logging
import os
import warnings

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
