"""Several labels a row: sigmoids of the head's own logits, the loss of all labels, its curvature and its energy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from head_bases import LABELS, body_of
from peft import PeftModel, get_peft_model
from tiny_base import perturb, tiny_tokenizer
from torch import Tensor
from transformers import pipeline

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.methods.plain import lora_options
from scalabl.metrics.uncertainty import average, decompose
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.auto import AutoPredictive
from scalabl.predictive.linearized import logit_covariance, logit_jacobian
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.scoring.head import Head
from scalabl.scoring.likelihood import OneLabel, SeveralLabels, log_likelihood
from scalabl.scoring.scorer import make_scoring
from scalabl.scoring.trunk import Trunk
from scalabl.training.trainer import ChoiceTrainer, trainer_of
from scalabl.tuner import ScalaBLConfig
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY

TEXTS = ("red", "a green answer that is long enough to be padded by others", "blue or not?", "yes and no")
ANSWERS = ((0,), (), (1, 2), (0, 1, 2))


def rows() -> list[Example]:
    return [
        Example(str(i), text, LABELS, None, answers=found)
        for i, (text, found) in enumerate(zip(TEXTS, ANSWERS, strict=True))
    ]


@pytest.fixture(scope="module", params=["bert", "llama"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    base = body_of(request.param, tmp_path_factory.mktemp(request.param))
    model, tokenizer = load_base(str(base), labels=LABELS, several=True)
    torch.manual_seed(1)
    adapted = get_peft_model(model, ScalaBLConfig(**lora_options(Settings.flat(layers="last:2", r=4), model)))
    perturb(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name and "pooler" not in name and parameter.dim() > 1:
                parameter.mul_(20)
    return Scorer(adapted.eval(), Head(tokenizer, labels=LABELS, max_length=100, several=True), Trunk(adapted))


def own_logits(scorer: Scorer) -> Tensor:
    """(n, C) of the model's own forward pass, at its mean."""
    tokens = scorer.scoring.tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        found: Tensor = scorer.model(**tokens).logits
    return found


def test_the_probabilities_are_sigmoids_of_the_models_own_logits_and_the_loss_the_sum_over_labels(
    scorer: Scorer,
) -> None:
    encoded = [scorer.scoring.encode(row) for row in rows()]
    logits, marks = own_logits(scorer), torch.tensor([row.marks for row in rows()])
    assert logits.std() > 0.1
    batch = scorer.scoring.collate(encoded)
    assert torch.equal(batch.answers, marks)
    found = predict(scorer, encoded, MeanPredictive(), batch_size=3)
    questions = scorer.scoring.likelihood.questions(found)
    assert questions.shape == (1, 12, 2)
    yes = questions.exp()[0, :, 1].view(4, 3)
    torch.testing.assert_close(yes, logits.sigmoid(), atol=1e-4, rtol=0)
    torch.testing.assert_close(questions.exp()[0, :, 0].view(4, 3), 1 - logits.sigmoid(), atol=1e-4, rtol=0)

    p, y = logits.sigmoid().double(), marks.double()
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).sum(dim=1).mean()
    assert trainer_of(scorer.scoring) is ChoiceTrainer
    loss = scorer.scoring.likelihood.loss(scorer.class_logits(batch), batch.answers)
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-3)
    total = log_likelihood(scorer.scoring.likelihood, logits, marks)
    assert total.item() == pytest.approx(-4 * by_hand.item(), abs=1e-3)
    # Transformers' own loss is the mean over labels too: C times less beside the KL
    own = F.binary_cross_entropy_with_logits(logits, y.float())
    assert own.item() * len(LABELS) == pytest.approx(by_hand.item(), abs=1e-3)


