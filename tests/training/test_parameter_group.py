"""The variational parameters' own group, which is there in a step and nowhere else."""

import copy

import pytest
import torch
from torch import nn

from scalabl.core.errors import UserError
from scalabl.training.parameter_group import VariationalGroup


def model_and_optimizer(**options: float) -> tuple[nn.ParameterList, torch.optim.Optimizer]:
    parameters = nn.ParameterList([nn.Parameter(torch.full((2,), 1.0 + i)) for i in range(4)])
    groups = [
        {"params": [parameters[0], parameters[1]], "weight_decay": 0.5},
        {"params": [parameters[2], parameters[3]]},
    ]
    return parameters, torch.optim.SGD(groups, lr=0.1, **options)


def test_a_step_uses_the_own_rate_and_no_weight_decay() -> None:
    parameters, optimizer = model_and_optimizer()
    VariationalGroup(optimizer, [parameters[1], parameters[3]], learning_rate=0.02, base_learning_rate=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    moved = [parameter[0].item() - (1.0 + i) for i, parameter in enumerate(parameters)]
    assert moved == pytest.approx([-0.1 * (1 + 0.5 * 1.0), -0.02, -0.1, -0.02], rel=1e-5)


def test_without_a_rate_only_the_weight_decay_goes() -> None:
    parameters, optimizer = model_and_optimizer()
    VariationalGroup(optimizer, [parameters[1]], learning_rate=None, base_learning_rate=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameters[0][0].item() == pytest.approx(1 - 0.15)
    assert parameters[1][0].item() == pytest.approx(2 - 0.1)


def test_the_schedulers_factor_holds_for_the_own_rate() -> None:
    parameters, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    # the base rate is the group's initial_lr, not the one given
    VariationalGroup(optimizer, [parameters[3]], learning_rate=0.8, base_learning_rate=123.0)
    steps = []
    for _ in range(3):
        parameters[3].grad = torch.ones(2)
        before = parameters[3][0].item()
        optimizer.step()
        scheduler.step()
        steps.append(before - parameters[3][0].item())
    assert steps == pytest.approx([0.8, 0.4, 0.2], rel=1e-5)


def test_groups_and_state_dict_are_the_native_ones_between_steps() -> None:
    parameters, optimizer = model_and_optimizer(momentum=0.9)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    contents = [list(group) for group in lists]
    own = VariationalGroup(optimizer, [parameters[0], parameters[3]], learning_rate=0.02, base_learning_rate=0.1)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        assert all(one is other for one, other in zip(optimizer.param_groups, groups, strict=True))
        assert all(group["params"] is list_ for group, list_ in zip(optimizer.param_groups, lists, strict=True))
        for now, then in zip(lists, contents, strict=True):
            assert [id(p) for p in now] == [id(p) for p in then]
        assert optimizer.state_dict()["param_groups"] == before
    # momentum was kept through the moves: 1, then 1 + 0.9
    moved = [optimizer.state[parameters[i]]["momentum_buffer"][0].item() for i in (0, 3)]
    assert moved == pytest.approx([1.9, 1.9])
    own.remove()
    optimizer.step()
    assert parameters[3][0].item() == pytest.approx(4 - 0.02 * 1 - 0.02 * 1.9 - 0.1 * (1 + 0.9 * 1.9), rel=1e-5)


def test_a_step_that_raises_does_not_leave_the_groups_changed_for_good() -> None:
    parameters, optimizer = model_and_optimizer()
    own = VariationalGroup(optimizer, [parameters[0]], learning_rate=0.02, base_learning_rate=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(2)

    def interrupted() -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(interrupted)
    optimizer.step()
    assert parameters[0][0].item() == pytest.approx(1 - 0.02)
    with pytest.raises(MemoryError):
        optimizer.step(interrupted)
    own.remove()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


class AveragedSGD(torch.optim.SGD):
    """SGD whose average is weighed by the squared rates of all steps, as a schedule-free optimiser's is."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["weight_sum"] = group.get("weight_sum", 0.0) + group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z -= group["lr"] * parameter.grad
                parameter.lerp_(z, share)


@pytest.mark.parametrize("rate", [0.02, None])
def test_an_optimiser_that_averages_by_the_rates_of_its_group(rate: float | None) -> None:
    parameters = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
    optimizer = AveragedSGD(parameters, lr=0.1)
    optimizer.param_groups[0]["weight_sum"] = 0.0
    VariationalGroup(optimizer, [parameters[1]], learning_rate=rate, base_learning_rate=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    if rate is None:
        for _ in range(3):
            optimizer.step()
        assert torch.equal(parameters[0], parameters[1])  # one rate, one average
    else:
        with pytest.raises(UserError, match="AveragedSGD keeps weight_sum of a learning rate.* learning_rate=None"):
            optimizer.step()
        assert len(optimizer.param_groups) == 1
