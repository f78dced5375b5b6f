"""The guard against NaN and Inf: nothing is stepped, nothing is saved."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import arguments, largest_difference, rows, tiny_model, trainer, weights
from transformers import TrainerCallback

from scalabl.core.errors import UserError
from scalabl.training.callback import ELBOCallback
from scalabl.training.monitors import NonFiniteError, NonFiniteGuard


class Poison(TrainerCallback):
    """Writes a NaN into a weight or a gradient of one layer at one step."""

    def __init__(self, step: int, name: str, what: str, event: str = "on_step_begin") -> None:
        self.step, self.name, self.what = step, name, what
        setattr(self, event, self.act)

    def act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            parameter = kwargs["model"].get_parameter(f"base_model.model.{self.name}")
            tensor = parameter.grad if self.what == "gradient" else parameter
            with torch.no_grad():
                tensor.view(-1)[0] = float("nan")


ADAPTER = "model.layers.1.self_attn.v_proj.lora_A.default.posterior.log_std"
BASE = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "what", "event"),
    [
        (ADAPTER, "gradient", "on_pre_optimizer_step"),
        (ADAPTER, "weight", "on_step_begin"),
        (BASE, "weight", "on_step_begin"),  # frozen, and the cause of every other NaN
    ],
)
def test_the_step_and_the_layer_are_named_and_the_last_checkpoint_stays(
    tmp_path: Path, name: str, what: str, event: str
) -> None:
    model = tiny_model()
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-3)
    run = trainer(model, args, [Poison(2, name, what, event), ELBOCallback(8), NonFiniteGuard()])
    with pytest.raises(NonFiniteError, match=rf"at step 3: the {what} of {name}") as error:
        run.train()
    assert isinstance(error.value, UserError)
    assert (error.value.step, error.value.parameter) == (3, name)
    assert sorted(folder for folder in os.listdir(tmp_path) if folder.startswith("checkpoint")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    if what == "gradient":  # the update was not made
        assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_parameters_that_an_update_broke_are_not_saved(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    run = trainer(tiny_model(), args, [Poison(1, ADAPTER, "weight", "on_optimizer_step"), NonFiniteGuard()])
    with pytest.raises(NonFiniteError, match="at step 2: the weight"):
        run.train()
    assert [folder for folder in os.listdir(tmp_path) if folder.startswith("checkpoint")] == ["checkpoint-1"]


def test_a_loss_of_nan_is_met_where_the_gradients_are_zero(tmp_path: Path) -> None:
    data = [{**row, "labels": [-100] * len(row["labels"])} for row in rows(8)]
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=2, logging_nan_inf_filter=False)
    with pytest.raises(NonFiniteError, match="at step 2: the loss .*without a trained token") as error:
        trainer(tiny_model(), args, [NonFiniteGuard()], data).train()
    assert error.value.parameter is None


def test_it_changes_nothing_in_a_healthy_run(tmp_path: Path) -> None:
    finals = []
    for callbacks in ([ELBOCallback(8)], [ELBOCallback(8), NonFiniteGuard()]):
        model = tiny_model()
        trainer(model, arguments(tmp_path), callbacks).train()
        finals.append(weights(model))
    assert largest_difference(*finals) == 0
