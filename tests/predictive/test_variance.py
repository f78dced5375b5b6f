"""Each layer's share of the predictive variance."""

import pytest
import torch
from tiny_base import adapted, loaded, questions

from scalabl.core.errors import UserError
from scalabl.inference.variance import top_holding
from scalabl.predictive.linearized import layer_variances, logit_gaussian
from scalabl.scoring import Continuation, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers


def scorer_of(**config: object) -> Scorer:
    model = adapted(**config)  # type: ignore[arg-type]
    return Scorer(model, Continuation(loaded()[1]), Trunk(model))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_parts_add_up_to_the_trace_of_the_logits_covariance(covariance: str) -> None:
    scorer = scorer_of(covariance=covariance)
    rows = [scorer.scoring.encode(row) for row in questions(5)]
    found = layer_variances(scorer, rows, batch_size=2)
    _, total = logit_gaussian(scorer, scorer.scoring.collate(rows))
    trace = total.diagonal(dim1=1, dim2=2).sum(dim=1).mean().item()
    assert sum(v.variance for v in found) == pytest.approx(trace, rel=1e-4)
    assert sum(v.share for v in found) == pytest.approx(1)
    assert [v.depth for v in found] == [0, 0, 1, 1, 2, 2]
    assert {v.name for v in found} == set(stochastic_layers(scorer.model))
    assert all(p.grad is None for p in scorer.model.parameters())


def test_a_part_is_the_variance_that_is_left_with_that_layer_alone() -> None:
    scorer = scorer_of(target_modules=["q_proj", "lm_head"])
    rows = [scorer.scoring.encode(row) for row in questions(4)]
    found = {v.name: v for v in layer_variances(scorer, rows)}
    assert list(found)[-1] == "lm_head" and found["lm_head"].depth == 3
    batch = scorer.scoring.collate(rows)
    _, last = logit_gaussian(scorer, batch, "last:1")
    trace = last.diagonal(dim1=1, dim2=2).sum(dim=1).mean().item()
    assert found["lm_head"].variance == pytest.approx(trace, rel=1e-4)


def test_it_grows_with_the_square_of_sigma() -> None:
    scorer = scorer_of()
    rows = [scorer.scoring.encode(row) for row in questions(3)]
    before = layer_variances(scorer, rows)
    leaf = stochastic_layers(scorer.model)[before[-1].name]
    with torch.no_grad():
        leaf.posterior.log_std.add_(torch.tensor(2.0).log())
    after = layer_variances(scorer, rows)
    assert after[-1].variance == pytest.approx(4 * before[-1].variance, rel=1e-4)
    assert [v.variance for v in after[:-1]] == pytest.approx([v.variance for v in before[:-1]], rel=1e-5)
    with torch.no_grad():
        leaf.posterior.log_std.add_(9.0)
    top = layer_variances(scorer, rows)
    assert top_holding(top, 0.9) == "last:1" and top_holding(top, 1.0) == "last:3"


def test_nothing_to_share_is_refused() -> None:
    scorer = scorer_of()
    with pytest.raises(UserError, match="there are none"):
        layer_variances(scorer, [])
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(UserError, match="No layer's s moves a prediction"):
        layer_variances(scorer, [scorer.scoring.encode(row) for row in questions(2)])
