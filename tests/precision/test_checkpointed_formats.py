"""Gradient checkpointing on every format: the recomputation carries the very s of the pass before it."""

import pytest
import torch
from formats import Format, adapted, base_in, tokens
from peft import PeftModel
from torch import Tensor

IDS = tokens(3)


def gradients(model: PeftModel, seed: int, autocast: bool) -> dict[str, Tensor]:
    """Of one training step whose draws come from `seed`."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_the_recomputation_draws_the_same_s(form: Format, use_reentrant: bool, autocast: bool) -> None:
    model = adapted(base_in(form), covariance="full")
    plain, again, other = (gradients(model, seed, autocast) for seed in (0, 0, 1))
    assert sum(".posterior." in name for name in plain) == 3 * 6
    spread = {name: _gap(again[name], plain[name]) for name in plain}  # of a format that does not repeat itself
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointed = gradients(model, 0, autocast)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in checkpointed.items():
        assert _gap(gradient, plain[name]) <= spread[name] + 1e-5, name
    sigmas = [name for name in plain if name.endswith("log_std")]
    assert all(_gap(other[name], plain[name]) > 0.05 for name in sigmas), "another draw has another gradient"


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
