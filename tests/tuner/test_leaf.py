"""The stochastic leaf: its initial values, its draws, its refusals."""

import re
import warnings
from typing import Any

import pytest
import torch
from matrix import adapt, close, load_base
from torch import nn

from scalabl.core.errors import UserError
from scalabl.tuner import StochasticProjection, stochastic_layers
from scalabl.tuner.projection import Particles

R, D_IN = 4, 12


def lora_draw(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return nn.Linear(D_IN, R, bias=False).weight.detach()


def leaf(**options: object) -> StochasticProjection:
    return StochasticProjection(lora_draw(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit_rows", [True, False])
def test_the_initial_values_are_the_singular_value_decomposition_of_loras_draw(unit_rows: bool) -> None:
    """A = U diag(sv) V^T: rows V^T, means sv; U, a rotation of the r numbers, is dropped."""
    made = leaf(unit_rows=unit_rows)
    rows, mean = made.rows(), made.posterior.mean
    assert torch.allclose(rows @ rows.T, torch.eye(R), atol=1e-5)
    assert (mean > 0).all() and (mean[:-1] >= mean[1:]).all()
    gram = rows.T @ torch.diag(mean.square()) @ rows
    assert torch.allclose(gram, lora_draw().T @ lora_draw(), atol=1e-5)


def test_unit_rows_are_stored_at_the_length_of_loras_draw_by_which_a_step_turns_them_as_far() -> None:
    torch.manual_seed(0)
    wide = torch.nn.Linear(2000, R, bias=False).weight.detach()
    stored = StochasticProjection(wide).direction
    torch.testing.assert_close(stored.norm(dim=1), wide.norm(dim=1), rtol=0.05, atol=0)  # of any rotation of its rows
    torch.testing.assert_close(stored.T @ stored, wide.T @ wide, rtol=0, atol=1e-5)
    assert torch.allclose(StochasticProjection(wide, unit_rows=False).direction.norm(dim=1), torch.ones(R), atol=1e-5)


def test_initial_sigmas_are_uniform_between_their_bounds() -> None:
    torch.manual_seed(0)
    sigma = StochasticProjection(torch.randn(1000, 1000), init_sigma=0.05).posterior.marginal_std()
    low, high = 0.05 / 2**0.5, 0.05
    assert sigma.min() >= low * (1 - 1e-5) and sigma.max() <= high * (1 + 1e-5)
    assert sigma.mean().item() == pytest.approx((low + high) / 2, rel=0.01)
    assert sigma.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.1)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_an_adapter_starts_from_loras_own_draw(init: bool | str) -> None:
    """The same seed gives the same A as plain LoRA has, up to the rotation U, and B = 0."""
    from peft import LoraConfig, get_peft_model

    model = adapt(
        load_base(), trained=False, init_lora_weights=init, target_modules=["q_proj"], layers_to_transform=[0]
    )
    torch.manual_seed(11)
    options = {"r": 4, "init_lora_weights": init, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    plain = get_peft_model(load_base(), LoraConfig(**options))
    (name, made), *_ = stochastic_layers(model).items()
    a = plain.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    assert close(made.weight.T @ made.weight, a.T @ a, 1e-5)
    assert not model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight.any()


def test_a_start_far_from_the_prior_is_said_with_the_prior_that_suits_it() -> None:
    """A normal draw of A puts s elsewhere than LoRA's usual one; the prior that the sentence names is not far."""
    options: dict[str, Any] = {"trained": False, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]}
    with pytest.warns(UserWarning, match=r"s begins near .*from its prior N\(0.577, 0.2\^2\)") as said:
        adapt(load_base(), **options)
    mean, std = re.search(r"prior_mean=(\S+) and prior_std=([\d.]+)\.", str(said[0].message)).groups()  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="s begins")
        adapt(load_base(), prior_mean=float(mean), prior_std=float(std), **options)
        adapt(load_base(), empirical_prior=True, **options)
        adapt(load_base(), trained=False, target_modules=["q_proj"])


def test_unit_rows_take_the_scale_out_of_the_projection() -> None:
    x = torch.randn(1, 2, D_IN)
    for unit_rows in (True, False):
        made = leaf(unit_rows=unit_rows).eval()
        before = made(x)
        with torch.no_grad():
            made.direction.mul_(3)
        assert torch.allclose(made(x), before if unit_rows else 3 * before, atol=1e-5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_forward_pass_is_the_equation(covariance: str) -> None:
    """Row j of the batch: diag(s_j) A x, with s_j of particle j // B, in all its positions."""
    made = leaf(covariance=covariance).eval()
    noise = torch.randn(3, R)
    made.state = Particles(noise)
    x = torch.randn(6, 5, D_IN)
    out = made(x)
    for row in range(6):
        s = made.posterior.sample(noise[row // 2])
        expected = x[row] @ made.rows().T @ torch.diag(s)
        assert torch.allclose(out[row], expected, atol=1e-6)
    made.state = "auto"
    assert torch.allclose(made(x), x @ made.weight.T, atol=1e-6)


def test_auto_draws_while_training_alone_and_the_named_states_always_hold() -> None:
    made, x = leaf(), torch.randn(2, 3, D_IN)
    mean = x @ made.weight.T
    for state, training, stochastic in [
        ("auto", True, True), ("auto", False, False), ("mean", True, False), ("mean", False, False),
        ("sample", True, True), ("sample", False, True),
    ]:  # fmt: skip
        made.train(training).state = state  # type: ignore[assignment]
        assert torch.allclose(made(x), mean, atol=1e-6) != stochastic


def test_more_than_three_dimensions_still_count_sequences_first() -> None:
    made = leaf().train()
    out = made(torch.ones(2, 3, 4, D_IN))
    assert torch.allclose(out[0], out[0, 0, 0].expand(3, 4, R)) and not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("state", ["sample", "auto", Particles(torch.zeros(2, R))])
def test_flattened_tokens_are_refused(state: object) -> None:
    made = leaf().train()
    made.state = state  # type: ignore[assignment]
    with pytest.raises(UserError, match="flattened, without a batch dimension"):
        made(torch.randn(6, D_IN))
    made.state = "mean"
    assert made(torch.randn(6, D_IN)).shape == (6, R)


def test_a_batch_that_is_no_multiple_of_the_particles_is_refused() -> None:
    made = leaf()
    made.state = Particles(torch.zeros(2, R))
    with pytest.raises(UserError, match="batch of 3 rows cannot carry 2 particles"):
        made(torch.randn(3, 1, D_IN))


def test_a_meta_leaf_costs_no_memory_and_has_the_right_shapes() -> None:
    made = StochasticProjection(torch.empty(R, D_IN, device="meta"), covariance="full")
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert made.direction.shape == (R, D_IN) and made.posterior.mean.shape == (R,)
