"""The K most probable classes each on its own and all others as one: K backward passes instead of C - 1.

The probability of the others together has the logit f_rest = log sum_{c in rest} exp f_c, whose gradient is that of
their logits weighed by their shares q_c = p_c / p_rest. The shares are taken as known, which leaves the probabilities
of the K classes and of the rest as uncertain as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# K where nothing else is named, all of 26 letters; of more classes the others share what little probability is left
TOP_CLASSES = 25


@dataclass(frozen=True)
class Groups:
    """The groups of B rows: the K most probable classes in falling order, then the rest.

    Attributes:
        logits: (B, C) of the mean, -inf where a row has no such choice.
        top: (B, K) the classes with a group of their own.
    """

    logits: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor, number: int) -> Groups:
        """The groups of class logits (B, C) with so many classes on their own, 1 <= number < C."""
        return cls(logits, logits.topk(number, dim=-1).indices)

    @property
    def _rest(self) -> Tensor:
        """(B, C) the logits of the rest, -inf at the others."""
        return self.logits.scatter(1, self.top, -torch.inf)

    @property
    def mean(self) -> Tensor:
        """(B, K + 1) logits of the groups."""
        return torch.cat([self.logits.gather(1, self.top), self._rest.logsumexp(dim=-1, keepdim=True)], dim=-1)

    @property
    def contrasts(self) -> Tensor:
        """(B, K, C) the gradients in the class logits of the groups' differences to the first one; zero where a row has
        no such group."""
        each = torch.nn.functional.one_hot(self.top, self.logits.shape[-1]).to(self.logits.dtype)
        rest = self._rest.softmax(dim=-1).nan_to_num(0.0)  # of a row without a rest: 0 / 0
        groups = torch.cat([each, rest[:, None]], dim=1)
        return (groups[:, 1:] - groups[:, :1]) * self.mean[:, 1:, None].isfinite()

    def spread(self, log_probs: Tensor) -> Tensor:
        """(P, B, K + 1) log probabilities of the groups -> (P, B, C) of the classes."""
        shares = self._rest.log_softmax(dim=-1)
        of_rest = log_probs[..., -1:] + shares.masked_fill(shares.isnan(), -torch.inf)  # of a row without a rest
        return of_rest.scatter(-1, self.top.expand(log_probs.shape[0], -1, -1), log_probs[..., :-1])
