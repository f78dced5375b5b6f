"""The choice of a scoring: one pass for all scorings of the same tokens, with the numbers that each would get alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import loaded, questions

from scalabl.metrics.uncertainty import negative_log_likelihood
from scalabl.predictive import MeanPredictive, predict
from scalabl.runs.settings import Settings
from scalabl.scoring import Batch, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.training.choose_scoring import candidates, choose_scoring, describe

ROWS = questions(11)


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(loaded()[0], LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2]))


@pytest.mark.parametrize("frozen", [True, False])
def test_every_nll_is_that_of_a_pass_of_its_own(model: PeftModel, frozen: bool, own_cache: Path) -> None:
    options = candidates(Settings(), loaded()[1], ROWS, None)
    trunk = Trunk(model) if frozen else None
    best, nll = choose_scoring(options, model, trunk, ROWS)
    assert list(nll) == ["letters", "continuation (sums)", "continuation (per token)"]
    labels = torch.tensor([row.answer for row in ROWS])
    for option in options:
        scorer = Scorer(model, option, trunk)
        alone = predict(scorer, [option.encode(row) for row in ROWS], MeanPredictive())
        assert nll[describe(option)] == negative_log_likelihood(alone, labels).item()
    assert len(set(nll.values())) == 3
    assert describe(best) == min(nll, key=nll.__getitem__)


def test_sums_and_means_share_their_pass(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = Scorer.logits

    def counted(self: Scorer, batch: Batch) -> Any:
        passes.append(self.scoring.name)
        return original(self, batch)

    monkeypatch.setattr(Scorer, "logits", counted)
    choose_scoring(candidates(Settings(), loaded()[1], ROWS, None), model, None, ROWS)
    assert passes == ["letters"] * 2 + ["continuation"] * 2  # 11 rows, 8 at a time


def test_one_option_or_no_rows_need_no_pass(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "logits", None)
    options = candidates(Settings(), loaded()[1], ROWS, None)
    assert choose_scoring(options[:1], model, None, ROWS) == (options[0], {})
    assert choose_scoring(options, model, None, []) == (options[-1], {})
