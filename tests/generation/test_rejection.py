"""How well a score ranks: AUROC, the prediction-rejection ratio, and how true a confidence is."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from scalabl.core.errors import UserError
from scalabl.metrics import evaluate
from scalabl.metrics.ranking import judge_confidence, judge_ranking, rejection_curve
from scalabl.metrics.selective import exact_threshold

FEW = {"bootstrap": 20}


def rows(n=60, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    right = (rng.random(n) < 0.6).astype(float)
    u = rng.normal(size=n) - 0.8 * right
    return (np.round(u) if ties else u), right


def area(order, right, max_rejection=1.0):
    """lm-polygraph's PredictionRejectionArea: the mean quality of the k surest, over the k that are looked at."""
    n = len(right)
    rejected = int(max_rejection * n)
    quality = np.cumsum(np.array(right)[order])[-rejected:] / np.arange(n - rejected + 1, n + 1)
    return quality.sum() / rejected


@pytest.mark.parametrize("max_rejection", [1.0, 0.5, 0.3])
def test_prr_is_lm_polygraphs(max_rejection):
    u, right = rows()
    graded = np.clip(right * 0.8 + 0.1 * np.arange(60) / 60, 0, 1)
    for r in (right, graded):
        oracle, found = area(np.argsort(-r, kind="stable"), r, max_rejection), area(np.argsort(u), r, max_rejection)
        expected = (found - r.mean()) / (oracle - r.mean())
        assert judge_ranking(u, r, max_rejection=max_rejection, **FEW)["prr"].value == pytest.approx(expected)


@pytest.mark.parametrize("max_rejection", [1.0, 0.5])
def test_equal_scores_are_the_mean_over_their_orders(max_rejection):
    u, right = np.array([0.0, 1, 1, 1, 2, 2]), np.array([1.0, 0, 1, 1, 0, 1])
    oracle = area(np.argsort(-right, kind="stable"), right, max_rejection)
    orders = [[0, *a, *b] for a in permutations([1, 2, 3]) for b in permutations([4, 5])]
    found = np.mean([area(order, right, max_rejection) for order in orders])
    expected = (found - right.mean()) / (oracle - right.mean())
    assert judge_ranking(u, right, max_rejection=max_rejection, **FEW)["prr"].value == pytest.approx(expected)


def test_perfect_reversed_and_no_ranking():
    right = np.array([1.0] * 6 + [0.0] * 4)
    best = judge_ranking(1 - right, right, **FEW)
    assert best["auroc"].value == best["prr"].value == 1 and best["prr"].high == 1
    assert best["aurc"].value == pytest.approx(sum(max(0, k - 6) / k for k in range(1, 11)) / 10)
    worst = judge_ranking(right, right, **FEW)
    assert worst["auroc"].value == 0 and worst["prr"].value < 0
    none = judge_ranking(np.zeros(10), right, **FEW)
    assert (
        none["auroc"].value == 0.5
        and none["prr"].value == pytest.approx(0)
        and none["aurc"].value == pytest.approx(0.4)
    )


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns(ties):
    u, right = rows(ties=ties)
    assert judge_ranking(u, right, **FEW)["auroc"].value == pytest.approx(roc_auc_score(1 - right, u))


def test_only_the_order_counts():
    u, right = rows(ties=True)
    expected = judge_ranking(u, right, **FEW)
    assert judge_ranking(np.exp(u), right, **FEW) == expected
    shuffled = np.random.default_rng(1).permutation(len(u))
    again = judge_ranking(u[shuffled], right[shuffled], **FEW)
    assert [again[name].value for name in again] == pytest.approx([expected[name].value for name in expected])
    infinite = np.where(u == u.max(), np.inf, np.where(u == u.min(), -np.inf, u))
    assert judge_ranking(infinite, right, **FEW) == expected


