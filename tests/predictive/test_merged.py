"""A merged or disabled adapter has no uncertainty to give: every way to ask says so, and the mean is the mean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import adapted, loaded, questions

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation.decoding import decode
from scalabl.inference.classifier import Classifier
from scalabl.predictive import (
    AutoPredictive,
    LinearizedPredictive,
    MeanPredictive,
    MonteCarloPredictive,
    Predictive,
    predict,
)
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.lora_particles import DropoutPredictive, blob_draws
from scalabl.scoring import Continuation, Scorer
from scalabl.tuner.blob import BLoBConfig

MERGED = r"merged into its base.* call unmerge_adapter\(\) first"


def scorer_of(model: PeftModel) -> Scorer:
    return Scorer(model, Continuation(loaded()[1]))


def plain(config: Any) -> PeftModel:
    return get_peft_model(loaded()[0], config).eval()


def ask(predictive: Predictive) -> Callable[[PeftModel], Any]:
    def asked(model: PeftModel) -> Any:
        scorer = scorer_of(model)
        return predict(scorer, [scorer.scoring.encode(row) for row in questions(9)], predictive)

    return asked


ASKED: dict[str, Callable[[PeftModel], Any]] = {
    "mc": ask(MonteCarloPredictive(2)),
    "adaptive": ask(AdaptivePredictive(MonteCarloPredictive(4))),
    "auto": ask(AutoPredictive(4)),
    "linearized": ask(LinearizedPredictive(8)),
    "classifier": lambda model: Classifier(model, Continuation(loaded()[1]), samples=2)(questions(2)),
    "generate": lambda model: decode(model, loaded()[1], ["red"], MonteCarloPredictive(2), max_new_tokens=2),
    "kl": scalabl.kl_divergence,
}


@pytest.mark.parametrize("how", ASKED)
def test_what_needs_a_posterior_is_refused(how: str) -> None:
    model = adapted(last=2)
    expected = ask(MeanPredictive())(model)
    model.merge_adapter()
    with pytest.raises(UserError, match=MERGED):
        ASKED[how](model)
    torch.testing.assert_close(ask(MeanPredictive())(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    ASKED[how](model)
    with model.disable_adapter(), pytest.raises(UserError, match="disabled, so that nothing can be drawn"):
        ASKED[how](model)


def test_so_are_the_draws_of_other_methods() -> None:
    dropout = plain(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    blob = plain(BLoBConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model, predictive in ((dropout, DropoutPredictive(0.1, samples=2)), (blob, blob_draws(blob, samples=2))):
        ask(predictive)(model)
        model.merge_adapter()
        with pytest.raises(UserError, match=MERGED):
            ask(predictive)(model)
