"""Temperature scaling: one number that makes probabilities as sure as held-out rows say (Guo et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import is_drawn, particles_used


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """log softmax(log_probs / T) of every particle; the argmax of a particle never changes.

    Args:
        log_probs: (N, n, C), -inf for missing choices and for particles that a row has not drawn.
        temperature: T, positive.
    """
    return (log_probs / temperature).log_softmax(dim=-1).masked_fill(log_probs == -torch.inf, -torch.inf)


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL in nats of the particles' average. log_probs (N, n, C), labels (n,)."""
    average = log_probs.logsumexp(dim=0) - particles_used(log_probs).to(log_probs).log()[:, None]
    return -average.gather(-1, labels[:, None]).mean()


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the NLL of held-out rows, by L-BFGS on log T.

    Args:
        log_probs: (N, n, C) log class probabilities of validation rows, of one particle or several.
        labels: (n,) their right answers.

    Raises:
        UserError: there are no rows, or the probabilities are not finite.
    """
    if labels.numel() == 0:
        raise UserError("A temperature needs validation rows, but there are none; give a validation split.")
    if log_probs.isnan().any():
        raise UserError("The validation probabilities are not finite, so no temperature can be fitted.")
    # -inf marks a missing choice: a large negative number has the same effect and a defined gradient
    finite = log_probs.double().clamp_min(-1e4)
    missing, drawn = torch.isinf(log_probs), is_drawn(log_probs)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = (finite / log_temperature.exp()).masked_fill(missing, -1e9).log_softmax(dim=-1)
        loss = negative_log_likelihood(scaled.masked_fill(~drawn[..., None], -torch.inf), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    # beyond these limits the NLL is flat: every row right with probability one, or nothing better than uniform
    return float(log_temperature.detach().clamp(-4.6, 4.6).exp())