def test_the_interval_holds_the_figure_and_narrows_with_rows():
    widths = []
    for n in (40, 640):
        found = judge_ranking(*rows(n), bootstrap=200)
        for metric in found.values():
            assert metric.low <= metric.value <= metric.high
        widths.append(found["prr"].high - found["prr"].low)
    assert widths[1] < widths[0] / 2


def test_what_is_not_defined_says_why():
    for right, side in ((np.ones(5), "right"), (np.zeros(5), "wrong"), (np.full(5, 0.5), "equally right")):
        found = judge_ranking(np.arange(5.0), right, **FEW)
        assert found["auroc"].value is None and f"every answer is {side}" in found["prr"].reason
        assert found["aurc"].value == pytest.approx(1 - right[0])
    half = judge_ranking(np.arange(4.0), [1, 0.5, 0, 0], **FEW)
    assert "half right" in half["auroc"].reason and half["prr"].value == pytest.approx(1)


def test_risk_against_coverage():
    u, right = rows(ties=True)
    coverage, risk = rejection_curve(u, right)
    assert coverage.tolist() == pytest.approx([k / 60 for k in range(1, 61)])
    assert risk[-1] == pytest.approx(1 - right.mean())
    assert risk.mean() == pytest.approx(judge_ranking(u, right, **FEW)["aurc"].value)


def test_a_confidence_by_its_definitions():
    rng = np.random.default_rng(0)
    c = rng.random(80)
    right = (rng.random(80) < c).astype(float)
    found = judge_confidence(c, right, num_bins=10, **FEW)
    index = np.minimum((c * 10).astype(int), 9)
    gaps = [abs((right - c)[index == b].sum()) for b in range(10)]
    assert found["ece"].value == pytest.approx(sum(gaps) / 80)
    assert found["brier"].value == pytest.approx(np.mean((c - right) ** 2))
    assert found["nll"].value == pytest.approx(log_loss(right, c))


def test_it_agrees_with_the_classifiers_metrics():
    """Above one half, a confidence is the top probability of two classes."""
    rng = np.random.default_rng(2)
    c = 0.5 + rng.random(70) / 2
    right = (rng.random(70) < c).astype(float)
    probs = torch.tensor(np.stack([c, 1 - c], axis=1))
    expected = evaluate(probs, torch.tensor(1 - right).long(), bootstrap=50)
    assert judge_confidence(c, right, bootstrap=50)["ece"] == expected["ece"]
    ranking = judge_ranking(-c, right, bootstrap=50)
    assert ranking["aurc"] == expected["aurc"] and ranking["auroc"] == expected["auroc"]


def test_certain_and_wrong_is_finite():
    found = judge_confidence([1.0, 0.0], [0, 1], **FEW)
    assert found["ece"].value == found["brier"].value == 1 and math.isfinite(found["nll"].value)


def test_a_promised_error_rate_takes_a_confidence():
    """`selective.py` reads a confidence of free text as it reads one of a choice."""
    confidence = np.linspace(1, 0, 400)
    wrong = np.arange(400) >= 200
    threshold = exact_threshold(confidence, wrong, 0.1)
    assert 200 <= threshold.answered < 230 and not threshold.abstains


def test_bad_input_is_refused():
    good = {"uncertainty": [0.0, 1.0], "right": [1.0, 0.0]}
    for change, said in (
        ({"uncertainty": [0.0, math.nan]}, "answer 1 is NaN"),
        ({"uncertainty": []}, "not empty"),
        ({"uncertainty": [0.0]}, "1 scores and 2 answers"),
        ({"right": [1.0, 2.0]}, "outside 0 to 1"),
        ({"max_rejection": 0.0}, "max_rejection"),
        ({"max_rejection": 0.4}, "max_rejection"),
        ({"max_rejection": 1.1}, "max_rejection"),
        ({"bootstrap": 0}, "bootstrap"),
    ):
        with pytest.raises(UserError, match=said):
            judge_ranking(**(good | change))
    with pytest.raises(UserError, match="confidence lies outside"):
        judge_confidence([1.2, 0.5], [1, 0])
