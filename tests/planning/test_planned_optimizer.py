"""Bytes of optimiser states are those that the optimisers themselves make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from scalabl.planning.meta_model import optimizer_bytes

SHAPES = ((8, 1000), (8, 8), (8,), (64, 64), (3, 5, 1000))


def made(name: str, directory: Path) -> tuple[Any, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    holder = nn.Module()
    holder.weights = nn.ParameterList(parameters)
    arguments = TrainingArguments(output_dir=str(directory), optim=name, use_cpu=True, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, holder)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return kind(parameters, **options), parameters


def state_bytes(optimizer: Any) -> int:
    """Of all tensors of the states but counters and the code books that are shared by all of them."""
    own = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in ("step", "qmap1", "qmap2", "RMS")
    ]
    return sum(value.numel() * value.element_size() for value in own)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_torchs_own(name: str, tmp_path: Path) -> None:
    optimizer, parameters = made(name, tmp_path)
    optimizer.step()
    assert optimizer_bytes(name, parameters) == state_bytes(optimizer)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize(
    "name",
    [
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "ademamix",
        "ademamix_8bit",
    ],
)
def test_bitsandbytes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    optimizer, parameters = made(name, tmp_path)
    (group,) = optimizer.param_groups
    for index, parameter in enumerate(parameters):
        optimizer.init_state(group, parameter, 0, index)
    assert optimizer_bytes(name, parameters) == state_bytes(optimizer)


def test_frozen_parameters_have_no_state() -> None:
    frozen = nn.Parameter(torch.ones(10), requires_grad=False)
    assert optimizer_bytes("adamw_torch", [frozen, nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]) == 2 * 3 * 2
