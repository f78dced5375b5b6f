"""BLoB (Wang et al. 2024, 2406.11675): a Gaussian on each number of A, learnt by backpropagation.

    q(A) = prod_ij N(A_ij; M_ij, G_ij^4),   G ~ U(eps / sqrt(2), eps) at first,   p(A) = N(0, 0.2^2)
    KL(q || p) = sum_ij log(p_std / sigma_ij) + (sigma_ij^2 + M_ij^2) / (2 p_std^2) - 1/2

The likelihood's gradient goes through the trainer's optimiser with one flipout draw a pass. The KL has, as in the
paper, a plain gradient step of its own after it, on M and G alone, weighted by pi_i = 2^i / (2^(m+1) - 1) over cycles
of m = 100 N^(pi/gamma) / batch steps, and by the trainer's learning-rate schedule. Its gradient has a closed form.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalabl.core import processes
from scalabl.methods.plain import lora_options
from scalabl.posterior.gaussian import Prior
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.lora_particles import blob_draws, empty_noise
from scalabl.runs.method import Run, TrainedMethod
from scalabl.runs.settings import Settings
from scalabl.training.kl import Schedule, kl_weight
from scalabl.training.monitors import LogContributor
from scalabl.training.parameter_group import innermost
from scalabl.training.ranks import separate_noise
from scalabl.training.refusals import refuse_flattened_batches, refuse_hidden_gradients
from scalabl.tuner.blob import BLoBConfig, BLoBProjection, blob_layers
from scalabl.tuner.layers import prior_of, require_live

GAMMA = 8.0


class BLoB(TrainedMethod):
    """A Gaussian on A, the KL's own step, and the average over N draws of A, with neither flipout nor fresh noise."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        return BLoBConfig(
            **lora_options(settings, model),
            prior_std=settings.posterior.prior_std,
            init_eps=settings.posterior.init_sigma,
        )

    def callbacks(self, settings: Settings, num_examples: int) -> list[TrainerCallback]:
        of_process = settings.optimisation.batch_size * settings.optimisation.gradient_accumulation
        return [
            KLStepCallback(
                cycle_steps(num_examples, of_process * processes.world_size()),
                learning_rate=settings.posterior.variational_learning_rate,
                beta=settings.posterior.beta,
                schedule=settings.posterior.schedule,  # type: ignore[arg-type]
                warmup_fraction=settings.posterior.kl_warmup,
            )
        ]

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        return blob_draws(run.model, samples=samples, seed=seed) if samples else MeanPredictive()

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        return empty_noise(model, samples, [f"{name}.lora_A" for name in blob_layers(model)])


def cycle_steps(num_examples: int, batch_size: int, gamma: float = GAMMA) -> int:
    """m + 1, the steps of a cycle of the KL's weights, with m = int(100 N^(pi / gamma) / batch) [BLoB, appendix]."""
    return 1 + max(1, int(100 * num_examples ** (math.pi / gamma) / batch_size))


class KLStepCallback(LogContributor):
    """After each optimiser step, a gradient step on pi_i KL(q || p): the second optimiser of the paper.

    Training logs gain "elbo/kl" (nats), "elbo/nll" (the trainer's loss), "elbo/kl_weight" and "elbo/sigma_mean".

    Args:
        cycle: steps of a cycle, m + 1; the weights of one cycle sum to 1.
        learning_rate: of the step, at a schedule factor of 1.
        beta: multiplies the KL.
        schedule: "minibatch" (pi_i), "elbo" (1 / (m + 1) at every step) or "warmup".
        warmup_fraction: of all steps, over which "warmup" rises.

    Raises:
        UserError: at the start of training: no BLoB layer, an engine that hides weights, packed batches.
    """

    def __init__(
        self,
        cycle: int,
        *,
        learning_rate: float,
        beta: float = 1.0,
        schedule: Schedule = "minibatch",
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        self.cycle = cycle
        self.learning_rate = learning_rate
        self.beta = beta
        self.schedule: Schedule = schedule
        self.warmup_fraction = warmup_fraction
        self._layers: dict[str, BLoBProjection] = {}
        self._prior = Prior(0.0, 0.2)
        self._weight = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_live(kwargs["model"])
        self._layers = blob_layers(kwargs["model"])
        self._prior = prior_of(kwargs["model"])
        refuse_hidden_gradients(args, kwargs["model"], kwargs["optimizer"])
        refuse_flattened_batches(args, kwargs.get("train_dataloader"))
        separate_noise(args)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the shares of a cycle sum to its length
        self._weight = kl_weight(
            self.schedule,
            state.global_step,
            num_examples=self.cycle,
            total_steps=state.max_steps,
            cycle=self.cycle,
            warmup_fraction=self.warmup_fraction,
            beta=self.beta,
        )
        group = innermost(kwargs["optimizer"]).param_groups[0]
        factor = group["lr"] / group.get("initial_lr", args.learning_rate)
        rate = self.learning_rate * factor * self._weight
        if rate > 0:
            for leaf in self._layers.values():
                kl_step(leaf, self._prior, rate)

    @torch.no_grad()
    def log_values(self, logs: dict[str, Any]) -> dict[str, float]:
        leaves = list(self._layers.values())
        if not leaves:
            return {}
        kl = sum(leaf.kl(self._prior).item() for leaf in leaves)
        sigma = torch.stack([leaf.posterior.std.mean() for leaf in leaves]).mean().item()
        return {"kl": kl, "nll": float(logs["loss"]), "kl_weight": self._weight, "sigma_mean": sigma}


@torch.no_grad()
def kl_step(leaf: BLoBProjection, prior: Prior, rate: float) -> None:
    """M and G, one step down the KL's gradient.

    G stops at the KL's minimum, sqrt(p_std): its gradient is unbounded near 0, and a number that the likelihood has
    brought there would be thrown far beyond it.
    """
    of_mean, of_g = leaf.kl_gradient(prior)
    g, lowest = leaf.posterior.g, math.sqrt(prior.std)
    sign = torch.where(g < 0, -1.0, 1.0)
    stepped = sign * (g.float() - rate * of_g)
    size = torch.where(g.abs() < lowest, stepped.clamp_max(lowest), stepped.clamp_min(lowest))
    leaf.weight.sub_((rate * of_mean).to(leaf.weight.dtype))
    g.copy_(sign * size)
