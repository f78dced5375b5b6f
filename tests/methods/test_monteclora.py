"""MonteCLoRA is PEFT's: its loss is in ours, and what it predicts is its mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_base import loaded, questions

from scalabl.predictive import MeanPredictive
from scalabl.runs.loading import load_run
from scalabl.runs.method import load_method
from scalabl.runs.settings import make_settings
from scalabl.scoring.scorer import make_scoring
from scalabl.training.trainer import ChoiceTrainer, collate


def test_the_loss_is_ours_and_the_methods_own() -> None:
    (base, tokenizer), monteclora = loaded(), load_method("monteclora")
    model = get_peft_model(base, monteclora.adapter_config(make_settings({"method": "monteclora"}), base)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    scoring = make_scoring({"scoring": "continuation"}, tokenizer)
    inputs = collate(scoring, [scoring.encode(row) for row in questions(4)])
    trainer: Any = object.__new__(monteclora.trainer_class(ChoiceTrainer))
    trainer.scoring, trainer.trunk = scoring, None
    torch.manual_seed(0)
    draws = [layer.lora_monteclora_sampler["default"].sampler for layer in model.modules() if _samples(layer)]

    def loss(of: Any) -> torch.Tensor:
        for buffer in draws:
            buffer.index = 0  # the same noise in every pass
        return of(trainer, model, dict(inputs))

    plain, whole = loss(ChoiceTrainer.compute_loss), loss(type(trainer).compute_loss)
    own = model.base_model._get_monteclora_loss()
    assert own.item() != 0
    torch.testing.assert_close(whole - plain, own, rtol=1e-3, atol=1e-6)
    whole.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "std_prior" in n}
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients.values())


def _samples(layer: torch.nn.Module) -> bool:
    return hasattr(layer, "lora_monteclora_sampler")


def test_its_own_numbers_are_saved_and_counted_and_its_prediction_is_its_mean(trained: Callable[..., Path]) -> None:
    directory = trained("monteclora")
    names = load_file(directory / "adapter_model.safetensors")
    own = sum(t.numel() for n, t in names.items() if "std_prior" in n or "expert_weights_prior" in n)
    run = load_run(directory)
    assert own == run.record.parameters["variational"] > 0
    assert isinstance(run.predictive(samples=10), MeanPredictive)
    weights = {n: p for n, p in run.scorer.model.named_parameters() if "std_prior" in n}
    for name, value in names.items():
        if "std_prior" in name:
            inside = next(p for n, p in weights.items() if n.replace(".default", "") == name)
            torch.testing.assert_close(inside.detach(), value)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_repeats_itself(seed: int, trained: Callable[..., Path]) -> None:
    one, other = trained("monteclora", seed=seed), trained("monteclora", seed=seed, save_steps=49)
    first, second = (load_file(d / "adapter_model.safetensors") for d in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
