"""What is compared: each method and each rival, one file each, found by its name. Imports no torch.

A trained method has a training run of its own (`scalabl train --method NAME`); a post-hoc method is fitted on the
finished run of another, and its files lie in that run's directory. `scalabl.methods.base` holds the interface.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scalabl.errors import UserError

if TYPE_CHECKING:
    from scalabl.methods.base import PostHocMethod, TrainedMethod

TRAINED = ("scalabl", "mle", "map", "mc_dropout", "blob", "monteclora")
POST_HOC = ("temperature", "ensemble", "laplace", "tfb", "subspace_laplace")
METHODS = (*TRAINED, *POST_HOC)
# those whose predictive is an average over particles, each a forward pass of its own
SAMPLED = ("scalabl", "mc_dropout", "blob", "tfb")

# each method's own settings, where they are not the recipe's defaults; what is given explicitly wins
SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"weight_decay": 0.01},
    "mc_dropout": {"lora_dropout": 0.1},
    "blob": {"prior_std": 0.2, "init_sigma": 0.05, "variational_learning_rate": 0.01, "schedule": "minibatch"},
}


def load_method(name: str) -> TrainedMethod:
    """The module of a trained method.

    Raises:
        UserError: there is no such method, or it is not a trained one.
    """
    if name in POST_HOC:
        raise UserError(f"{name} is not trained but fitted on a finished run; choose one of {', '.join(TRAINED)}.")
    if name not in TRAINED:
        raise UserError(f"There is no method {name!r}; choose one of {', '.join(TRAINED)}.")
    module: Any = importlib.import_module(f"scalabl.methods.{name}")
    return module  # type: ignore[no-any-return]


def load_post_hoc(name: str) -> PostHocMethod:
    """The module of a post-hoc method.

    Raises:
        UserError: there is no such method, or it is not a post-hoc one.
    """
    if name in TRAINED:
        raise UserError(f"{name} has a training run of its own; fitted on a finished one are {', '.join(POST_HOC)}.")
    if name not in POST_HOC:
        raise UserError(f"There is no method {name!r}; choose one of {', '.join(POST_HOC)}.")
    module: Any = importlib.import_module(f"scalabl.methods.{name}")
    return module  # type: ignore[no-any-return]
