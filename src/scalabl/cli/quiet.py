"""Libraries' own bars and warnings, turned down so that the terminal holds progress and tables alone."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Call after the first import of torch and transformers."""
    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("torchao", "torch", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
