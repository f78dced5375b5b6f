"""On every format the adapter draws, and what it draws is what it would draw on the same weights in float32.

A quantised layer of PEFT has a forward pass of its own, in which a stochastic A could be passed by without a word: each
test here would then find one model instead of many.
"""

from dataclasses import dataclass

import pytest
import torch
from formats import Format, adapted, base_in, dequantised, tokens
from peft import PeftModel
from scipy.stats import ks_2samp
from torch import Tensor

import scalabl
from scalabl.predictive.linearized import logit_jacobian
from scalabl.scoring import Batch, Letters, Scorer
from scalabl.tuner import stochastic_layers

DRAWS = 1500
LOGITS = 4  # of the last token
COVARIANCES = ("diagonal", "full")


@dataclass
class Pair:
    """The same adapter on a base in some format, and on the numbers of that base in float32."""

    held: PeftModel
    exact: PeftModel


@pytest.fixture(scope="module", params=COVARIANCES)
def pair(form: Format, request: pytest.FixtureRequest) -> Pair:
    base = base_in(form)
    twin = dequantised(base)
    return Pair(adapted(base, covariance=request.param), adapted(twin, covariance=request.param))


@torch.no_grad()
def last_logits(model: PeftModel, ids: Tensor) -> Tensor:
    """(rows, LOGITS) differences to the first logit, which alone matter to a softmax."""
    logits = model(input_ids=ids, logits_to_keep=1).logits[:, 0].float()
    return logits[:, 1 : 1 + LOGITS] - logits[:, :1]


def drawn(model: PeftModel, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with scalabl.sample(model):
        return last_logits(model, tokens(1, length=6).expand(DRAWS, -1)).double()


def test_logits_have_the_distribution_of_the_weights_in_float32(form: Format, pair: Pair) -> None:
    """Of independent draws: variances within 4.5 standard errors, means too beside rounding, and the shape by KS."""
    found, expected = drawn(pair.held, seed=1), drawn(pair.exact, seed=2)
    mean_error = ((found.var(dim=0) + expected.var(dim=0)) / DRAWS).sqrt()
    gap = (found.mean(dim=0) - expected.mean(dim=0)).abs()
    assert (gap < 4.5 * mean_error + form.rounding * expected.abs().mean()).all()
    variances = found.var(dim=0), expected.var(dim=0)
    # Var of a sample variance is (m4 - var^2) / n, m4 the fourth central moment
    errors = [
        ((x - x.mean(dim=0)).pow(4).mean(dim=0) - v.square()) / DRAWS
        for x, v in zip((found, expected), variances, strict=True)
    ]
    assert ((variances[0] - variances[1]).abs() < 4.5 * sum(errors).sqrt()).all()
    assert (sum(errors).sqrt() < 0.1 * variances[1]).all(), "an interval that would let a wrong sigma through"
    for i in range(LOGITS):
        centred = [(x[:, i] - x[:, i].mean()).numpy() for x in (found, expected)]
        assert ks_2samp(*centred).pvalue > 1e-4


def test_every_particle_is_the_one_of_float32(form: Format, pair: Pair) -> None:
    ids, number = tokens(2), 16
    with scalabl.particles(pair.held, number, seed=5):
        found = last_logits(pair.held, ids.repeat(number, 1))
    with scalabl.particles(pair.exact, number, seed=5):
        expected = last_logits(pair.exact, ids.repeat(number, 1))
    assert (found - expected).abs().max() <= 2 * form.rounding * expected.abs().max()
    # and what tells particles apart is far larger than that rounding
    around = [x.view(number, 2, LOGITS) - x.view(number, 2, LOGITS).mean(dim=0) for x in (found, expected)]
    assert (around[0] - around[1]).square().mean() <= max(1e-9, 2e-3) * around[1].square().mean()


def test_the_likelihood_gradient_of_the_posterior_is_the_one_of_float32(form: Format, pair: Pair) -> None:
    """With the same draws: (dL/d log mu, dL/d log sigma, ...), through the format's own backward pass."""
    ids = tokens(8, seed=11)
    found, expected = (_gradients(model, ids) for model in (pair.held, pair.exact))
    assert found.keys() == expected.keys() and any(name.endswith("log_std") for name in found)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        kind = name.rpartition(".")[2]
        size = max(other.norm() for n, other in expected.items() if n.endswith(kind))
        gap = (found[name] - gradient).norm() / size
        assert gap <= max(1e-4, 3 * form.rounding), (name, gap)


def _gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    return {n: p.grad.clone() for n, p in model.named_parameters() if ".posterior." in n and p.grad is not None}


def test_the_jacobian_of_the_linearised_predictive_is_the_one_of_float32(form: Format, pair: Pair) -> None:
    found, expected = (_jacobians(model) for model in (pair.held, pair.exact))
    assert found.keys() == expected.keys() == stochastic_layers(pair.held).keys()
    size = max(jacobian.abs().max() for jacobian in expected.values())
    for name, jacobian in expected.items():
        assert (found[name] - jacobian).abs().max() <= max(1e-4, 3 * form.rounding) * size, name


def _jacobians(model: PeftModel) -> dict[str, Tensor]:
    from tiny_base import tiny_tokenizer

    ids = tokens(2)
    rows, length = ids.shape
    batch = Batch(
        ids, torch.arange(length).expand(rows, -1), torch.zeros_like(ids), torch.tensor([3, 3]), torch.tensor([0, 1]), 1
    )
    return logit_jacobian(Scorer(model, Letters(tiny_tokenizer(), num_letters=3)), batch)[1]


def test_the_kl_is_the_same_number_on_every_format(pair: Pair) -> None:
    found, expected = scalabl.kl_divergence(pair.held), scalabl.kl_divergence(pair.exact)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
