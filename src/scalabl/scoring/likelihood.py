"""What class logits are the logits of: one label out of C, or each of C labels for itself.

    one       p(y | x) = softmax(z)_y                                  y one of the C labels
    several   p(y | x) = prod_c sigmoid(z_c)^y_c sigmoid(-z_c)^(1-y_c)   y_c = 1 where a row has label c

Of rows of several labels a question is a row with a label, answered no or yes; C of them stand behind each other. Given
the weights they are independent, so that the log-likelihood of a row is the sum over its labels: a mean over them would
weigh the KL beside it C times as much.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(Protocol):
    """The distribution of a row's labels given its class logits z (B, C)."""

    def log_probs(self, logits: Tensor) -> Tensor:
        """(..., C) -> log probabilities (..., K), as a predictive gives them."""

    def questions(self, log_probs: Tensor) -> Tensor:
        """(N, n, K) of n rows -> (N, q, choices) of q questions with a distribution each, those of a row together."""

    def loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Mean over the rows of -log p(y | x), in nats; answers as a batch has them."""

    def curvature_root(self, logits: Tensor) -> Tensor:
        """(B, C, C) M with M M^T = Lambda, the curvature of -log p(y | x) in the logits."""

    def contrasts(self, logits: Tensor, num_choices: Tensor) -> list[Tensor]:
        """Of each combination of logits that p depends on, its weights (B, C); zero where a row has no such choice."""

    def moved(self, logits: Tensor, shift: Tensor) -> Tensor:
        """Logits (B, C) whose combinations are moved by (P, B, number of combinations): (P, B, C)."""

    def energy(self, logits: Tensor) -> Tensor:
        """(B,) minus the log of the normaliser: low where a row is like those trained on."""


def log_likelihood(likelihood: Likelihood, logits: Tensor, answers: Tensor) -> Tensor:
    """sum of log p(y | x) over the rows, in nats; logits (B, C), answers as a batch has them."""
    questions = likelihood.questions(likelihood.log_probs(logits)[None])[0]
    return questions.gather(-1, answers.flatten()[:, None]).sum()


class OneLabel:
    """One label out of C, of which differences of logits to the first alone matter."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)

    def questions(self, log_probs: Tensor) -> Tensor:
        return log_probs

    def loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(logits, answers)

    def curvature_root(self, logits: Tensor) -> Tensor:
        """Lambda = diag(p) - p p^T."""
        p = logits.softmax(dim=-1)
        root = p.sqrt()
        return torch.diag_embed(root) - p[:, :, None] * root[:, None, :]

    def contrasts(self, logits: Tensor, num_choices: Tensor) -> list[Tensor]:
        found = []
        for c in range(1, logits.shape[1]):
            weights = torch.zeros_like(logits)
            weights[:, c] = (c < num_choices).to(logits.dtype)
            weights[:, 0] = -weights[:, c]
            found.append(weights)
        return found

    def moved(self, logits: Tensor, shift: Tensor) -> Tensor:
        first = logits[None, :, :1].expand(shift.shape[0], -1, -1)
        return torch.cat([first, logits[None, :, 1:] + shift], dim=-1)

    def energy(self, logits: Tensor) -> Tensor:
        return -logits.logsumexp(dim=-1)


class SeveralLabels:
    """Each of C labels for itself; K = 2 C, the log probabilities of no and yes of each label in turn."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1).flatten(-2)

    def questions(self, log_probs: Tensor) -> Tensor:
        return log_probs.unflatten(-1, (-1, 2)).flatten(1, 2)

    def loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, answers.to(logits.dtype), reduction="none")
        return each.sum(dim=-1).mean()

    def curvature_root(self, logits: Tensor) -> Tensor:
        """Lambda = diag(p (1 - p))."""
        return torch.diag_embed((logits.sigmoid() * (-logits).sigmoid()).sqrt())

    def contrasts(self, logits: Tensor, num_choices: Tensor) -> list[Tensor]:
        return [F.one_hot(torch.full_like(num_choices, c), logits.shape[1]).to(logits) for c in range(logits.shape[1])]

    def moved(self, logits: Tensor, shift: Tensor) -> Tensor:
        return logits + shift

    def energy(self, logits: Tensor) -> Tensor:
        """The sum of the labels' own [Wang et al. 2021, JointEnergy, 2109.14162]."""
        return -F.softplus(logits).sum(dim=-1)
