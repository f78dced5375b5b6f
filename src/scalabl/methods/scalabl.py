"""ScalaBL: a Gaussian over the r numbers of each layer, learnt by stochastic variational inference."""

from __future__ import annotations

from peft import PeftConfig
from transformers import PreTrainedModel, TrainerCallback

from scalabl.methods.mle import shared_options
from scalabl.training.callback import ELBOCallback
from scalabl.training.recipe import Recipe
from scalabl.tuner import ScalaBLConfig


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """The adapter that the recipe asks for."""
    return ScalaBLConfig(
        **shared_options(recipe, model),
        covariance=recipe.covariance,  # type: ignore[arg-type]
        prior_std=recipe.prior_std,
        init_sigma=recipe.init_sigma,
        unit_rows=recipe.unit_rows,
    )


def callbacks(recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
    """The KL's side of the ELBO."""
    return [
        ELBOCallback(
            num_examples,
            beta=recipe.beta,
            schedule=recipe.schedule,  # type: ignore[arg-type]
            learning_rate=recipe.variational_learning_rate,
        )
    ]
