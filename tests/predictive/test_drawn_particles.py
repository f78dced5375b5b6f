"""Particles of every kind in a model: the right s in every layer, whatever the chunk and the batch."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import adapted, loaded, questions
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.posterior.draws import noise
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.adaptive import with_sampling
from scalabl.predictive.lora_particles import DropoutPredictive
from scalabl.predictive.sampling import DRAWS, Sampling
from scalabl.scoring import Continuation, Encoded, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers
from scalabl.tuner.projection import Values


def scorer_of(model: PeftModel) -> Scorer:
    trunk = Trunk(model)
    return Scorer(model, Continuation(loaded()[1]), trunk if trunk.depth else None)


@pytest.fixture(scope="module", params=["diagonal", "full"])
def scorer(request: pytest.FixtureRequest) -> Scorer:
    model = adapted(covariance=request.param, last=2)
    if request.param == "full":
        with torch.no_grad():
            for leaf in stochastic_layers(model).values():
                leaf.posterior.lower.fill_(0.2)
    return scorer_of(model)


@pytest.fixture(scope="module")
def encoded(scorer: Scorer) -> list[Encoded]:
    return [scorer.scoring.encode(row) for row in questions(5)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def layers_of(scorer: Scorer) -> dict[str, int]:
    return {name: leaf.out_features for name, leaf in stochastic_layers(scorer.model).items()}


@pytest.mark.parametrize("kind", DRAWS)
def test_each_particle_is_one_pass_with_its_own_s(scorer: Scorer, encoded: list[Encoded], kind: str) -> None:
    found = predict(scorer, encoded, MonteCarloPredictive(3, seed=4, draws=kind))
    drawn = noise(kind, 3, layers_of(scorer), 4)
    leaves = stochastic_layers(scorer.model)
    for k in range(3):
        try:
            for name, leaf in leaves.items():
                leaf.state = Values(leaf.posterior.sample(drawn[name][k : k + 1]).detach())
            for i, row in enumerate(encoded):
                with torch.no_grad():
                    log_probs = scorer.class_log_probs(scorer.scoring.collate([row]))[0]
                close(found[k, i, : row.num_choices], log_probs)
        finally:
            for leaf in leaves.values():
                leaf.state = "auto"
    assert (found[0] - found[1]).exp().sub(1).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("kind", DRAWS)
def test_chunk_and_batch_change_nothing(scorer: Scorer, encoded: list[Encoded], kind: str) -> None:
    whole = predict(scorer, encoded, MonteCarloPredictive(5, draws=kind, chunk=5))
    for chunk, size in ((1, 5), (2, 3), (3, 1)):
        close(predict(scorer, encoded, MonteCarloPredictive(5, draws=kind, chunk=chunk), batch_size=size), whole)


def test_independent_draws_are_the_default_and_no_kind_is_another(scorer: Scorer, encoded: list[Encoded]) -> None:
    default = predict(scorer, encoded, MonteCarloPredictive(4))
    found = {kind: predict(scorer, encoded, MonteCarloPredictive(4, draws=kind)) for kind in DRAWS}
    assert torch.equal(found["independent"], default)
    for kind in ("antithetic", "sobol", "moments"):
        assert (found[kind].exp() - default.exp()).abs().max() > 1e-3
    # antithetic: particles 0 and 2 are independent particles 0 and 1
    close(found["antithetic"][[0, 2]], default[:2])


def test_one_predictive_serves_models_of_other_layers(encoded: list[Encoded]) -> None:
    predictive = MonteCarloPredictive(2, draws="sobol")
    for last in (1, 2, 1):
        scorer = scorer_of(adapted(last=last))
        close(predict(scorer, encoded, predictive), predict(scorer, encoded, MonteCarloPredictive(2, draws="sobol")))


def test_rivals_draw_as_before_and_have_no_other_draws() -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    scorer = scorer_of(get_peft_model(loaded()[0], config).eval())
    rows = [scorer.scoring.encode(row) for row in questions(3)]
    dropout = DropoutPredictive(0.3, samples=3)
    found = predict(scorer, rows, dropout)
    close(found[1:], predict(scorer, rows, _Part(dropout, 1, 2)))
    with pytest.raises(UserError, match="ScalaBL's mc"):
        with_sampling(dropout, Sampling(draws="sobol"))


class _Part:
    """Some of the particles of another predictive."""

    name = "part"

    def __init__(self, inner: MonteCarloPredictive, first: int, number: int) -> None:
        self.inner, self.first, self.number = inner, first, number

    def __call__(self, scorer: Scorer, batch: object) -> Tensor:
        return self.inner.draw(scorer, batch, self.first, self.number)  # type: ignore[arg-type]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="choose one of independent"):
        MonteCarloPredictive(4, draws="latin")
    with pytest.raises(UserError, match="at least 2"):
        MonteCarloPredictive(1, draws="moments")
    with pytest.raises(UserError, match="ScalaBL's mc"):
        with_sampling(MeanPredictive(), Sampling(draws="sobol"))
    made = with_sampling(MonteCarloPredictive(6, seed=2, chunk=3), Sampling(draws="sobol"))
    assert isinstance(made, MonteCarloPredictive)
    assert (made.samples, made.seed, made.chunk, made.draws) == (6, 2, 3, "sobol")
