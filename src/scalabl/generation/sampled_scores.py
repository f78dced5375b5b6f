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
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, logsumexp

from scalabl.core.errors import UserError
from scalabl.generation.decoding import Decoded
from scalabl.generation.equivalence import Equivalence, semantic_sets
from scalabl.generation.sequence_scores import Score, log_mean, token_log_probs

SAMPLED_SCORES: dict[str, Score] = {
    "self_consistency": Score(False, sampled=True),
    "predictive_entropy": Score(True, sampled=True),
    "mean_predictive_entropy": Score(True, sampled=True),
    "semantic_entropy": Score(True, sampled=True),
    "semantic_entropy_monte_carlo": Score(True, sampled=True),
    "discrete_semantic_entropy": Score(True, sampled=True),
    "number_of_sets": Score(True, sampled=True),
    "lexical_similarity": Score(False, sampled=True),
    "degree_uncertainty": Score(True, sampled=True),
    "laplacian_eigenvalues": Score(True, sampled=True),
}
"""The scores that sampled answers give, by name; the module's docstring has their equations."""


def sampled_scores(
    answer: Decoded, samples: Sequence[Decoded], equivalence: Equivalence, question: str = ""
) -> dict[str, float]:
    """Every score of `SAMPLED_SCORES`, by name.

    Args:
        answer: the answer that is scored.
        samples: k more answers to the same prompt, sampled; at least two.
        equivalence: which texts mean the same (`scalabl.generation.equivalence`).
        question: what an entailment model sees in front of each of them.

    Raises:
        UserError: fewer than two samples, an answer without tokens, or NaN.
    """
    if len(samples) < 2:
        raise UserError(
            f"Scores of sampled answers take at least 2 samples, and there are {len(samples)}; 10 are usual."
        )
    texts = [sample.text for sample in samples]
    # the answer comes last, so that it does not decide how the samples fall into sets
    *sets, own = semantic_sets([*texts, answer.text], equivalence, question)
    tokens = [log_mean(token_log_probs(sample)) for sample in samples]
    log_probs = np.array([float(of_sample.sum()) for of_sample in tokens])  # (k,) log p(y^i)
    normalised = np.array([float(of_sample.mean()) for of_sample in tokens])  # (k,) 1/T_i log p(y^i)
    masses = _set_log_masses(normalised, sets)
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    similarity = _jaccard(texts)
    scale = 1 / np.sqrt(similarity.sum(axis=1))
    # 1 - an eigenvalue of the Laplacian is an eigenvalue of D^-1/2 W D^-1/2
    eigenvalues = np.linalg.eigvalsh(scale[:, None] * similarity * scale[None, :])
    found = {
        "self_consistency": np.mean(np.array(sets) == own),
        "predictive_entropy": -np.mean(log_probs),
        "mean_predictive_entropy": -np.mean(normalised),
        "semantic_entropy": _entropy(np.exp(masses - logsumexp(masses))),
        # equal samples count each time
        "semantic_entropy_monte_carlo": -np.mean(_set_log_masses(log_probs, sets)[sets]),
        "discrete_semantic_entropy": _entropy(np.bincount(sets) / len(samples)),
        "number_of_sets": len(set(sets)),
        "lexical_similarity": np.mean([rouge_l(a, b) for a, b in combinations(words, 2)]),  # words are not stemmed
        "degree_uncertainty": 1 - similarity.mean(),
        "laplacian_eigenvalues": np.maximum(0, eigenvalues).sum(),
    }
    return {name: float(value) for name, value in found.items()}


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


def _set_log_masses(log_probs: NDArray[np.float64], sets: Sequence[int]) -> NDArray[np.float64]:
    """log sum_{i in C} p_i of every set C = 0, 1, ... of the samples."""
    numbers = np.array(sets)
    return np.array([logsumexp(log_probs[numbers == number]) for number in range(max(sets) + 1)])


def _entropy(shares: NDArray[np.float64]) -> float:
    return max(0.0, float(entr(shares).sum()))


def _jaccard(texts: Sequence[str]) -> NDArray[np.float64]:
    """(k, k) share of common words among all words of two texts; texts without words are equal to each other."""
    words = [set(text.lower().split()) for text in texts]
    return np.array([[len(a & b) / len(a | b) if a | b else 1.0 for b in words] for a in words])
