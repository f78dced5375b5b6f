"""Paged and 8-bit optimisers: the r numbers keep 32-bit states and their own rate, A and B get the 8-bit ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from formats import saved_base
from tiny_base import write_task
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.runs.settings import Settings
from scalabl.training.parameter_group import VariationalGroup
from scalabl.training.refusals import require_optimizer
from scalabl.training.run import train
from scalabl.tuner import StochasticProjection

bnb = pytest.importorskip("bitsandbytes")
RATE, OWN = 1e-3, 2e-2


def leaf() -> StochasticProjection:
    """A of 4 x 1,024 numbers, as few as have an 8-bit state, and 4 means and sigmas."""
    torch.manual_seed(0)
    return StochasticProjection(torch.randn(4, 1024))


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(module: StochasticProjection, optimizer: Any, number: int, first: int = 0) -> None:
    for step in range(first, first + number):
        gradients(module, step)
        optimizer.step()


def grouped(module: StochasticProjection, optimizer: Any) -> VariationalGroup:
    return VariationalGroup(optimizer, module.posterior.parameters(), learning_rate=OWN, base_learning_rate=RATE)


def states(optimizer: Any, parameter: Tensor) -> set[torch.dtype]:
    return {optimizer.state[parameter][name].dtype for name in ("state1", "state2")}


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit])
def test_large_tensors_have_8_bit_states_and_the_r_numbers_32_bit_ones(kind: Any) -> None:
    module = leaf()
    optimizer = kind(module.parameters(), lr=RATE)
    grouped(module, optimizer)
    steps(module, optimizer, 2)
    assert states(optimizer, module.direction) == {torch.uint8}
    for parameter in module.posterior.parameters():
        assert states(optimizer, parameter) == {torch.float32}


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW32bit])
def test_the_r_numbers_take_the_steps_of_adamw_with_their_own_rate_and_no_decay(kind: Any) -> None:
    """Beside torch's AdamW on the same gradients, in a group of their own from the start."""
    module, twin = leaf(), leaf()
    optimizer = kind(module.parameters(), lr=RATE, weight_decay=0.5)
    grouped(module, optimizer)
    reference = torch.optim.AdamW(twin.posterior.parameters(), lr=OWN, weight_decay=0.0)
    for step in range(5):
        steps(module, optimizer, 1, first=step)
        gradients(twin, step)
        reference.step()
    for own, expected in zip(module.posterior.parameters(), twin.posterior.parameters(), strict=True):
        assert torch.allclose(own, expected, atol=1e-6)
    # the others got the native rate and the decay
    untouched = leaf().direction
    decayed = untouched * (1 - RATE * 0.5) ** 5
    assert (module.direction - decayed).abs().max() < 6 * RATE
    assert (module.direction - untouched).abs().max() > 0


def test_groups_are_the_native_ones_between_steps_and_a_saved_state_goes_on() -> None:
    module, twin = leaf(), leaf()
    optimizer, other = (bnb.optim.PagedAdamW8bit(m.parameters(), lr=RATE) for m in (module, twin))
    group = grouped(module, optimizer)
    steps(module, optimizer, 3)
    assert [len(g["params"]) for g in optimizer.param_groups] == [3]
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(optimizer.state_dict())
    grouped(twin, other)
    for m, o in ((module, optimizer), (twin, other)):
        steps(m, o, 3, first=3)
    for one, again in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, again)
    group.remove()
    before = module.posterior.log_std.detach().clone()
    steps(module, optimizer, 1, first=9)
    assert (module.posterior.log_std - before).abs().max() < 2 * RATE, "without the group, the native rate"


def test_torchao_keeps_its_rate_as_a_tensor_and_the_group_goes_with_it() -> None:
    AdamW8bit = pytest.importorskip("torchao.optim").AdamW8bit
    module = leaf()
    optimizer = AdamW8bit(module.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    grouped(module, optimizer)
    moved = []
    with torch.compiler.set_stance("force_eager"):
        for step in range(2):
            gradients(module, 0)
            before = module.posterior.log_std.detach().clone()
            optimizer.step()
            scheduler.step()
            moved.append((module.posterior.log_std - before).abs().mean().item())
            assert [len(g["params"]) for g in optimizer.param_groups] == [3], step
    assert moved == pytest.approx([OWN, OWN / 2], rel=1e-3)


def settings_of(task: Path, **changes: Any) -> Settings:
    settings: dict[str, Any] = {
        "model": str(saved_base()), "data": str(task), "steps": 12, "batch_size": 4, "save_steps": 4, "r": 4,
        "scoring": "continuation", "normalization": "token", "validation_rows": 4, "learning_rate": 1e-2,
        "optimizer": "paged_adamw_8bit",
    }  # fmt: skip
    return Settings.flat(**{**settings, **changes})


def test_a_run_with_a_paged_8_bit_optimiser_is_the_one_of_adamw(tmp_path: Path) -> None:
    """No tensor of the tiny model is large enough for 8 bit, so that both take the same steps but for rounding."""
    from safetensors.torch import load_file

    task = write_task(tmp_path / "task")
    runs = {}
    for optimizer in ("paged_adamw_8bit", "adamw_torch"):
        train(settings_of(task, optimizer=optimizer), tmp_path / optimizer)
        runs[optimizer] = load_file(tmp_path / optimizer / "adapter_model.safetensors")
    ours, theirs = runs.values()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        gap = (value - theirs[name]).abs().max()
        assert gap <= 1e-3 * theirs[name].abs().max(), (name, gap)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("paged_adamw_9bit", r"optimizer is 'paged_adamw_9bit'; it must be one of adamw_torch, "),
        ("galore_adamw", r"galore_adamw projects or applies gradients in the backward pass"),
        ("adalomo", r"adalomo projects or applies gradients in the backward pass"),
        ("adamw_torch_npu_fused", r"cannot take a step on this machine \(cpu\): .*; choose another one"),
    ],
)
def test_an_optimiser_that_cannot_train_here_is_refused_before_any_work(
    name: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        require_optimizer(name, "cpu")
    task = write_task(tmp_path / "task")
    # the model is not looked for: the refusal comes first
    with pytest.raises(UserError, match=sentence):
        train(settings_of(task, optimizer=name, model=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_trial_of_an_optimiser_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    require_optimizer("paged_adamw_8bit", "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
