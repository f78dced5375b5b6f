"""ScalaBL (Samplawski et al. 2025, 2506.21408): a Gaussian over the r numbers of each layer, learnt by variational
inference.

    q(s) = N(s_mu, diag(s_sigma^2)) or N(s_mu, Sigma),   maximise E_q[log p(y | x, s)] - KL(q || p)
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback

from scalabl.methods.plain import lora_options
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.method import Run, TrainedMethod
from scalabl.runs.recipe import Recipe
from scalabl.training.callback import ELBOCallback
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.layers import stochastic_layers
from scalabl.tuner.state import noise_particles


class ScalaBL(TrainedMethod):
    """A posterior over s, the KL's side of the ELBO, and the average over N draws of s (N = 0: its mean)."""

    def adapter_config(self, recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
        return ScalaBLConfig(
            **lora_options(recipe, model),
            covariance=recipe.covariance,  # type: ignore[arg-type]
            prior_mean=recipe.prior_mean,
            prior_std=recipe.prior_std,
            init_sigma=recipe.init_sigma,
            empirical_prior=recipe.empirical_prior,
            unit_rows=recipe.unit_rows,
            draws=recipe.draws,  # type: ignore[arg-type]
            stochastic_modules=recipe.stochastic,
            stochastic_layers=recipe.stochastic_layers,
        )

    def callbacks(self, recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
        return [
            ELBOCallback(
                num_examples,
                beta=recipe.beta,
                schedule=recipe.schedule,  # type: ignore[arg-type]
                warmup_fraction=recipe.kl_warmup,
                learning_rate=recipe.variational_learning_rate,
                kl=recipe.kl,  # type: ignore[arg-type]
            )
        ]

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        return MonteCarloPredictive(samples, seed=seed) if samples else MeanPredictive()

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        leaves = stochastic_layers(model)
        return noise_particles(
            model, {name: torch.empty(samples, leaf.out_features, device="meta") for name, leaf in leaves.items()}
        )
