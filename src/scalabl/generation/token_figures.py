"""What the particles say about the next token: figures of one position from (N, B, V) log-probabilities, in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenFigures:
    """Figures of the next-token distribution, each (B,).

    Attributes:
        total: entropy of the average, H[1/N sum_n p_n].
        aleatoric: mean entropy of the particles, 1/N sum_n H[p_n].
        epistemic: total - aleatoric, the mutual information of token and parameters, >= 0.
        intersection: entropy of the intersection probability of the particles.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    intersection: Tensor


def token_figures(log_probs: Tensor) -> TokenFigures:
    """Figures of (N, B, V) log-probabilities.

    The intersection probability of the interval [l, u] that the particles span, l(v) = min_n p_n(v) and
    u(v) = max_n p_n(v), is l + beta (u - l) with the one beta that lets it sum to one [Cuzzolin 2009]: every token
    takes the same share of its own disagreement.

    Sources: Houlsby et al. 2011 (BALD, eq. 2) for the split; Cuzzolin 2009 for the intersection probability.
    """
    number = log_probs.shape[0]
    mean = log_probs.logsumexp(dim=0) - math.log(number)
    total = _entropy(mean)
    aleatoric = torch.minimum(torch.stack([_entropy(one) for one in log_probs]).mean(dim=0), total)
    return TokenFigures(total, aleatoric, total - aleatoric, _entropy(intersection_probability(log_probs)))


def intersection_probability(log_probs: Tensor) -> Tensor:
    """Logarithm (B, V) of the intersection probability of N distributions (N, B, V)."""
    low, high = log_probs.amin(dim=0).exp().double(), log_probs.amax(dim=0).exp().double()
    width = high - low
    open_mass = (1 - low.sum(dim=-1, keepdim=True)).clamp_min(0)
    spread = width.sum(dim=-1, keepdim=True)
    beta = torch.where(spread > 0, open_mass / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)
    chosen = low + beta * width
    return (chosen / chosen.sum(dim=-1, keepdim=True)).log().to(log_probs.dtype)


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last axis, with 0 log 0 = 0."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)
