"""Subspace Laplace: q(s) = N(s_adapter, (H + precision I)^-1) over all s of all layers jointly.

H is the exact Gauss-Newton matrix of the class logits,

    H = sum_n J_n^T Lambda_n J_n,   J_n (C, D) the Jacobian of row n's class logits,   Lambda_n = diag(p_n) - p_n p_n^T

and Lambda_n = diag(p_n (1 - p_n)) where each of C labels is for itself. Of more than 26 classes the 25 most probable
ones of a row are taken each on its own and the others as one (`scalabl.predictive.top_classes`): H lacks the curvature
among the others, and takes 25 backward passes a row and not C - 1.

No factor, block or diagonal stands for it: D is the number of s, so that H is D x D. Memory: 8 D^2 bytes for H, and
4 times as many while it is decomposed (8 MB in all at D = 500, 3.2 GB at D = 10,000), whatever the number of rows.

The prior is N(0, I / precision) on relative strengths (s = 1 at the adapter; see the package's docstring). Its
precision is that of the highest evidence, h_i the eigenvalues of H, or the multiple of it that held-out rows choose:

    log p(D | precision) ~ log p(D | s) - precision |s|^2 / 2 - 1/2 sum_i log(1 + h_i / precision)      [MacKay 1992]

At the maximum, precision |s|^2 = sum_i h_i / (h_i + precision), the effective number of parameters: it is at most the
number of components in use, so that the precision is at most 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.posterior.evidence import best_precision, log_evidence
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.predictive.top_classes import Groups
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.likelihood import log_likelihood
from scalabl.scoring.scorer import Scorer
from scalabl.training.posthoc.precision import index_of_best, tried_precisions
from scalabl.tuner.diagnostics import weights_of
from scalabl.tuner.layers import stochastic_layers


@dataclass(frozen=True)
class JointCurvature:
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

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,), at least 0, and eigenvectors (D, D) of H, which every precision shares."""
        eigenvalues, vectors = torch.linalg.eigh(self.matrix)
        return eigenvalues.clamp_min(0), vectors  # below 0 by rounding


def gauss_newton(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> JointCurvature:
    """One pass over labelled rows, at the posterior mean.

    Args:
        scorer: a model with stochastic layers.
        rows: encoded rows with answers.
        batch_size: rows at a time; the result does not depend on it.
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no rows, a row without an answer, or more numbers than fit into memory.
    """
    if not rows or not all(row.is_labelled for row in rows):
        raise UserError("The curvature is taken over labelled rows, but there are none or some have no answer.")
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(scorer.model).items()}
    size = sum(ranks.values())
    _require_memory(size)
    matrix, total = torch.zeros(size, size, dtype=torch.float64), 0.0
    likelihood, linearized = scorer.scoring.likelihood, LinearizedPredictive()
    with eval_mode(scorer.model):
        for indices, batch in scorer.encoded_batches(rows, batch_size):
            logits, jacobians = linearized.jacobian(scorer, batch)
            jacobian = torch.cat(list(jacobians.values()), dim=-1).double()
            contrasts = jacobian.shape[1]
            classes = logits if contrasts >= logits.shape[1] - 1 else Groups.of(logits, contrasts).mean
            # the Jacobian may be that of differences to the first class, whose row of M follows from the others
            root = likelihood.curvature_root(classes.double())[:, -contrasts:]
            weighted = torch.einsum("bck,bcd->bkd", root, jacobian).flatten(0, 1).cpu()
            matrix.addmm_(weighted.T, weighted)
            total += log_likelihood(likelihood, logits.double(), batch.answers).item()
            if advance is not None:
                advance(len(indices))
    return JointCurvature(matrix, ranks, total, len(rows))


def _require_memory(size: int) -> None:
    needed, there = 4 * 8 * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"The joint covariance of {size:,} numbers takes {needed / 2**30:.0f} GiB, more than this machine has; use "
            "--method vi, whose covariance is diagonal."
        )


# components below this share of their layer's strongest are not used: rounding alone made them
_NEGLIGIBLE = 1e-6


