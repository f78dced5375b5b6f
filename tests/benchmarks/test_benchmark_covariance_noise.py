"""The gradients of the covariance study against autograd, the exact curvature, and noise that is known."""

from typing import Any

import pytest
import torch
from covariance_effects import PARAMETERS, figures, parameter_gradients, s_gradients
from tiny_base import adapted, questions
from tiny_base import loaded as tiny

from scalabl.scoring import Continuation, Letters, Scorer
from scalabl.training.posthoc.laplace import gauss_newton
from scalabl.tuner import stochastic_layers
from scalabl.tuner.projection import Particles


def test_gradients_are_those_of_a_training_step() -> None:
    """The mean over rows and draws, against autograd of the loss with the same noise in the layers."""
    model = adapted(covariance="full")
    layers = stochastic_layers(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in layers.values():
            lower: Any = leaf.posterior.lower
            lower.copy_(0.1 * torch.randn(lower.shape, generator=generator))
    scorer = Scorer(model, Continuation(tiny()[1]))
    rows = [scorer.scoring.encode(row) for row in questions(3)]
    gradient, noise = s_gradients(scorer, rows, 4, seed=5)
    sizes = [leaf.out_features for leaf in layers.values()]
    found = parameter_gradients([leaf.posterior for leaf in layers.values()], gradient, noise)  # type: ignore[misc]
    batch = scorer.scoring.collate(rows)
    for k in range(4):
        for leaf, z in zip(layers.values(), noise[:, k].split(sizes, -1), strict=True):
            leaf.state = Particles(z)
            leaf.posterior.requires_grad_(True)
        loss = -scorer.class_log_probs(batch).gather(-1, batch.answers[:, None]).mean()
        for kind, name in PARAMETERS.items():
            parameters = [leaf.posterior.get_parameter(name) for leaf in layers.values()]
            expected = torch.cat(torch.autograd.grad(loss, parameters, retain_graph=True)).double()
            torch.testing.assert_close(found[kind][:, k].mean(dim=0), expected, rtol=2e-3, atol=2e-5)
            assert expected.abs().max() > 1e-3
    assert len({tuple(z) for z in noise.flatten(0, 1).tolist()}) == 12  # each row and draw has its own
    _, shared = s_gradients(scorer, rows, 2, seed=5, shared=True)
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[:, 0], shared[:, 1])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_off_diagonals_are_drawn_to_the_exact_posterior_where_logits_are_linear_in_s() -> None:
    """E[g_i z_j] = (H L)_ij for a quadratic loss (Stein's lemma): what pulls a learnt correlation is the curvature."""
    model = adapted(covariance="full", target_modules=["lm_head"], r=4)
    scorer = Scorer(model, Letters(tiny()[1]))
    rows = [scorer.scoring.encode(row) for row in questions(3)]
    curvature = gauss_newton(scorer, rows)
    (leaf,) = stochastic_layers(model).values()
    with torch.no_grad():
        leaf.posterior.log_std.fill_(-4.0)
    draws = 600
    gradient, noise = s_gradients(scorer, rows, draws, seed=1)
    at_the_mean = gradient.mean(dim=1, keepdim=True)  # its product with z is noise alone
    found = parameter_gradients([leaf.posterior], gradient - at_the_mean, noise)["off-diagonal"]  # type: ignore[list-item]
    below = torch.tril_indices(4, 4, offset=-1)
    expected = (curvature.matrix * leaf.posterior.log_std.exp().double()).detach()
    pulled, pull = found.mean(dim=1).sum(dim=0), expected[tuple(below)]
    assert torch.cosine_similarity(pulled, pull, dim=0) > 0.95
    # (H L z)_i z_j varies by about the length of H L's row
    assert ((pulled - pull).abs() < 5 * expected.norm(dim=1)[below[0]] / draws**0.5).all()


def test_signal_and_noise_of_gradients_that_are_known() -> None:
    """Rows differ by 3, draws by 2, around 0.5: noise of draws 2 / sqrt(B), of rows 3 / sqrt(B)."""
    generator = torch.Generator().manual_seed(0)
    rows, draws, numbers = 16, 64, 400
    of_rows = 3 * torch.randn(rows, 1, numbers, generator=generator, dtype=torch.float64)
    of_rows = of_rows - of_rows.mean(dim=0)
    noise = 2 * torch.randn(rows, draws, numbers, generator=generator, dtype=torch.float64)
    kl = torch.full((numbers,), 0.1, dtype=torch.float64)
    each = {"mean": 0.4 + of_rows + noise, "std": noise, "off-diagonal": torch.zeros(rows, draws, 0)}
    found, ratios = figures(each, {"mean": kl, "std": 0 * kl, "off-diagonal": kl[:0]})
    signal, silent = found
    assert [row["kind"] for row in found] == ["mean", "std"]
    assert signal["signal"] == pytest.approx(0.5, rel=0.03) and signal["noise_of_draws"] == pytest.approx(0.5, rel=0.02)
    assert signal["noise_of_rows"] == pytest.approx(3 / rows**0.5, rel=0.03)
    assert signal["snr"] == pytest.approx(1.0, rel=0.05)
    # a parameter without a signal shows the ratio of noise alone, and no signal
    assert silent["snr"] < 0.04 and silent["median_ratio"] == pytest.approx(silent["median_ratio_of_noise"], rel=0.1)
    assert signal["noise_share"] == pytest.approx(0.5, abs=0.01) and signal["signal_share"] > 0.99
    assert ratios["mean"].shape == (numbers,)