def test_particles_and_linearised_logits_are_of_each_label(scorer: Scorer) -> None:
    encoded = [scorer.scoring.encode(row) for row in rows()]
    particles = predict(scorer, encoded, MonteCarloPredictive(400, seed=3), batch_size=4)
    by_one = predict(scorer, encoded, MonteCarloPredictive(400, seed=3), batch_size=1)
    assert particles.shape == (400, 4, 6) and (particles - by_one).abs().max() < 1e-4
    linearised = predict(scorer, encoded, LinearizedPredictive(512), batch_size=4)
    assert linearised.shape == (512, 4, 6)

    batch = scorer.scoring.collate(encoded)
    logits, jacobians = logit_jacobian(scorer, batch)
    covariance = logit_covariance(scorer, jacobians)
    assert covariance.shape == (4, 3, 3)
    drawn = linearised[:, :, 1::2] - linearised[:, :, ::2]  # log yes - log no: the logits
    spread = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(drawn.mean(dim=0), logits, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(drawn.var(dim=0), spread, atol=1e-4, rtol=0.1)
    # the Jacobian of a logit is autograd's: the particles of little noise have the covariance of the linearised ones
    little = predict(scorer, encoded, MonteCarloPredictive(400, seed=3, scale=0.02), batch_size=4)
    moved = (little[:, :, 1::2] - little[:, :, ::2]).var(dim=0) / 0.02**2
    torch.testing.assert_close(moved, spread, atol=1e-4, rtol=0.35)
    with pytest.raises(UserError, match="top_classes is of one label out of many, and here rows have several"):
        predict(scorer, encoded, LinearizedPredictive(top_classes=1))


def test_auto_weighs_a_backward_pass_for_each_label(scorer: Scorer) -> None:
    encoded = [scorer.scoring.encode(row) for row in rows() * 3]
    auto = AutoPredictive(1000)
    found = predict(scorer, encoded, auto, batch_size=4)
    assert auto.choice is not None and found.shape[1:] == (12, 6)
    assert set(auto.choice.costs) >= {"mc, N = 1000", "linearized"}
    assert auto.choice.costs["linearized"] < auto.choice.costs["mc, N = 1000"]
    average(scorer.scoring.likelihood.questions(found))  # distributions of each question


def test_the_merged_mean_is_a_pipeline_of_sigmoids(scorer: Scorer, tmp_path: Path) -> None:
    expected = own_logits(scorer).sigmoid()
    scorer.model.save_pretrained(tmp_path / "run")
    base = scorer.model.get_base_model().config.name_or_path
    plain, tokenizer = load_base(base, labels=LABELS, several=True)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "run" / MEAN_DIRECTORY)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    for options in ({"function_to_apply": "sigmoid"}, {}):
        classify = pipeline("text-classification", str(tmp_path / "merged"), top_k=None, **options)
        for text, probs in zip(TEXTS, expected, strict=True):
            scores = {each["label"]: each["score"] for each in classify([text])[0]}
            assert [scores[label] for label in LABELS] == pytest.approx(probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("likelihood", [OneLabel(), SeveralLabels()])
def test_the_curvature_is_that_of_the_loss(likelihood: OneLabel | SeveralLabels) -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    answers = torch.tensor([2]) if isinstance(likelihood, OneLabel) else torch.tensor([[1, 0, 1]])
    hessian = torch.autograd.functional.hessian(lambda z: likelihood.loss(z, answers), logits)[0, :, 0]
    root = likelihood.curvature_root(logits)[0]
    torch.testing.assert_close(root @ root.T, hessian)
    # -log of the sum over all labels that a row may have
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    sums = logits[0] if isinstance(likelihood, OneLabel) else every @ logits[0]
    torch.testing.assert_close(likelihood.energy(logits)[0], -sums.logsumexp(dim=0))


def test_uncertainty_of_a_row_is_the_sum_over_its_labels() -> None:
    torch.manual_seed(0)
    log_probs = SeveralLabels().log_probs(torch.randn(5, 4, 3))
    found = decompose(SeveralLabels().questions(log_probs), per_row=3)
    p = log_probs.double().exp()[..., 1::2]

    def bits(p: Tensor) -> Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log()).sum(dim=-1)

    torch.testing.assert_close(found.total, bits(p.mean(dim=0)), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.aleatoric, bits(p).mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.epistemic, found.total - found.aleatoric)


def test_a_head_knows_its_kind_of_rows() -> None:
    head = Head(tiny_tokenizer(), labels=LABELS, several=True)
    assert head.settings()["several"] is True and "several" not in Head(tiny_tokenizer(), labels=LABELS).settings()
    again = make_scoring(json.loads(json.dumps(head.settings())), tiny_tokenizer())
    assert again.per_row == 3 and again.encode(rows()[2]).marks == (0, 1, 1)
    unknown = again.encode(Example("x", "red", LABELS, None))
    assert not unknown.is_labelled and again.answers([unknown]).tolist() == [[-100] * 3]
    with pytest.raises(UserError, match='Row x has one "label", but the run has several "labels" a row; write it so'):
        again.encode(Example("x", "red", LABELS, 1))
    with pytest.raises(UserError, match='Row 0 has "labels", but the run has one "label" a row; write it so'):
        Head(tiny_tokenizer(), labels=LABELS).encode(rows()[0])
    with pytest.raises(UserError, match="class_weights weigh rows by their one label, and here rows have several"):
        Head(tiny_tokenizer(), labels=LABELS, several=True, class_weights=dict.fromkeys(LABELS, 1.0))
