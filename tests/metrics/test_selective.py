"""Thresholds for a promised error rate: exact bounds, the guarantees on simulated rows, and when none is given."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from scalabl.core.errors import UserError
from scalabl.metrics.selective import (
    confidence_score,
    conformal_threshold,
    error_bound,
    exact_threshold,
    first_tested,
    rows_needed,
    rows_needed_on_average,
)
from scalabl.metrics.uncertainty import average, decompose


def simulated(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores uniform on (0, 1); a row of score s is wrong with probability 0.4 (1 - s).

    Above t the error rate is 0.2 (1 - t), and 0.2 (1 - t)^2 of all rows are answered wrongly.
    """
    score = generator.random(rows)
    return score, generator.random(rows) < 0.4 * (1 - score)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_the_bound_is_clopper_and_pearsons(confidence: float) -> None:
    for rows in (1, 7, 300):
        wrong = np.unique([0, 1, rows // 3, rows - 1, rows])
        bounds = error_bound(wrong, np.full(len(wrong), rows), confidence)
        for number, bound in zip(wrong, bounds, strict=True):
            expected = binomtest(int(number), rows, alternative="less").proportion_ci(confidence, method="exact").high
            assert bound == pytest.approx(expected, abs=1e-12)
        assert (np.diff(bounds) > 0).all() and bounds[-1] == 1
    # its meaning: at the bound, so few errors have the probability that is left
    assert binom.cdf(4, 90, error_bound(4, 90, confidence)) == pytest.approx(1 - confidence)


def test_how_many_rows_a_promise_takes() -> None:
    assert rows_needed(0.05, 0.95) == 59 and rows_needed(0.5, 0.5) == 1
    for rate, confidence in ((0.05, 0.95), (0.1, 0.9), (0.3, 0.99)):
        needed = rows_needed(rate, confidence)
        assert error_bound(0, needed, confidence) <= rate < error_bound(0, needed - 1, confidence)
    assert rows_needed_on_average(0.05) == 19 and rows_needed_on_average(0.3) == 3
    # the sequence begins where a few errors are allowed, if there are rows enough; else where none is
    first = first_tested(1000, 0.05)
    wrong = math.floor(0.05 * first / 2)
    assert wrong >= 1 and error_bound(wrong, first) <= 0.05
    assert first_tested(first, 0.05) == first and first_tested(first - 1, 0.05) == 59


def test_the_exact_promise_is_broken_no_more_often_than_it_says() -> None:
    generator, repetitions, promised, confidence = np.random.default_rng(0), 4000, 0.1, 0.9
    found = [exact_threshold(*simulated(200, generator), promised, confidence=confidence) for _ in range(repetitions)]
    true_rate = np.array([0.0 if t.abstains else 0.2 * (1 - max(t.above, 0.0)) for t in found])
    broken = (true_rate > promised).mean()
    tolerance = 3 * math.sqrt(0.1 * 0.9 / repetitions)
    assert broken <= 1 - confidence + tolerance
    # and it is no idle promise: some thresholds do lie too low, and rows are answered
    assert broken > 0.01
    assert np.mean([t.coverage for t in found]) > 0.1

    # the lowest threshold whose held-out rate is within the promise breaks it about every other time
    def careless(score: np.ndarray, wrong: np.ndarray) -> float:
        order = np.argsort(-score)
        within = np.flatnonzero(wrong[order].cumsum() / np.arange(1, len(score) + 1) <= promised)
        return 0.2 * (1 - score[order][within[-1]]) if len(within) else 0.0

    assert np.mean([careless(*simulated(200, generator)) > promised for _ in range(500)]) > 0.4


def test_the_exact_promise_holds_for_scores_with_ties() -> None:
    generator, repetitions = np.random.default_rng(1), 3000
    broken = 0
    for _ in range(repetitions):
        score, wrong = simulated(200, generator)
        # a score in eighths: the error rate above it is that of the scores behind it
        found = exact_threshold(np.ceil(8 * score) / 8, wrong, 0.1, confidence=0.9)
        assert found.answered == (np.ceil(8 * score) / 8 > found.above).sum()
        broken += not found.abstains and 0.2 * (1 - max(found.above, 0.0)) > 0.1
    assert 0 < broken / repetitions <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repetitions)


@pytest.mark.parametrize("rows", [25, 200])
def test_the_conformal_promise_holds_on_average(rows: int) -> None:
    generator, repetitions, promised = np.random.default_rng(2), 4000, 0.05
    found = [conformal_threshold(*simulated(rows, generator), promised) for _ in range(repetitions)]
    risk = np.array([0.2 * (1 - min(max(t.above, 0.0), 1.0)) ** 2 for t in found])
    tolerance = 3 * risk.std() / math.sqrt(repetitions)
    assert risk.mean() <= promised + tolerance
    # Angelopoulos et al. 2022, theorem 2: not below it by more than 2 / (n + 1)
    assert risk.mean() >= promised - 2 / (rows + 1) - tolerance


@pytest.mark.parametrize("threshold_of", [exact_threshold, conformal_threshold])
def test_a_laxer_promise_answers_no_fewer_rows(threshold_of) -> None:  # type: ignore[no-untyped-def]
    score, wrong = simulated(400, np.random.default_rng(3))
    found = [threshold_of(score, wrong, rate) for rate in (0.001, 0.05, 0.1, 0.15, 0.3, 0.9)]
    assert found[0].abstains and found[-1].above == -math.inf and found[-1].coverage == 1
    assert found[0].answered == 0 < found[2].answered < 400
    assert [t.above for t in found] == sorted((t.above for t in found), reverse=True)
    for one in found:
        above = score > one.above
        assert (one.answered, one.wrong) == (above.sum(), wrong[above].sum())
        # neither the order of rows nor the scale of the score matters
        order = np.random.default_rng(4).permutation(400)
        other = threshold_of(torch.from_numpy(np.exp(score))[order], torch.from_numpy(wrong)[order], one.max_error)
        assert (other.answered, other.wrong) == (one.answered, one.wrong)


def test_more_confidence_answers_no_more_rows() -> None:
    score, wrong = simulated(400, np.random.default_rng(3))
    answered = [exact_threshold(score, wrong, 0.12, confidence=c).answered for c in (0.5, 0.9, 0.99, 0.999999)]
    assert answered == sorted(answered, reverse=True) and answered[0] > answered[-1]


def test_the_exact_threshold_is_the_end_of_the_tests_that_pass() -> None:
    # 100 sure rows without an error, then only errors: by hand, one test after another
    score = np.linspace(1, 0, 140)
    wrong = np.arange(140) >= 100
    found = exact_threshold(score, wrong, 0.05)
    passing = [k for k in range(59, 141) if binom.cdf(max(0, k - 100), k, 0.05) <= 0.05]
    assert found.answered == passing[-1] and found.above == score[passing[-1]]
    assert "At most 5 % of answered rows are wrong, with confidence 95 %" in found.sentence


def test_where_nothing_can_be_promised_nothing_is_answered_and_it_says_why() -> None:
    few = exact_threshold(np.arange(58), np.zeros(58), 0.05)
    assert few.abstains and few.coverage == 0 and few.above == math.inf
    assert "takes 59 held-out rows without an error, and there are 58" in few.sentence
    assert exact_threshold(np.arange(59), np.zeros(59), 0.05).coverage == 1
    bad = exact_threshold(np.arange(500), np.ones(500), 0.05)
    assert bad.abstains and "surest held-out rows are wrong" in bad.sentence
    assert exact_threshold(np.zeros(500), np.arange(500) < 100, 0.05).abstains  # a score that tells nothing apart
    assert exact_threshold(np.zeros(500), np.arange(500) < 100, 0.5).coverage == 1

    few = conformal_threshold(np.arange(18), np.zeros(18), 0.05)
    assert few.abstains and "takes 19 held-out rows, and there are 18" in few.sentence
    assert conformal_threshold(np.arange(19), np.zeros(19), 0.05).coverage == 1
    # one error is allowed at 39 rows: the second surest error and what lies below it is not answered
    found = conformal_threshold(np.arange(39), np.isin(np.arange(39), (3, 30, 20)), 0.05)
    assert found.above == 20 and (found.answered, found.wrong) == (18, 1)
    all_wrong = conformal_threshold(np.zeros(39), np.ones(39), 0.05)
    assert (all_wrong.answered, all_wrong.wrong, all_wrong.above) == (0, 0, 0)


def test_scores_are_higher_where_a_row_is_surer() -> None:
    logits = torch.tensor([[[9.0, 0, 0], [1, 0, 0], [5, 0, 0]], [[9.0, 0, 0], [1, 0, 0], [0, 5, 0]]])
    log_probs = logits.log_softmax(-1)
    probs, parts = average(log_probs), decompose(log_probs)
    assert confidence_score(log_probs).tolist() == probs.max(dim=1).values.tolist()
    assert confidence_score(log_probs, "entropy").tolist() == (-parts.total).tolist()
    assert confidence_score(log_probs, "epistemic").tolist() == (-parts.epistemic).tolist()
    for name in ("probability", "entropy"):
        assert confidence_score(log_probs, name).argmax() == 0
    assert confidence_score(log_probs, "epistemic").argmin() == 2  # the particles contradict each other
    with pytest.raises(UserError, match="no epistemic part"):
        confidence_score(log_probs[:1], "epistemic")
    with pytest.raises(UserError, match="no score 'margin'"):
        confidence_score(log_probs, "margin")


@pytest.mark.parametrize(
    ("score", "wrong", "rate", "message"),
    [
        ([], [], 0.1, "shape"),
        ([1.0, 2.0], [True], 0.1, "shape"),
        ([[1.0]], [[True]], 0.1, "shape"),
        ([1.0, math.nan], [True, False], 0.1, "NaN"),
        ([1.0], [False], 0.0, "max_error is 0.0"),
        ([1.0], [False], 1.0, "max_error is 1.0"),
    ],
)
def test_bad_input(score: list, wrong: list, rate: float, message: str) -> None:  # type: ignore[type-arg]
    for function in (exact_threshold, conformal_threshold):
        with pytest.raises(UserError, match=message):
            function(score, wrong, rate)
    with pytest.raises(UserError, match="confidence is 1"):
        exact_threshold([1.0], [False], 0.5, confidence=1)


def test_where_nothing_can_be_promised_what_would_do_is_said() -> None:
    generator = np.random.default_rng(0)
    score = generator.random(120)
    wrong = generator.random(120) > 0.55 + 0.5 * score  # the surest are nearly always right
    found = exact_threshold(score, wrong, 0.04)
    assert found.abstains and found.wanted is not None and found.wanted % 120 == 0
    assert found.possible is not None
    assert exact_threshold(score, wrong, found.possible).answered > 0
    assert exact_threshold(score, wrong, round(found.possible - 0.01, 2)).abstains
    times = found.wanted // 120
    more = exact_threshold(np.repeat(score, times) + 1e-9 * np.arange(120 * times), np.repeat(wrong, times), 0.04)
    assert more.answered > 0
    hopeless = exact_threshold(score, np.ones(120, dtype=bool), 0.04)
    assert hopeless.wanted is None and hopeless.possible is None
    few = exact_threshold(score[:20], wrong[:20], 0.04)
    assert few.abstains and few.wanted == rows_needed(0.04)
