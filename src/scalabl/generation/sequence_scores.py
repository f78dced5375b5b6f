"""What a score of an answer is: a number, which way it points, and how many decodes it takes.

Scores of one answer, from its one decode: (N, T) log-probabilities of its tokens and (T,) figures, in nats.

With y the T tokens, p_n(y_t) = p(y_t | y_<t, x, s_n) of particle n, and p(y_t) = 1/N sum_n p_n(y_t):

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
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.generation.decoding import Decoded


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        function: of one `Decoded`; of sampled scores (answer, samples, sets), as `sampled_scores` says.
        higher_is_uncertain: which way it points.
        sampled: whether it needs samples beside the answer.
        particles: whether it takes two particles or more: with one it is the same for every answer.
    """

    function: Callable[..., float]
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


def sequence_scores(answer: Decoded) -> dict[str, float]:
    """Every score of `SEQUENCE_SCORES`, by name.

    Raises:
        UserError: the answer has no token, or NaN.
    """
    return {name: score.function(answer) for name, score in SEQUENCE_SCORES.items()}


def token_log_probs(answer: Decoded) -> Tensor:
    """(N, T) float64 log-probability of every token under every particle, checked and held above log 1e-308.

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


def log_probability(answer: Decoded) -> float:
    """sum_t log p(y_t), under the average of every token."""
    return float(log_mean(token_log_probs(answer)).sum())


def mean_log_probability(answer: Decoded) -> float:
    """1/T sum_t log p(y_t)."""
    return float(log_mean(token_log_probs(answer)).mean())


def min_log_probability(answer: Decoded) -> float:
    """min_t log p(y_t)."""
    return float(log_mean(token_log_probs(answer)).min())


def joint_log_probability(answer: Decoded) -> float:
    """log 1/N sum_n prod_t p_n(y_t): the average over particles of the whole answer's probability."""
    return float(log_mean(token_log_probs(answer).sum(dim=1)))


def first_token_log_probability(answer: Decoded) -> float:
    """log p(y_1)."""
    return float(log_mean(token_log_probs(answer))[0])


def variance_log_probability(answer: Decoded) -> float:
    """Variance over particles of sum_t log p_n(y_t), divided by N: 0 of one particle."""
    return _variance(token_log_probs(answer).sum(dim=1))


def variance_mean_log_probability(answer: Decoded) -> float:
    """Variance over particles of 1/T sum_t log p_n(y_t), divided by N: 0 of one particle."""
    return _variance(token_log_probs(answer).mean(dim=1))


def sum_reverse_mutual_information(answer: Decoded) -> float:
    """sum_t log p(y_t) - 1/N sum_n log p_n(y_t), >= 0 token by token (Jensen)."""
    return float(_reverse(token_log_probs(answer)).sum())


def mean_reverse_mutual_information(answer: Decoded) -> float:
    """`sum_reverse_mutual_information` divided by T."""
    return float(_reverse(token_log_probs(answer)).mean())


def sum_pairwise_kl(answer: Decoded) -> float:
    """sum_t 1/N sum_n w_n (log p_n(y_t) - 1/N sum_m log p_m(y_t)) with w_n = p_n(y_t) / p(y_t), >= 0."""
    return float(_pairwise(token_log_probs(answer)).sum())


def mean_pairwise_kl(answer: Decoded) -> float:
    """`sum_pairwise_kl` divided by T."""
    return float(_pairwise(token_log_probs(answer)).mean())


def sequence_mutual_information(answer: Decoded) -> float:
    """1/N sum_n w_n log w_n with w_n = prod_t p_n(y_t) / (1/N sum_m prod_t p_m(y_t)), between 0 and log N."""
    whole = token_log_probs(answer).sum(dim=1)
    ratio = whole - log_mean(whole)
    return max(0.0, float((ratio.exp() * ratio).mean()))


def _variance(values: Tensor) -> float:
    # taken off the first one, equal values leave exact zeros
    return float((values - values[0]).var(dim=0, correction=0))


def _reverse(log_probs: Tensor) -> Tensor:
    return (log_mean(log_probs) - log_probs).mean(dim=0).clamp(min=0)


def _pairwise(log_probs: Tensor) -> Tensor:
    mean, ratio = log_mean(log_probs), log_probs - log_mean(log_probs)
    # 1/N sum_n w_n = 1, so that the mean over m is the reverse mutual information
    return ((ratio.exp() * ratio).mean(dim=0) + (mean - log_probs).mean(dim=0)).clamp(min=0)


def _root(function: Callable[[Decoded], float], answer: Decoded) -> float:
    return math.sqrt(function(answer))


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "max": Tensor.amax,
    "first_token": lambda values: values[0],
}


def _pooled(pool: str, figure: str, answer: Decoded) -> float:
    """A figure of the tokens (T,) as one number."""
    values: Tensor = getattr(answer, figure).detach().to("cpu").double()
    if values.numel() == 0:
        raise UserError(
            "An answer needs at least one token to have a score; generate with max_new_tokens of 1 or more."
        )
    if values.isnan().any():
        raise UserError(f"The {figure} uncertainty of the answer {answer.text!r} holds NaN; check the model.")
    return float(_POOLS[pool](values))


_FIGURES = {"entropy": "total", "aleatoric": "aleatoric", "epistemic": "epistemic", "intersection": "intersection"}

SEQUENCE_SCORES: dict[str, Score] = {
    "log_probability": Score(log_probability, False),
    "mean_log_probability": Score(mean_log_probability, False),
    "min_log_probability": Score(min_log_probability, False),
    "joint_log_probability": Score(joint_log_probability, False),
    "first_token_log_probability": Score(first_token_log_probability, False),
    **{
        f"{pool}_{name}": Score(partial(_pooled, pool, figure), True, particles=name == "epistemic")
        for name, figure in _FIGURES.items()
        for pool in _POOLS
        if pool != "first_token" or name in ("entropy", "epistemic")
    },
    "variance_log_probability": Score(variance_log_probability, True, particles=True),
    "std_log_probability": Score(partial(_root, variance_log_probability), True, particles=True),
    "variance_mean_log_probability": Score(variance_mean_log_probability, True, particles=True),
    "std_mean_log_probability": Score(partial(_root, variance_mean_log_probability), True, particles=True),
    "sum_reverse_mutual_information": Score(sum_reverse_mutual_information, True, particles=True),
    "mean_reverse_mutual_information": Score(mean_reverse_mutual_information, True, particles=True),
    "sum_pairwise_kl": Score(sum_pairwise_kl, True, particles=True),
    "mean_pairwise_kl": Score(mean_pairwise_kl, True, particles=True),
    "sequence_mutual_information": Score(sequence_mutual_information, True, particles=True),
}
"""The scores that one decode gives: name -> function, direction and cost."""
