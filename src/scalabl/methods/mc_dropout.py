"""MC dropout (Gal and Ghahramani 2016, 1506.02142): LoRA's dropout trained with, and kept on at test.

p(y | x) = 1/N sum_n p(y | x, A diag(z_n), B),   z_n ~ Bernoulli(1 - p) / (1 - p),   p = 0.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, TrainerCallback

from scalabl.core.errors import UserError
from scalabl.methods.mle import shared_options
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.lora_particles import DropoutPredictive
from scalabl.runs.recipe import Recipe

if TYPE_CHECKING:
    from scalabl.runs.method import Run


TITLE = "MC dropout"


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """A plain LoRA with dropout.

    Raises:
        UserError: the recipe has no dropout, which would be MLE.
    """
    if recipe.lora_dropout == 0:
        raise UserError("mc_dropout is trained with dropout, but lora_dropout is 0; 0.1 is the usual choice.")
    return LoraConfig(**shared_options(recipe, model))


def callbacks(recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
    """Nothing beyond the likelihood."""
    return []


def predictive(run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
    """The average over N fixed masks at the training's own probability; N = 0 leaves dropout off."""
    p = float(run.record["recipe"]["lora_dropout"])
    return DropoutPredictive(p, samples=samples, seed=seed) if samples else MeanPredictive()
