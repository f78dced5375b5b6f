"""How sure an answer is, and why: total = aleatoric + epistemic, from the particles' class log-probabilities.

Everything is computed in float64 on the CPU, so that a probability of e-100 is still one, and is in nats.
A particle that was not drawn for a row (adaptive N) is -inf for all its choices there, and counts for nothing.

Temperature scaling is one number that makes probabilities as sure as held-out rows say (Guo et al. 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.core.errors import UserError

SUM_TOLERANCE = 1e-3  # of a row's probabilities around one: float32 passes, bfloat16 log-probabilities do not


@dataclass(frozen=True)
class Uncertainty:
    """The entropy of the averaged prediction and its two parts, each (n,) float64 in nats."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def average(log_probs: Tensor) -> Tensor:
    """The Bayesian model average: log_probs (N, n, C) of N particles -> probs (n, C), float64.

    p(y | x) = 1/N sum_i p(y | x, s_i), summed as log-mean-exp. Choices a row lacks are -inf and become 0.

    Raises:
        UserError: for another shape, no particle, NaN, or rows that do not sum to one.
    """
    return _log_mean(_checked(log_probs)).exp()


def decompose(log_probs: Tensor, per_row: int = 1) -> Uncertainty:
    """Split the predictive entropy of log_probs (N, n, C) into what data and what parameters leave open.

    total     = H[1/N sum_i p_i]        entropy of the averaged prediction
    aleatoric = 1/N sum_i H[p_i]        what remains open when the parameters are known
    epistemic = total - aleatoric       mutual information of answer and parameters, >= 0; exactly 0 for N = 1

    Sources: Houlsby et al. 2011 (BALD, eq. 2); Depeweg et al. 2018 (eq. 1); Malinin and Gales 2018 (eq. 17).

    Args:
        log_probs: of the questions.
        per_row: so many of them behind each other are one row's, of several labels, over which its parts are summed.
            Given the parameters they are independent, so that aleatoric is that of all together; total and epistemic
            are those of each label by itself, which are at least as much and leave out what labels share.

    Raises:
        UserError: as `average`.
    """
    log_probs = _checked(log_probs)
    total = _entropy(_log_mean(log_probs))
    # Rounding may leave the difference at -1e-16; kept at zero, the three numbers still add up.
    aleatoric = torch.minimum(_entropy(log_probs).sum(dim=0) / particles_used(log_probs), total)
    if per_row > 1:
        total, aleatoric = (part.unflatten(0, (-1, per_row)).sum(dim=1) for part in (total, aleatoric))
    return Uncertainty(total=total, aleatoric=aleatoric, epistemic=total - aleatoric)


def is_drawn(log_probs: Tensor) -> Tensor:
    """log_probs (N, n, C) -> (N, n) bool: whether a row has a particle; False where all choices are -inf."""
    return (log_probs != -torch.inf).any(dim=-1)


def particles_used(log_probs: Tensor) -> Tensor:
    """log_probs (N, n, C) -> (n,) how many particles each row has: N, or fewer under adaptive N."""
    return is_drawn(log_probs).sum(dim=0)


def mean_particles(log_probs: Tensor) -> int | float:
    """The mean of `particles_used` over rows; N itself where every row has all of them."""
    used = particles_used(log_probs)
    return log_probs.shape[0] if bool((used == log_probs.shape[0]).all()) else used.double().mean().item()


def _log_mean(log_probs: Tensor) -> Tensor:
    return torch.logsumexp(log_probs, dim=0) - particles_used(log_probs).double().log()[:, None]


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last axis, with 0 log 0 = 0."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)


def _checked(log_probs: Tensor) -> Tensor:
    if log_probs.ndim != 3 or 0 in (log_probs.shape[0], log_probs.shape[2]):
        raise UserError(
            "log_probs must have the shape (particles, rows, choices), at least one particle and one choice, "
            f"not {tuple(log_probs.shape)}; add a first axis of length 1 for a single prediction."
        )
    log_probs = log_probs.detach().to(device="cpu").to(torch.float64)
    if log_probs.isnan().any():
        row = int(log_probs.isnan().any(dim=2).any(dim=0).nonzero()[0])
        raise UserError(f"the log-probabilities of row {row} hold NaN; check the model.")
    sums = log_probs.exp().sum(dim=-1)
    drawn = is_drawn(log_probs)
    wrong = ((sums - 1).abs() > SUM_TOLERANCE) & (drawn | ~drawn.any(dim=0))
    if wrong.any():
        particle, row = (int(i) for i in wrong.nonzero()[0])
        raise UserError(
            f"the probabilities of row {row}, particle {particle} sum to {sums[particle, row].item():.4g}, "
            "not 1; pass log-probabilities (log_softmax of the logits, in float32)."
        )
    # A softmax taken in float32 misses one by 1e-7, which would show in the smallest mutual informations.
    return log_probs.log_softmax(dim=-1).masked_fill(~drawn[..., None], -torch.inf)


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """log softmax(log_probs / T) of every particle; the argmax of a particle never changes.

    Args:
        log_probs: (N, n, C), -inf for missing choices and for particles that a row has not drawn.
        temperature: T, positive.
    """
    return (log_probs / temperature).log_softmax(dim=-1).masked_fill(log_probs == -torch.inf, -torch.inf)


def apply_priors(log_probs: Tensor, ratios: Tensor) -> Tensor:
    """log of p(y | x) r_y / sum_c p(c | x) r_c for every particle: other priors in place of those of training.

    Args:
        log_probs: (N, n, C), -inf for particles that a row has not drawn.
        ratios: (C,) new over old prior, `scalabl.data.class_balance.prior_ratios`.

    Source: Saerens et al. 2002, eq. 4.
    """
    shifted = (log_probs + ratios.to(log_probs).log()).log_softmax(dim=-1)
    return shifted.masked_fill(log_probs == -torch.inf, -torch.inf)


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
