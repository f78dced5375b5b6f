"""LoRA as PEFT trains it, and the methods that are one setting away from it.

MLE (Hu et al. 2022, 2106.09685): plain LoRA, trained by likelihood alone.

    y = W0 x + (alpha / r) B A x,   minimise -1/N sum_n log p(y_n | x_n, A, B)

MAP: weight decay on A and B, a Gaussian prior at its mode; decoupled (Loshchilov and Hutter 2019, 1711.05101), as the
Bayesian LoRA papers have it.

    theta <- theta - lr (AdamW's step + weight_decay theta),   weight_decay = 0.01

MC dropout (Gal and Ghahramani 2016, 1506.02142): LoRA's dropout trained with, and kept on at test.

    p(y | x) = 1/N sum_n p(y | x, A diag(z_n), B),   z_n ~ Bernoulli(1 - p) / (1 - p),   p = 0.1

Only LoRA's own dropout: that of the base model and of a classification head is off at test, as for every method.

MonteCLoRA (Seth et al. 2025, 2411.04358), PEFT's own implementation: the witness from outside. Its KL and entropy terms
are added to the loss by PEFT's `MontecloraTrainerMixin`. PEFT draws nothing once training is over: the adapter is then
a plain LoRA, so that it predicts with its mean.

    A -> sum_k pi_k (A + eps_k),   eps_k ~ N(0, Sigma),   Sigma ~ Wishart,   pi ~ Dirichlet
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, MontecloraConfig, PeftConfig, PeftModel
from peft.helpers import MontecloraTrainerMixin
from transformers import PreTrainedModel, Trainer

from scalabl.core.errors import UserError
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.lora_particles import DropoutPredictive, input_masks, lora_parts
from scalabl.runs.method import Run, TrainedMethod
from scalabl.runs.settings import ALL_LINEAR, AdapterSettings, Settings, layer_fraction
from scalabl.tuner.layers import beside_language, beside_layers, decoder_layers, head_modules, sequence_classifier


class PlainLoRA(TrainedMethod):
    """MLE: nothing beyond the likelihood, and one pass."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        return LoraConfig(**lora_options(settings, model))


class MAP(PlainLoRA):
    """The trainer gives weight decay to matrices, so to A and B."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        if settings.optimisation.weight_decay == 0:
            raise UserError("map is plain LoRA with weight decay, but weight_decay is 0; 0.01 is the usual choice.")
        return super().adapter_config(settings, model)


class MCDropout(PlainLoRA):
    """The average over N fixed masks at the training's own probability; N = 0 leaves dropout off."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        if settings.adapter.lora_dropout == 0:
            raise UserError("mc_dropout is trained with dropout, but lora_dropout is 0; 0.1 is the usual choice.")
        return super().adapter_config(settings, model)

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        p = float(run.record.recipe["lora_dropout"])
        return DropoutPredictive(p, samples=samples, seed=seed) if samples else MeanPredictive()

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        parts = lora_parts(model)
        return input_masks(model, {n: torch.empty(samples, p.a.shape[1], device="meta") for n, p in parts.items()})


class MonteCLoRA(PlainLoRA):
    """PEFT's Monte Carlo variant at its defaults, predicting with its mean."""

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        return LoraConfig(**lora_options(settings, model), monteclora_config=MontecloraConfig())

    def trainer_class(self, base: type[Trainer]) -> type[Trainer]:
        """The trainer with the method's own terms in its loss, as PEFT documents it."""
        made: Any = type(f"MonteCLoRA{base.__name__}", (MontecloraTrainerMixin, base), {})
        return made  # type: ignore[no-any-return]


def lora_options(settings: Settings, model: PreTrainedModel) -> dict[str, Any]:
    """LoRA's options, equal for every method that is compared.

    Raises:
        UserError: a target matches no module, or more layers are asked for than there are.
    """
    head = head_modules(model)
    options: dict[str, Any] = {
        "r": settings.adapter.r,
        "lora_alpha": settings.adapter.lora_alpha,
        "lora_dropout": settings.adapter.lora_dropout,
        "target_modules": _targets(settings, model),
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
    }
    if head:
        options |= {"modules_to_save": head, "exclude_modules": beside_layers(model)}
    elif (beside := beside_language(model)) is not None:
        options["exclude_modules"] = beside
    last = layer_fraction(settings.adapter.layers)
    if last is not None:
        total = model.config.get_text_config().num_hidden_layers
        if last > total:
            raise UserError(f"layers is last:{last}, but the model has {total}; lower it.")
        options["layers_to_transform"] = list(range(total - last, total))
    return options


def _targets(settings: Settings, model: PreTrainedModel) -> list[str]:
    """The modules to adapt, by the ends of their names. "all-linear" are the linear ones of the model's layers; so are
    the defaults in an encoder, which names its projections otherwise."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = settings.adapter.targets
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in names]
    unnamed = settings.adapter.target_modules == AdapterSettings.target_modules and len(missing) == len(targets)
    if targets == [ALL_LINEAR] or (unnamed and sequence_classifier(model) is not None):
        inside = decoder_layers(model).named_modules()
        return sorted({n.rsplit(".", 1)[-1] for n, m in inside if "Linear" in type(m).__name__})
    if missing:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__})
        raise UserError(f"target_modules names {', '.join(missing)}, but this model has {', '.join(linear)}.")
    if sequence_classifier(model) is not None:
        beside, every = re.compile(beside_layers(model)), [name for name, _ in model.named_modules()]
        for target in targets:
            if all(beside.fullmatch(name) for name in every if f".{name}".endswith(f".{target}")):
                raise UserError(
                    f"target_modules names {target}, which stands in none of the model's layers: adapters are on these "
                    "alone, and what stands behind them, the head, is trained whole; leave it out."
                )
    return targets
