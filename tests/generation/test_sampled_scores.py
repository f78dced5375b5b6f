"""Scores of an answer from sampled ones: closed forms, invariances, and lm-polygraph's formulas."""

import math
from itertools import combinations

import numpy as np
import pytest
from decoded_texts import with_probability

from scalabl.core.errors import UserError
from scalabl.generation.equivalence import equivalence
from scalabl.generation.scores import SAMPLED_SCORES, rouge_l, sampled_scores

NORMALISED = equivalence("normalised")
ANSWER = with_probability("Paris", [0.5, 0.5])
SAMPLES = [
    with_probability("Paris", [0.5, 0.5]),
    with_probability("the city of Lyon", [0.25, 0.5, 0.5]),
    with_probability("paris.", [0.125]),
    with_probability("The city of Lyon!", [0.5]),
    with_probability("Rome", [0.75, 0.5]),
]
MASSES = [0.25, 0.0625, 0.125, 0.5, 0.375]


def entropy(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def test_closed_forms():
    found = sampled_scores(ANSWER, SAMPLES, NORMALISED)
    lengths = [len(sample.tokens) for sample in SAMPLES]
    normal = [p ** (1 / t) for p, t in zip(MASSES, lengths, strict=True)]
    by_set = [normal[0] + normal[2], normal[1] + normal[3], normal[4]]
    raw = [0.375, 0.5625, 0.375]
    assert found["self_consistency"] == 2 / 5
    assert found["predictive_entropy"] == pytest.approx(-np.mean(np.log(MASSES)))
    assert found["mean_predictive_entropy"] == pytest.approx(-np.mean(np.log(normal)))
    assert found["semantic_entropy"] == pytest.approx(entropy([mass / sum(by_set) for mass in by_set]))
    of_sample = [raw[0], raw[1], raw[0], raw[1], raw[2]]
    assert found["semantic_entropy_monte_carlo"] == pytest.approx(-np.mean(np.log(of_sample)))
    assert found["discrete_semantic_entropy"] == pytest.approx(entropy([0.4, 0.4, 0.2]))
    assert found["number_of_sets"] == 3
    # ROUGE-L counts words without punctuation, the Jaccard index as they stand between spaces
    assert found["lexical_similarity"] == pytest.approx(2 / 10)
    jaccard = np.eye(5)
    jaccard[1, 3] = jaccard[3, 1] = 3 / 5  # the city of, and "lyon" or "lyon!"
    assert found["degree_uncertainty"] == pytest.approx(1 - jaccard.sum() / 25)
    scale = np.diag(jaccard.sum(1) ** -0.5)
    laplacian = np.eye(5) - scale @ jaccard @ scale
    expected = sum(max(0, 1 - value) for value in np.linalg.eigvalsh(laplacian))
    assert found["laplacian_eigenvalues"] == pytest.approx(expected)
    assert found.keys() == SAMPLED_SCORES.keys()


def test_the_order_of_samples_does_not_matter():
    expected = sampled_scores(ANSWER, SAMPLES, NORMALISED)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert sampled_scores(ANSWER, [SAMPLES[i] for i in order], NORMALISED) == pytest.approx(expected, abs=1e-12)


def test_equal_samples_leave_nothing_open():
    found = sampled_scores(ANSWER, [ANSWER] * 4, NORMALISED)
    assert found["self_consistency"] == 1 and found["number_of_sets"] == 1 and found["lexical_similarity"] == 1
    for name in ("semantic_entropy", "discrete_semantic_entropy", "degree_uncertainty"):
        assert found[name] == 0, name
    assert found["laplacian_eigenvalues"] == pytest.approx(1)
    # k equal samples of probability p make a set of mass k p
    assert found["semantic_entropy_monte_carlo"] == pytest.approx(-math.log(4 * 0.25))


def test_samples_without_a_common_word_leave_all_open():
    samples = [with_probability(text, [0.5]) for text in ("red", "blue", "green", "stone")]
    found = sampled_scores(with_probability("bee", [0.5]), samples, NORMALISED)
    assert found["self_consistency"] == 0 and found["number_of_sets"] == 4 and found["lexical_similarity"] == 0
    assert found["semantic_entropy"] == found["discrete_semantic_entropy"] == pytest.approx(math.log(4))
    assert found["degree_uncertainty"] == 0.75 and found["laplacian_eigenvalues"] == pytest.approx(4)


def test_the_answer_does_not_join_the_samples():
    """All but self-consistency are of the samples alone, whatever the answer is."""
    one, other = (sampled_scores(a, SAMPLES, NORMALISED) for a in (ANSWER, with_probability("Oslo", [0.1])))
    assert other.pop("self_consistency") == 0 < one.pop("self_consistency")
    assert one == other


def test_directions_and_costs():
    agree = [with_probability("blue stone", [0.9, 0.9])] * 4
    differ = [with_probability(text, [0.2, 0.2]) for text in ("red one", "blue two", "a bee", "blue stone")]
    good, bad = (sampled_scores(agree[0], samples, NORMALISED) for samples in (agree, differ))
    for name, score in SAMPLED_SCORES.items():
        assert score.uncertainty(good[name]) < score.uncertainty(bad[name]), name
        assert score.sampled and score.decodes(10) == 11


def test_very_unlikely_samples_keep_their_entropy():
    samples = [with_probability(text, [1e-9] * 90) for text in ("red", "red", "blue", "blue")]
    assert sampled_scores(ANSWER, samples, NORMALISED)["semantic_entropy"] == pytest.approx(math.log(2))


def test_one_sample_is_refused():
    with pytest.raises(UserError, match="at least 2 samples"):
        sampled_scores(ANSWER, SAMPLES[:1], NORMALISED)


def longest_common(a, b):
    return max(
        n for n in range(min(len(a), len(b)) + 1)
        for part in combinations(a, n) if n == 0 or any(part == other for other in combinations(b, n))
    )  # fmt: skip


def test_rouge_l_is_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = (list(rng.integers(0, 4, rng.integers(1, 7))) for _ in range(2))
        n = longest_common(a, b)
        precision, recall = n / len(b), n / len(a)
        expected = 2 * precision * recall / (precision + recall) if n else 0.0
        assert rouge_l(a, b) == pytest.approx(expected) == rouge_l(b, a)
    assert rouge_l([], []) == 1 and rouge_l([], ["a"]) == 0
