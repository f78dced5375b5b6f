"""Adapters as stock PEFT makes them, and a ScalaBL model whose logits are linear in s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import loaded, questions
from torch import Tensor

from scalabl.scoring import Batch, Letters, Scorer
from scalabl.training.posthoc.svd import StochasticLeaves, factors_of
from scalabl.tuner import stochastic_layers
from scalabl.tuner.projection import Values


def plain_adapter(directory: Path, architecture: str = "llama", *, zero_columns: int = 0, **options: Any) -> Path:
    """A directory written by stock PEFT's `save_pretrained`; every layer's B loses its first `zero_columns` columns."""
    base, _ = loaded(architecture)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
                parameter[:, :zero_columns] = 0
            elif parameter.requires_grad and "lora_A" not in name:  # trained biases and whole modules
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return directory


def bayesian(directory: Path) -> tuple[PeftModel, StochasticLeaves]:
    """A plain adapter on its base, and the leaves that make it Bayesian."""
    base, _ = loaded()
    model = PeftModel.from_pretrained(base, str(directory)).eval()
    return model, StochasticLeaves(factors_of(model))


def letters(model: PeftModel) -> tuple[Scorer, Batch]:
    """The model scored by letters, and a batch of questions with 3 to 5 choices."""
    _, tokenizer = loaded()
    scorer = Scorer(model, Letters(tokenizer))
    return scorer, scorer.scoring.collate([scorer.scoring.encode(row) for row in questions(9)])


def class_logits_at(scorer: Scorer, batch: Batch, s: Tensor) -> Tensor:
    """Class logits (B, C) with the same s (D,) in every row, layers behind each other; differentiable in s."""
    leaves = stochastic_layers(scorer.model)
    before = {name: leaf.state for name, leaf in leaves.items()}
    parts = s.split([leaf.out_features for leaf in leaves.values()])
    try:
        for leaf, part in zip(leaves.values(), parts, strict=True):
            leaf.state = Values(part.float().expand(len(batch), -1))
        return scorer.class_logits(batch)
    finally:
        for name, leaf in leaves.items():
            leaf.state = before[name]


def negative_log_likelihood(scorer: Scorer, batch: Batch, s: Tensor) -> Tensor:
    """-sum_n log p(y_n | x_n, s)."""
    log_probs = class_logits_at(scorer, batch, s).double().log_softmax(-1)
    return -log_probs.gather(-1, batch.answers[:, None]).sum()
