"""fp16's loss scaler: the KL's gradient is neither scaled up nor divided by the scale."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tiny_run import arguments, rows, tiny_model, weights
from transformers import TrainerControl, TrainerState

import scalabl
from scalabl.training.callback import ELBOCallback
from scalabl.tuner import kl_divergence

SCALE = 1024.0


def one_step(
    directory: Any, *, scaled: bool, clip_first: bool = False, poison: bool = False
) -> dict[str, torch.Tensor]:
    """One hand-driven optimiser step of SGD at rate 1 and the weights after it."""
    model, callback, args = tiny_model(), ELBOCallback(8, learning_rate=1.0), arguments(directory, learning_rate=1.0)
    Accelerator(cpu=True)  # AcceleratedOptimizer asks for its state
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    state, control = TrainerState(max_steps=1), TrainerControl()
    event = {"model": model, "optimizer": optimizer, "train_dataloader": None}
    callback.on_train_begin(args, state, control, **event)
    ids = torch.tensor([row["input_ids"][:5] for row in rows(4)])
    with scalabl.mean(model):
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    if poison:
        next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
    if clip_first:
        scaler.unscale_(inner)  # what Accelerator.clip_grad_norm_ does
    callback.on_pre_optimizer_step(args, state, control, **event)
    optimizer.step()
    callback.on_train_end(args, state, control, **event)
    return weights(model)


@pytest.mark.parametrize("clip_first", [False, True])
def test_a_scaled_step_equals_an_unscaled_one(tmp_path: Any, clip_first: bool) -> None:
    plain = one_step(tmp_path, scaled=False)
    scaled = one_step(tmp_path, scaled=True, clip_first=clip_first)
    assert plain.keys() == scaled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-5, atol=1e-7)
    start = tiny_model()
    kl_divergence(start).backward()
    moved = {name: start.get_parameter(name).detach() - value for name, value in plain.items()}
    name = next(name for name in moved if "log_std" in name)  # without a likelihood gradient in the mean state
    torch.testing.assert_close(moved[name], start.get_parameter(name).grad / 8, rtol=1e-4, atol=1e-6)


def test_an_overflow_is_still_seen_by_the_scaler(tmp_path: Any) -> None:
    after = one_step(tmp_path, scaled=True, poison=True)
    for name, value in weights(tiny_model()).items():
        assert torch.equal(after[name], value)  # the step was skipped
