"""Scores of one answer: from its one decode, and from more answers that are sampled.

The one decode has (N, T) log-probabilities of the answer's tokens and (T,) figures, in nats. With y the T tokens,
p_n(y_t) = p(y_t | y_<t, x, s_n) of particle n, and p(y_t) = 1/N sum_n p_n(y_t):

    log_probability                    sum_t log p(y_t); with a minus, "maximum sequence probability"
    mean_log_probability               1/T of it: minus the logarithm of the perplexity
    min_log_probability                min_t log p(y_t): the least expected token
    joint_log_probability              log 1/N sum_n prod_t p_n(y_t): each particle writes the whole answer
    first_token_log_probability        log p(y_1); first_token_entropy and first_token_epistemic likewise
    {mean,sum,max}_entropy             of H[p(. | y_<t)], the total uncertainty of every token
    {mean,sum,max}_aleatoric           of 1/N sum_n H[p_n]
    {mean,sum,max}_epistemic           of the difference, the mutual information of the token and s
    {mean,sum,max}_intersection        of the entropy of the intersection probability (`token_figures`)
    {variance,std}_log_probability     over particles, of sum_t log p_n(y_t), divided by N
    {variance,std}_mean_log_probability   likewise of 1/T sum_t log p_n(y_t)
    {sum,mean}_reverse_mutual_information   over t, of log p(y_t) - 1/N sum_n log p_n(y_t)
    {sum,mean}_pairwise_kl             over t, of 1/N sum_n w_n (log p_n(y_t) - 1/N sum_m log p_m(y_t)), w_n = p_n / p
    sequence_mutual_information        log N - H[w], w_n ~ prod_t p_n(y_t): what the answer tells about the particle

The sums over tokens are sequence-level quantities by the chain rule, taken along the one text y instead of all texts.
What they estimate: sum_entropy the total uncertainty H[y], sum_epistemic the mutual information I[y; s], the reverse
mutual information E_s KL(p || p_s), and the expected pairwise KL divergence E KL(p_s || p_s'), which is the sum of the
two. The last three score chosen tokens only; weights w_n make a token drawn from p stand for one drawn from p_n.
sequence_mutual_information does not go by tokens: it is the value at y of KL(posterior of n given y || uniform),
whose expectation over y of the joint predictive is I[y; s]; it lies between 0 and log N.

Sources: Malinin and Gales 2021 (2002.07650) for the chain rule, (reverse) mutual information and pairwise KL of
sequences; Houlsby et al. 2011 for the token's mutual information; Cuzzolin 2009 for the intersection probability;
Fomicheva et al. 2020 for variances over particles (there: of MC dropout).

The sampled answers say how much they disagree, and with it. With samples y^1 .. y^k of T_i tokens, p(y^i)
the product over tokens of the average's probability, and semantic sets C:

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

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import entr, logsumexp
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.generation.decoding import Decoded
from scalabl.generation.equivalence import Equivalence, semantic_sets


@dataclass(frozen=True)
class Score:
    """What is known of a score beside its value.

    Attributes:
        higher_is_uncertain: which way it points.
        sampled: whether it needs samples beside the answer.
        particles: whether it takes two particles or more: with one it is the same for every answer.
    """

    higher_is_uncertain: bool
    sampled: bool = False
    particles: bool = False

    def decodes(self, samples: int) -> int:
        """How many texts are generated for it, the answer itself being one: 1, or 1 + samples."""
        return 1 + samples if self.sampled else 1

    def uncertainty(self, value: Any) -> Any:
        """A value, or an array of them, turned so that higher is less sure."""
        return value if self.higher_is_uncertain else -value


_LOWEST = math.log(torch.finfo(torch.float64).tiny)  # one impossible token must not make every figure infinite
_FIGURES = {"entropy": "total", "aleatoric": "aleatoric", "epistemic": "epistemic", "intersection": "intersection"}
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "max": Tensor.amax,
    "first_token": lambda values: values[0],
}
# name -> figure and pool of its tokens' values
_POOLED = {
    f"{pool}_{name}": (name, pool)
    for name in _FIGURES
    for pool in _POOLS
    if pool != "first_token" or name in ("entropy", "epistemic")
}

SEQUENCE_SCORES: dict[str, Score] = {
    "log_probability": Score(False),
    "mean_log_probability": Score(False),
    "min_log_probability": Score(False),
    "joint_log_probability": Score(False),
    "first_token_log_probability": Score(False),
    **{name: Score(True, particles=figure == "epistemic") for name, (figure, _) in _POOLED.items()},
    "variance_log_probability": Score(True, particles=True),
    "std_log_probability": Score(True, particles=True),
    "variance_mean_log_probability": Score(True, particles=True),
    "std_mean_log_probability": Score(True, particles=True),
    "sum_reverse_mutual_information": Score(True, particles=True),
    "mean_reverse_mutual_information": Score(True, particles=True),
    "sum_pairwise_kl": Score(True, particles=True),
    "mean_pairwise_kl": Score(True, particles=True),
    "sequence_mutual_information": Score(True, particles=True),
}
"""The scores that one decode gives, by name, as the module's docstring defines them."""


