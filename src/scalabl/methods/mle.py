"""MLE (Hu et al. 2022, 2106.09685): plain LoRA, trained by likelihood alone.

y = W0 x + (alpha / r) B A x,   minimise -1/N sum_n log p(y_n | x_n, A, B)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, TrainerCallback

from scalabl.core.errors import UserError
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.runs.recipe import Recipe, layer_fraction
from scalabl.tuner.layers import beside_language

if TYPE_CHECKING:
    from scalabl.runs.method import Run


TITLE = "MLE"


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """The adapter that the recipe asks for."""
    return LoraConfig(**shared_options(recipe, model))


def callbacks(recipe: Recipe, num_examples: int) -> list[TrainerCallback]:
    """Nothing beyond the likelihood."""
    return []


def predictive(run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
    """One pass."""
    return MeanPredictive()


def shared_options(recipe: Recipe, model: PreTrainedModel) -> dict:  # type: ignore[type-arg]
    """LoRA's options, equal for every method that is compared.

    Raises:
        UserError: a target matches no module, or more layers are asked for than there are.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    missing = [target for target in recipe.targets if target.rsplit(".", 1)[-1] not in names]
    if missing:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "Linear" in type(m).__name__})
        raise UserError(f"target_modules names {', '.join(missing)}, but this model has {', '.join(linear)}.")
    options = {
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": recipe.targets,
        "task_type": "CAUSAL_LM",
    }
    beside = beside_language(model)
    if beside is not None:
        options["exclude_modules"] = beside
    last = layer_fraction(recipe.layers)
    if last is not None:
        total = model.config.get_text_config().num_hidden_layers
        if last > total:
            raise UserError(f"layers is last:{last}, but the model has {total}; lower it.")
        options["layers_to_transform"] = list(range(total - last, total))
    return options
