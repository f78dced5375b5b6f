"""What is compared: each method and each rival, one file each, found by its name."""

import importlib
from typing import Any

from scalabl.errors import UserError

METHODS = ("scalabl", "mle")


def load_method(name: str) -> Any:
    """The module of a method, with `adapter_config(recipe, model)` and `callbacks(recipe, num_examples)`.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}; choose one of {', '.join(METHODS)}.")
    return importlib.import_module(f"scalabl.methods.{name}")