def fit_laplace(
    scorer: Scorer,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded] = (),
    *,
    batch_size: int = 8,
    prior_precision: float | None = None,
) -> tuple[JointGaussian, dict[str, Any]]:
    """One pass over labelled rows, one over those that are held out, and the posterior.

    Args:
        scorer: a model with stochastic layers whose s is 1.
        rows: encoded rows with answers.
        held_out: others, by whose NLL under the linearised predictive the precision is chosen.
        batch_size: rows at a time.
        prior_precision: of the relative strengths; None takes the one of the highest evidence, or the multiple of
            it that held-out rows choose where there are any.

    Returns:
        the joint covariance, and facts: prior_precision, log_evidence, log_likelihood, numbers (D), components
        (those in use), effective_parameters, rows.
    """
    components = used_components(scorer)
    with progress_bar() as progress:
        bar = progress.add_task("curvature", total=len(rows), detail="")
        curvature = gauss_newton(scorer, rows, batch_size=batch_size, advance=lambda n: progress.advance(bar, n))
    joint, facts = posterior_of(curvature, components, prior_precision)
    if prior_precision is not None or not held_out:
        return joint, facts
    tried = tried_precisions(facts["prior_precision"])
    eigenvalues, vectors = (part.float().to(scorer.device) for part in curvature.eigen)
    likelihood, linearized = scorer.scoring.likelihood, LinearizedPredictive()

    def predictions(batch: Batch) -> Iterator[Tensor]:
        logits, jacobians = linearized.jacobian(scorer, batch)
        rotated = torch.cat([jacobians[name] for name in curvature.ranks], dim=-1) @ vectors  # once for all precisions
        roots = (rotated / (eigenvalues + precision).sqrt() for precision in tried)
        return (linearized.log_probs(logits, root @ root.mT, likelihood) for root in roots)

    best = index_of_best(scorer, held_out, predictions, batch_size=batch_size)
    return posterior_of(curvature, components, tried[best])


def posterior_of(
    curvature: JointCurvature, squared_norm: float, prior_precision: float | None = None
) -> tuple[JointGaussian, dict[str, Any]]:
    """The Gaussian of precision H + precision I, and the facts of `fit_laplace`.

    Args:
        curvature: H.
        squared_norm: |s|^2, the number of components in use.
        prior_precision: None takes the one of the highest evidence.

    Raises:
        UserError: the precision is not positive.
    """
    eigenvalues, vectors = curvature.eigen
    precision = best_precision(squared_norm, [eigenvalues]) if prior_precision is None else prior_precision
    if not (math.isfinite(precision) and precision > 0):
        raise UserError(f"The prior precision is {precision}; it must be a positive number.")
    joint = JointGaussian.from_precision(eigenvalues + precision, vectors, curvature.ranks)
    evidence = log_evidence(curvature.log_likelihood, squared_norm, [eigenvalues], eigenvalues.new_tensor(precision))
    facts = {
        "prior_precision": precision,
        "log_evidence": evidence.item(),
        "log_likelihood": curvature.log_likelihood,
        "numbers": joint.size,
        "components": int(squared_norm),
        "effective_parameters": (eigenvalues / (eigenvalues + precision)).sum().item(),
        "rows": curvature.rows,
    }
    return joint, facts


def used_components(scorer: Scorer) -> int:
    """How many components of all layers the adapter uses.

    Raises:
        UserError: none, B is zero everywhere; or s is not 1 at the mean.
    """
    used = 0
    for layer in weights_of(scorer.model):
        strength = layer.up.detach().float().norm(dim=0)
        used += int((strength > _NEGLIGIBLE * strength.max().clamp_min(1e-30)).sum())
    if used == 0:
        raise UserError("The adapter's B is zero in every layer, so it was never trained; give a trained adapter.")
    means = torch.cat([leaf.posterior.mean.detach() for leaf in stochastic_layers(scorer.model).values()])
    if not torch.equal(means, torch.ones_like(means)):
        raise UserError("The prior is on relative strengths, so s must be 1 everywhere; start from a plain LoRA.")
    return used
