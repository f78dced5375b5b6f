"""The K most probable classes each on its own and all others as one: K backward passes instead of C - 1.

The probability of the others together has the logit f_rest = log sum_{c in rest} exp f_c, whose gradient is that of
their logits weighed by their shares q_c = p_c / p_rest. The shares are taken as known, which leaves the probabilities
of the K classes and of the rest as uncertain as they are. With p the probabilities of the mean and d a deviation of the
logits, the epistemic part of the uncertainty splits, to second order, into

    E[Var_p d] / 2 = E[Var over groups of their mean d] / 2 + p_rest E[Var_q d] / 2

of which the second term is what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def left_out(probs: Tensor, deviations: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """What of each draw's epistemic uncertainty K classes and a rest do not see, and all of it, to second order.

    Args:
        probs: (n, C) class probabilities.
        deviations: (M, n, C) of the class logits, each up to a constant; where probs is 0 they do not count.
        number: K, at least 1.

    Returns:
        both (M, n), in nats.
    """
    deviations = torch.where(probs > 0, deviations, 0.0)
    rest = probs.scatter(1, probs.topk(min(number, probs.shape[1]), dim=-1).indices, 0.0)
    return _variance(rest, deviations) / 2, _variance(probs, deviations) / 2


def _variance(weights: Tensor, values: Tensor) -> Tensor:
    """sum_c w_c (v_c - mean)^2, the mean under w: of weights (n, C) that need not sum to one."""
    whole = weights.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    centred = values - ((weights * values).sum(dim=-1, keepdim=True) / whole)
    return (weights * centred.square()).sum(dim=-1)
