"""The exact Gauss-Newton matrix of the class logits in all s of all layers together.

    H = sum_n J_n^T Lambda_n J_n,   J_n (C, D) the Jacobian of row n's class logits,   Lambda_n = diag(p_n) - p_n p_n^T

No factor, block or diagonal stands for it: D is the number of s, so that H is D x D. Memory: 8 D^2 bytes for H, and
4 times as many while it is decomposed (8 MB in all at D = 500, 3.2 GB at D = 10,000), whatever the number of rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.errors import UserError
from scalabl.predictive.kronecker import likelihood_root
from scalabl.predictive.linearized import logit_jacobian
from scalabl.scoring import Encoded, Scorer
from scalabl.scoring.scorer import batches
from scalabl.tuner import stochastic_layers


@dataclass(frozen=True)
class Curvature:
    """What one pass over labelled rows leaves.

    Attributes:
        matrix: H, (D, D), float64, on the CPU.
        ranks: the layers in the order of H's rows -> how many numbers each has.
        log_likelihood: sum_n log p(y_n | x_n, s_mu) in nats.
        rows: how many.
    """

    matrix: Tensor
    ranks: dict[str, int]
    log_likelihood: float
    rows: int


def gauss_newton(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Curvature:
    """One pass over labelled rows, at the posterior mean.

    Args:
        scorer: a model with stochastic layers.
        rows: encoded rows with answers.
        batch_size: rows at a time; the result does not depend on it.
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no rows, a row without an answer, or more numbers than the memory holds.
    """
    if not rows or any(row.answer is None for row in rows):
        raise UserError("The curvature is taken over labelled rows, but there are none or some have no answer.")
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(scorer.model).items()}
    size = sum(ranks.values())
    _require_memory(size)
    matrix, log_likelihood = torch.zeros(size, size, dtype=torch.float64), 0.0
    was_training = scorer.model.training
    scorer.model.eval()
    try:
        for indices, chunk in batches(rows, batch_size):
            batch = scorer.with_trunk(scorer.scoring.collate(chunk).to(scorer.device))
            logits, jacobians = logit_jacobian(scorer, batch)
            jacobian = torch.cat(list(jacobians.values()), dim=-1).double()
            # the Jacobian is that of differences to the first class, whose column of Lambda follows from the others
            root = likelihood_root(logits.double())[:, 1:]
            weighted = torch.einsum("bck,bcd->bkd", root, jacobian).flatten(0, 1).cpu()
            matrix.addmm_(weighted.T, weighted)
            log_likelihood += logits.double().log_softmax(-1).gather(-1, batch.answers[:, None]).sum().item()
            if advance is not None:
                advance(len(indices))
    finally:
        scorer.model.train(was_training)
    return Curvature(matrix, ranks, log_likelihood, len(rows))


def _require_memory(size: int) -> None:
    needed, there = 4 * 8 * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"The joint covariance of {size:,} numbers takes {needed / 2**30:.0f} GiB, more than this machine has; use "
            "--method vi, whose covariance is diagonal."
        )
