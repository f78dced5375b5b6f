"""The Gauss-Newton matrix against autograd, and the posterior against the Hessian where that is exact."""

from pathlib import Path

import pytest
import torch
from plain_lora import bayesian, class_logits_at, letters, negative_log_likelihood, plain_adapter
from tiny_base import loaded, questions

from scalabl.core.errors import UserError
from scalabl.scoring import Continuation, Letters, Scorer, Scoring
from scalabl.training.posthoc.laplace import gauss_newton, posterior_of
from scalabl.tuner import stochastic_layers

ROWS = questions(9)


@pytest.mark.parametrize("kind", ["letters", "continuation"])
def test_it_is_the_sum_of_jacobians_by_automatic_differentiation(kind: str, tmp_path: Path) -> None:
    model, leaves = bayesian(plain_adapter(tmp_path, rank_pattern={"v_proj": 3}))
    _, tokenizer = loaded()
    scoring: Scoring = Letters(tokenizer) if kind == "letters" else Continuation(tokenizer)
    scorer = Scorer(model, scoring)
    rows = [scoring.encode(row) for row in ROWS]
    with leaves.in_place(model):
        found = gauss_newton(scorer, rows, batch_size=4)
        size = sum(found.ranks.values())
        assert size == 3 * (4 + 3) and list(found.ranks) == list(stochastic_layers(model))
        expected, log_likelihood = torch.zeros(size, size, dtype=torch.float64), 0.0
        for row in rows:
            batch = scoring.collate([row])

            def logits(s: torch.Tensor, batch=batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return class_logits_at(scorer, batch, s)[0, : batch.num_choices[0]]

            jacobian = torch.autograd.functional.jacobian(logits, torch.ones(size)).double()
            p = logits(torch.ones(size)).detach().double().softmax(-1)
            expected += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
            log_likelihood += p[row.answer].log().item()
    torch.testing.assert_close(found.matrix, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert found.log_likelihood == pytest.approx(log_likelihood, rel=1e-5) and found.rows == len(rows)
    # layers do see each other: the blocks between them are no zeros
    r = next(iter(found.ranks.values()))
    assert found.matrix[:r, r:].abs().max() > 1e-2 * found.matrix[:r, :r].abs().max()


def test_the_batches_do_not_matter(tmp_path: Path) -> None:
    model, leaves = bayesian(plain_adapter(tmp_path))
    scorer, _ = letters(model)
    rows = [scorer.scoring.encode(row) for row in ROWS]
    counted: list[int] = []
    with leaves.in_place(model):
        one = gauss_newton(scorer, rows, batch_size=9, advance=counted.append)
        other = gauss_newton(scorer, rows, batch_size=2)
    torch.testing.assert_close(one.matrix, other.matrix, rtol=1e-3, atol=1e-5 * one.matrix.abs().max().item())
    assert sum(counted) == 9


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_posterior_is_exact_where_the_logits_are_linear_in_s(tmp_path: Path) -> None:
    """Output layer, letters: multinomial logistic regression in s, whose Hessian autograd gives."""
    model, leaves = bayesian(plain_adapter(tmp_path, target_modules=["lm_head"], r=5))
    scorer, batch = letters(model)
    rows = [scorer.scoring.encode(row) for row in ROWS]
    with leaves.in_place(model):
        curvature = gauss_newton(scorer, rows)
        s = torch.ones(5)
        hessian = torch.autograd.functional.hessian(lambda x: negative_log_likelihood(scorer, batch, x), s).double()
        torch.testing.assert_close(curvature.matrix, hessian, rtol=1e-3, atol=1e-5 * hessian.abs().max().item())
        tau = 0.7
        joint, facts = posterior_of(curvature, 5, tau)

        def log_joint(x: torch.Tensor) -> torch.Tensor:
            return -negative_log_likelihood(scorer, batch, x) - tau * x.double().square().sum() / 2

        precision = -torch.autograd.functional.hessian(log_joint, s).double()
        torch.testing.assert_close(joint.covariance(), torch.linalg.inv(precision), rtol=2e-3, atol=1e-5)
        # the evidence is log N(s | 0, I / tau) + log p(D | s) + log((2 pi)^(D/2) |Sigma|^(1/2))
        prior = torch.distributions.Normal(0.0, tau**-0.5).log_prob(s).sum()
        volume = 2.5 * torch.log(torch.tensor(2 * torch.pi)) - torch.logdet(precision) / 2
        expected = prior - negative_log_likelihood(scorer, batch, s) + volume
        assert facts["log_evidence"] == pytest.approx(expected.item(), rel=1e-4)


def test_unlabelled_rows_are_refused(tmp_path: Path) -> None:
    model, leaves = bayesian(plain_adapter(tmp_path))
    scorer, _ = letters(model)
    row = scorer.scoring.encode(ROWS[0])
    row.__dict__["answer"] = None
    with leaves.in_place(model):
        for rows in ([], [row]):
            with pytest.raises(UserError, match="labelled rows"):
                gauss_newton(scorer, rows)
