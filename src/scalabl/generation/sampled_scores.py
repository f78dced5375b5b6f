"""Scores of one answer from k more answers that were sampled: how much they disagree, and with it.

With samples y^1 .. y^k of T_i tokens, p(y^i) the product over tokens of the average's probability, and semantic sets C:

    self_consistency                the share of samples that lie in the answer's set
    predictive_entropy              -1/k sum_i log p(y^i)
    mean_predictive_entropy         -1/k sum_i 1/T_i log p(y^i)
    semantic_entropy                -sum_C p(C) log p(C), p(C) ~ sum_{i in C} p(y^i)^(1/T_i), summing to one
    semantic_entropy_monte_carlo    -1/k sum_i log sum_{j in C(i)} p(y^j)
    discrete_semantic_entropy       -sum_C |C|/k log |C|/k
    number_of_sets                  how many sets the samples fall into
    lexical_similarity              mean ROUGE-L (F1 of the longest common run of words) over pairs of samples
    degree_uncertainty              1 - 1/k^2 sum_ij W_ij, W_ij the Jaccard index of the words of two samples
    laplacian_eigenvalues           sum_l max(0, 1 - lambda_l), lambda the eigenvalues of 1 - D^-1/2 W D^-1/2

All are estimates for the distribution that was sampled from: at a temperature other than one, log p(y^i) is still that
of the model itself. Entropies are in nats.

Sources: Wang et al. 2023 (self-consistency); Malinin and Gales 2021 and Kuhn et al. 2023 (2302.09664) for predictive
entropy, lexical similarity and the Monte Carlo form of semantic entropy; Farquhar et al. 2024 (Nature 630) for the
normalised and the discrete form; Lin et al. 2024 (2305.19187) for sets, degrees and eigenvalues.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from scalabl.core.errors import UserError
from scalabl.generation.decoding import Decoded
from scalabl.generation.equivalence import Equivalence, semantic_sets
from scalabl.generation.sequence_scores import Score, log_probability, mean_log_probability


def sampled_scores(
    answer: Decoded, samples: Sequence[Decoded], equivalence: Equivalence, question: str = ""
) -> dict[str, float]:
    """Every score of `SAMPLED_SCORES`, by name.

    Args:
        answer: the answer that is scored.
        samples: k more answers to the same prompt, sampled; at least two.
        equivalence: which texts mean the same (`clusters.equivalence`).
        question: what an entailment model sees in front of each of them.

    Raises:
        UserError: fewer than two samples, an answer without tokens, or NaN.
    """
    if len(samples) < 2:
        raise UserError(
            f"Scores of sampled answers take at least 2 samples, and there are {len(samples)}; 10 are usual."
        )
    # the answer comes last, so that it does not decide how the samples fall into sets
    sets = semantic_sets([sample.text for sample in samples] + [answer.text], equivalence, question)
    return {name: score.function(answer, samples, sets) for name, score in SAMPLED_SCORES.items()}


def self_consistency(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """Share of the samples in the answer's set; sets (k + 1,) of the samples and, last, of the answer."""
    return float(np.mean(np.array(sets[:-1]) == sets[-1]))


def predictive_entropy(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """-1/k sum_i log p(y^i)."""
    return float(-np.mean([log_probability(sample) for sample in samples]))


def mean_predictive_entropy(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """-1/k sum_i 1/T_i log p(y^i)."""
    return float(-np.mean([mean_log_probability(sample) for sample in samples]))


def semantic_entropy(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """Entropy of the sets' masses, length-normalised probabilities summed within a set and normalised over all."""
    masses = _set_log_masses([mean_log_probability(sample) for sample in samples], sets)
    return _entropy(np.exp(masses - logsumexp(masses)))


def semantic_entropy_monte_carlo(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """-1/k sum_i log p(C(i)), p(C) the sum of the samples' probabilities in C; equal samples count each time."""
    masses = _set_log_masses([log_probability(sample) for sample in samples], sets)
    return float(-np.mean([masses[number] for number in sets[:-1]]))


def discrete_semantic_entropy(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """Entropy of the shares of samples in each set, 0 to log k; needs no probabilities."""
    return _entropy(np.bincount(sets[:-1]) / len(samples))


def number_of_sets(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """How many sets the samples fall into, 1 to k."""
    return float(len(set(sets[:-1])))


def lexical_similarity(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """Mean ROUGE-L of all pairs of samples, 0 to 1; words as they are, not stemmed."""
    words = [_words(sample.text) for sample in samples]
    return float(np.mean([rouge_l(a, b) for a, b in combinations(words, 2)]))


def degree_uncertainty(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """1 - the mean over all pairs, those of a sample with itself included, of the Jaccard index of their words."""
    return float(1 - _jaccard(samples).mean())


def laplacian_eigenvalues(answer: Decoded, samples: Sequence[Decoded], sets: Sequence[int]) -> float:
    """How many sets there are, in between whole numbers: k samples of no common word give k, equal ones 1."""
    similarity = _jaccard(samples)
    scale = 1 / np.sqrt(similarity.sum(axis=1))
    # 1 - an eigenvalue of the Laplacian is an eigenvalue of D^-1/2 W D^-1/2
    return float(np.maximum(0, np.linalg.eigvalsh(scale[:, None] * similarity * scale[None, :])).sum())


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words [Lin 2004]; two empty ones are equal."""
    if not a or not b:
        return float(len(a) == len(b))
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b))


def _set_log_masses(log_probs: Sequence[float], sets: Sequence[int]) -> NDArray[np.float64]:
    """log sum_{i in C} p_i of every set C = 0, 1, ... of the samples."""
    values, numbers = np.array(log_probs), np.array(sets[: len(log_probs)])
    return np.array([logsumexp(values[numbers == number]) for number in range(numbers.max() + 1)])


def _entropy(shares: NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return float(max(0.0, -(some * np.log(some)).sum()))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _jaccard(samples: Sequence[Decoded]) -> NDArray[np.float64]:
    """(k, k) share of common words among all words of two texts; texts without words are equal to each other."""
    words = [set(sample.text.lower().split()) for sample in samples]
    return np.array([[len(a & b) / len(a | b) if a | b else 1.0 for b in words] for a in words])


_SampledScore = Callable[[Decoded, Sequence[Decoded], Sequence[int]], float]


SAMPLED_SCORES: dict[str, Score] = {
    "self_consistency": Score(self_consistency, False, sampled=True),
    "predictive_entropy": Score(predictive_entropy, True, sampled=True),
    "mean_predictive_entropy": Score(mean_predictive_entropy, True, sampled=True),
    "semantic_entropy": Score(semantic_entropy, True, sampled=True),
    "semantic_entropy_monte_carlo": Score(semantic_entropy_monte_carlo, True, sampled=True),
    "discrete_semantic_entropy": Score(discrete_semantic_entropy, True, sampled=True),
    "number_of_sets": Score(number_of_sets, True, sampled=True),
    "lexical_similarity": Score(lexical_similarity, False, sampled=True),
    "degree_uncertainty": Score(degree_uncertainty, True, sampled=True),
    "laplacian_eigenvalues": Score(laplacian_eigenvalues, True, sampled=True),
}
"""The scores that sampled answers give: name -> function, direction and cost."""
