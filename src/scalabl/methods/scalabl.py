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
from scalabl.runs.settings import Settings
from scalabl.training.callback import ELBOCallback
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.layers import stochastic_layers
from scalabl.tuner.state import noise_particles


class ScalaBL(TrainedMethod):
    """A posterior over s, the KL's side of the ELBO, and the average over N draws of s (N = 0: its mean)."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        return ScalaBLConfig(
            **lora_options(settings, model),
            covariance=settings.posterior.covariance,  # type: ignore[arg-type]
            prior_mean=settings.posterior.prior_mean,
            prior_std=settings.posterior.prior_std,
            init_sigma=settings.posterior.init_sigma,
            empirical_prior=settings.posterior.empirical_prior,
            unit_rows=settings.posterior.unit_rows,
            draws=settings.posterior.draws,  # type: ignore[arg-type]
            stochastic_modules=settings.posterior.stochastic,
            stochastic_layers=settings.posterior.stochastic_layers,
        )

    def callbacks(self, settings: Settings, num_examples: int) -> list[TrainerCallback]:
        return [
            ELBOCallback(
                num_examples,
                beta=settings.posterior.beta,
                schedule=settings.posterior.schedule,  # type: ignore[arg-type]
                warmup_fraction=settings.posterior.kl_warmup,
                learning_rate=settings.posterior.variational_learning_rate,
                kl=settings.posterior.kl,  # type: ignore[arg-type]
            )
        ]

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        return MonteCarloPredictive(samples, seed=seed) if samples else MeanPredictive()

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        leaves = stochastic_layers(model)
        return noise_particles(
            model, {name: torch.empty(samples, leaf.out_features, device="meta") for name, leaf in leaves.items()}
        )
