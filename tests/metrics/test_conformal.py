"""Sets of labels: their scores by hand, the exact quantile, and the coverage that they promise."""

import math

import numpy as np
import pytest

from scalabl.core.errors import UserError
from scalabl.metrics.conformal import (
    conformal_quantile,
    label_scores,
    label_sets,
    rows_for_coverage,
    set_thresholds,
)

PROBS = np.array([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])


def drawn(rows: int, seed: int, classes: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities that are too sure, with labels drawn from less sure ones, and u."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)) * 2 + np.linspace(0, 1.5, classes)
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) > generator.random((rows, 1))).argmax(axis=1)
    sure = truth**2
    return sure / sure.sum(axis=1, keepdims=True), labels, generator.random(rows)


def test_scores_by_hand() -> None:
    assert label_scores(PROBS) == pytest.approx(1 - PROBS)
    assert label_scores(PROBS, "aps") == pytest.approx(np.array([[0.5, 1.0, 0.8], [0.9, 1.0, 0.8]]))
    half = label_scores(PROBS, "aps", [0.5, 0.0])
    assert half == pytest.approx(np.array([[0.25, 0.9, 0.65], [0.8, 0.9, 0.0]]))
    penalty = np.array([[0, 0.01, 0], [0, 0.01, 0]])
    assert label_scores(PROBS, "raps", [0.5, 0.0]) == pytest.approx(half + penalty)
    with pytest.raises(UserError, match="no score of sets 'top'; choose one of lac, aps, raps"):
        label_scores(PROBS, "top")


def test_the_quantile_is_exact() -> None:
    scores = np.arange(1, 20) / 100  # 19 rows
    assert conformal_quantile(scores[::-1], 0.9) == 0.18  # the ceil(20 * 0.9) = 18th
    assert conformal_quantile(scores, 0.95) == 0.19
    assert conformal_quantile(scores, 0.81) == 0.17  # ceil(16.2)
    with pytest.raises(UserError, match="96 % takes at least 24 held-out rows, and there are 19"):
        conformal_quantile(scores, 0.96)


@pytest.mark.parametrize(("coverage", "rows"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)])
def test_how_many_rows_a_coverage_takes(coverage: float, rows: int) -> None:
    assert rows_for_coverage(coverage) == rows
    assert math.isfinite(conformal_quantile(np.zeros(rows), coverage))
    if rows > 1:
        with pytest.raises(UserError, match=f"at least {rows} held-out rows, and there are {rows - 1}"):
            conformal_quantile(np.zeros(rows - 1), coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.1, math.nan])
def test_a_coverage_that_is_none_is_refused(coverage: float) -> None:
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        rows_for_coverage(coverage)


@pytest.mark.parametrize("kind", ["lac", "aps", "raps"])
def test_coverage_on_average_over_draws(kind: str) -> None:
    """(n + 1) c is whole here, so that the expected coverage is c itself but for the likeliest label, always kept."""
    held, new, coverage, draws = 39, 400, 0.8, 300
    found, bare = [], []
    for seed in range(draws):
        probs, labels, u = drawn(held + new, seed)
        scores = label_scores(probs, kind, u)
        thresholds = set_thresholds(scores[:held], labels[:held], coverage)
        inside = label_sets(probs[held:], scores[held:], thresholds)
        right = np.arange(new), labels[held:]
        found.append(inside[right].mean())
        bare.append((scores[held:] <= thresholds[0])[right].mean())
    error = 3 * np.std(bare) / math.sqrt(draws)
    assert abs(np.mean(bare) - coverage) < error
    assert np.mean(found) > coverage - error


def test_coverage_within_each_class() -> None:
    half = 20_000
    probs, labels, u = drawn(2 * half, 0)
    scores = label_scores(probs, "lac", u)
    held, new = slice(0, half), slice(half, 2 * half)
    of_each = set_thresholds(scores[held], labels[held], 0.9, classes=list("abcdef"))
    one = set_thresholds(scores[held], labels[held], 0.9)
    of_right = scores[np.arange(2 * half), labels]

    def within(thresholds: tuple[float, ...]) -> np.ndarray:
        covered = of_right <= np.broadcast_to(thresholds, 6)[labels]
        return np.array([covered[new][labels[new] == c].mean() for c in range(6)])

    assert within(of_each) == pytest.approx(np.full(6, 0.9), abs=0.03)
    assert within(one).min() < 0.85  # what a threshold of each class is for
    inside = label_sets(probs[new], scores[new], of_each)
    assert inside[np.arange(half), labels[new]].mean() >= 0.89


def test_a_class_with_too_few_rows_is_named() -> None:
    labels = np.array([0] * 9 + [1] * 8)
    scores = np.zeros((17, 2))
    assert set_thresholds(scores, labels, 0.8, classes=["a", "b"]) == (0.0, 0.0)
    with pytest.raises(UserError, match="takes at least 9 held-out rows of each, and 'b' has 8"):
        set_thresholds(scores, labels, 0.9, classes=["a", "b"])


def test_the_likeliest_label_is_always_in_a_set() -> None:
    inside = label_sets(PROBS, label_scores(PROBS), [0.1])
    assert inside.tolist() == [[True, False, False], [False, False, True]]
    assert label_sets(PROBS, label_scores(PROBS), [0.75]).tolist() == [[True, False, True], [False, False, True]]
