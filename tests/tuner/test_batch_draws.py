"""draws="batch": one s for all rows of a training batch, as in the reference code."""

from pathlib import Path

import pytest
import torch
from matrix import adapt, close, load_base, tokens
from peft import PeftModel
from torch import nn

import scalabl
from scalabl.tuner import StochasticProjection, stochastic_layers

R, D_IN, ROWS = 4, 12, 8


def leaf(draws: str, covariance: str = "diagonal") -> StochasticProjection:
    torch.manual_seed(0)
    return StochasticProjection(nn.Linear(D_IN, R).weight.detach(), draws=draws, covariance=covariance).train()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_all_rows_of_a_training_batch_carry_one_draw_and_the_next_batch_another(covariance: str) -> None:
    x = torch.ones(ROWS, 3, D_IN)
    shared, own = leaf("batch", covariance), leaf("sequence", covariance)
    out = shared(x)
    assert torch.equal(out, out[:1, :1].expand(ROWS, 3, R))
    assert not torch.allclose(shared(x), out) and not torch.allclose(out[0, 0], shared.eval()(x)[0, 0])
    assert len({tuple(row) for row in own(x)[:, 0].tolist()}) == ROWS
    # one draw a batch is a draw of the same posterior
    torch.manual_seed(3)
    s = shared.posterior.sample(torch.randn(1, R))
    torch.manual_seed(3)
    torch.testing.assert_close(shared.train()(x)[5, 1], x[5, 1] @ shared.rows().T * s[0])


def test_named_states_do_not_share() -> None:
    made = leaf("batch")
    made.state = "sample"
    for training in (True, False):
        out = made.train(training)(torch.ones(2, 1, D_IN))
        assert not torch.allclose(out[0], out[1])


def test_the_mean_and_evaluation_are_those_of_draws_by_sequence() -> None:
    x = torch.randn(2, 3, D_IN)
    assert torch.equal(leaf("batch").eval()(x), leaf("sequence").eval()(x))


def test_sharing_a_draw_makes_the_gradient_noisier() -> None:
    """On equal rows the mean over B rows has B times the variance: B independent draws average out, one does not."""
    x = torch.randn(1, 1, D_IN, generator=torch.Generator().manual_seed(1)).expand(ROWS, 1, D_IN)
    variance = {}
    for draws in ("sequence", "batch"):
        made, gradients = leaf(draws), []
        torch.manual_seed(2)
        for _ in range(600):
            (gradient,) = torch.autograd.grad(made(x).square().sum(dim=-1).mean(), [made.posterior.log_std])
            gradients.append(gradient)
        variance[draws] = torch.stack(gradients).var(dim=0).sum().item()
    # the relative standard error of each of the two is about sqrt(kurtosis / 600), a tenth or two
    assert ROWS / 2 < variance["batch"] / variance["sequence"] < 2 * ROWS


def test_it_is_saved_and_loaded_with_the_adapter(tmp_path: Path) -> None:
    model = adapt(load_base(), draws="batch")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path), is_trainable=True).train()
    assert all(made.draws == "batch" for made in stochastic_layers(loaded).values())
    ids = tokens(1).expand(2, -1)
    torch.manual_seed(0)
    first, again = (loaded(input_ids=ids).logits.detach() for _ in range(2))
    assert close(first[0], first[1], 1e-5) and not close(first, again, 1e-3)
    with scalabl.mean(loaded):
        assert not close(first, loaded(input_ids=ids).logits, 1e-3)