def sequence_scores(answer: Decoded) -> dict[str, float]:
    """Every score of `SEQUENCE_SCORES`, by name.

    Raises:
        UserError: the answer has no token, or NaN.
    """
    log_probs = token_log_probs(answer)  # (N, T)
    mean, text = log_mean(log_probs), log_probs.sum(dim=1)  # (T,) and (N,)
    ratio = log_probs - mean  # log w_n of every token
    # >= 0 token by token (Jensen), but for rounding
    reverse = (-ratio).mean(dim=0)
    # 1/N sum_n w_n = 1, so that the mean over m is the reverse mutual information
    pairwise = ((ratio.exp() * ratio).mean(dim=0) + reverse).clamp(min=0)
    reverse = reverse.clamp(min=0)
    text_ratio = text - log_mean(text)
    variance, variance_of_mean = _variance(text), _variance(log_probs.mean(dim=1))
    figures = {name: _figure(answer, figure) for name, figure in _FIGURES.items()}
    found = {
        "log_probability": mean.sum(),
        "mean_log_probability": mean.mean(),
        "min_log_probability": mean.min(),
        "joint_log_probability": log_mean(text),
        "first_token_log_probability": mean[0],
        **{name: _POOLS[pool](figures[figure]) for name, (figure, pool) in _POOLED.items()},
        "variance_log_probability": variance,
        "std_log_probability": variance.sqrt(),
        "variance_mean_log_probability": variance_of_mean,
        "std_mean_log_probability": variance_of_mean.sqrt(),
        "sum_reverse_mutual_information": reverse.sum(),
        "mean_reverse_mutual_information": reverse.mean(),
        "sum_pairwise_kl": pairwise.sum(),
        "mean_pairwise_kl": pairwise.mean(),
        "sequence_mutual_information": (text_ratio.exp() * text_ratio).mean().clamp(min=0),
    }
    return {name: float(value) for name, value in found.items()}


def token_log_probs(answer: Decoded) -> Tensor:
    """(N, T) float64 log-probability of every token under every particle, checked and kept above log 1e-308.

    Raises:
        UserError: the answer has no token, or NaN.
    """
    log_probs = answer.log_probs.detach().to("cpu").double()
    if log_probs.ndim != 2 or 0 in log_probs.shape:
        raise UserError(
            "An answer needs at least one token and one particle to have a score; generate with max_new_tokens of 1 "
            f"or more (its log-probabilities have the shape {tuple(log_probs.shape)})."
        )
    if log_probs.isnan().any():
        raise UserError(f"The log-probabilities of the answer {answer.text!r} hold NaN; check the model.")
    return log_probs.clamp(min=_LOWEST)


def log_mean(log_probs: Tensor) -> Tensor:
    """log 1/N sum_n exp over the first axis; of N equal numbers that number itself, to the last bit."""
    highest = log_probs.amax(dim=0)
    return highest + (log_probs - highest).exp().mean(dim=0).log()


def _variance(values: Tensor) -> Tensor:
    """Variance over particles, divided by N."""
    # taken off the first one, equal values leave exact zeros
    return (values - values[0]).var(dim=0, correction=0)


def _figure(answer: Decoded, name: str) -> Tensor:
    """A figure of the answer's tokens, (T,)."""
    values: Tensor = getattr(answer, name).detach().to("cpu").double()
    if values.isnan().any():
        raise UserError(f"The {name} uncertainty of the answer {answer.text!r} holds NaN; check the model.")
    return values


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
"""The scores that sampled answers give, by name, as the module's docstring defines them."""


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
