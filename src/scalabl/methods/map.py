"""MAP: plain LoRA with weight decay on A and B, a Gaussian prior at its mode.

    theta <- theta - lr (AdamW's step + weight_decay theta),   weight_decay = 0.01

Decoupled decay (Loshchilov and Hutter 2019, 1711.05101), as the Bayesian LoRA papers have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, TrainerCallback

from scalabl.core.errors import UserError
from scalabl.methods.mle import shared_options
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.runs.recipe import Recipe

if TYPE_CHECKING:
    from scalabl.runs.method import Run


TITLE = "MAP"


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """A plain LoRA; the decay is the trainer's own.

    Raises:
        UserError: the recipe has no weight decay, which would be MLE.
    """
    if recipe.weight_decay == 0:
        raise UserError("map is plain LoRA with weight decay, but weight_decay is 0; 0.01 is the usual choice.")
    return LoraConfig(**shared_options(recipe, model))


def callbacks(recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
    """Nothing: the trainer gives weight decay to matrices, so to A and B."""
    return []


def predictive(run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
    """One pass."""
    return MeanPredictive()
