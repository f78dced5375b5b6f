"""Variational inference on the mean and sigma of s alone, A and B frozen.

    maximise E_q[log p(y | x, s)] - KL(q || p),   q(s) = N(s_mu, Sigma), started at s_mu = 1       [ScalaBL, ELBO]

The trainer and the KL's callback are those of `scalabl train`. The mean moves too, so that the mean prediction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from scalabl.scoring import Encoded, Scorer
from scalabl.training.recipe import Recipe
from scalabl.training.run import optimise
from scalabl.tuner import stochastic_layers


def fit_variational(recipe: Recipe, scratch: Path, scorer: Scorer, rows: Sequence[Encoded]) -> list[dict[str, float]]:
    """Train the posterior of a loaded ScalaBL adapter in place.

    Args:
        recipe: steps, batch size, learning rate and the KL's schedule.
        scratch: a directory for the trainer's files.
        scorer: the model.
        rows: encoded rows with answers.

    Returns:
        what the trainer logged.

    Raises:
        Interrupted: Ctrl-C.
    """
    model: PeftModel = scorer.model
    model.requires_grad_(False)
    for leaf in stochastic_layers(model).values():
        leaf.posterior.requires_grad_(True)
    log = optimise(recipe, scratch, model, scorer.scoring, scorer.trunk, list(rows))
    model.eval()
    return log
