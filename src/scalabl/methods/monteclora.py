"""MonteCLoRA (Seth et al. 2025, 2411.04358), PEFT's own implementation: the witness from outside.

    A -> sum_k pi_k (A + eps_k),   eps_k ~ N(0, Sigma),   Sigma ~ Wishart,   pi ~ Dirichlet

while training; its KL and entropy terms are added to the loss by PEFT's `MontecloraTrainerMixin`. PEFT draws nothing
once training is over: the adapter is then a plain LoRA, so that it predicts with its mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig, MontecloraConfig, PeftConfig
from peft.helpers import MontecloraTrainerMixin
from transformers import PreTrainedModel, Trainer, TrainerCallback

from scalabl.methods.mle import shared_options
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.runs.recipe import Recipe

if TYPE_CHECKING:
    from scalabl.runs.method import Run


TITLE = "MonteCLoRA (mean)"


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """A LoRA with PEFT's Monte Carlo variant at its defaults."""
    return LoraConfig(**shared_options(recipe, model), monteclora_config=MontecloraConfig())


def callbacks(recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
    """Nothing: the loss carries the method's own terms."""
    return []


def trainer_class(base: type[Trainer]) -> type[Trainer]:
    """The trainer with the method's own terms in its loss, as PEFT documents it."""
    made: Any = type(f"MonteCLoRA{base.__name__}", (MontecloraTrainerMixin, base), {})
    return made  # type: ignore[no-any-return]


def predictive(run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
    """One pass with the mean: PEFT's sampler works while training alone."""
    return MeanPredictive()
