"""What is compared: each method and each rival, one file each, found by its name. Imports no torch.

A trained method has a training run of its own (`scalabl train --method NAME`); a post-hoc method is fitted on the
finished run of another, and its files lie in that run's directory. `scalabl.runs.method` holds the interface.
"""

from __future__ import annotations

from typing import Any

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
