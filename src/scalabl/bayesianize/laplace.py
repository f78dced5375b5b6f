"""Subspace Laplace: q(s) = N(s_adapter, (H + precision I)^-1) over all s of all layers jointly.

    log p(D | precision) ~ log p(D | s) - precision |s|^2 / 2 - 1/2 sum_i log(1 + h_i / precision)      [MacKay 1992]

H is the exact Gauss-Newton matrix (`curvature.py`), h_i its eigenvalues, the prior N(0, I / precision) on relative
strengths (s = 1 at the adapter; see the room's docstring). At the maximum, precision |s|^2 = sum_i h_i / (h_i +
precision), the effective number of parameters: it is at most the number of components in use, so that the precision is
at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalabl.bayesianize.curvature import Curvature, gauss_newton
from scalabl.diagnostics import weights_of
from scalabl.errors import UserError
from scalabl.methods.evidence import log_evidence
from scalabl.posterior.joint import JointGaussian
from scalabl.progress import progress_bar
from scalabl.scoring import Encoded, Scorer
from scalabl.tuner import stochastic_layers

# components below this share of their layer's strongest are not used: rounding alone made them
_NEGLIGIBLE = 1e-6
_LOWEST, _HIGHEST, _A_DECADE = 1e-8, 1e4, 10
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_laplace(
    scorer: Scorer, rows: Sequence[Encoded], *, batch_size: int = 8, prior_precision: float | None = None
) -> tuple[JointGaussian, dict[str, Any]]:
    """One pass over labelled rows, and the posterior.

    Args:
        scorer: a model with stochastic layers whose s is 1.
        rows: encoded rows with answers.
        batch_size: rows at a time.
        prior_precision: of the relative strengths; None takes the one of the highest evidence.

    Returns:
        the joint covariance, and facts: prior_precision, log_evidence, log_likelihood, numbers (D), components
        (those in use), effective_parameters, rows.
    """
    components = used_components(scorer)
    with progress_bar() as progress:
        bar = progress.add_task("curvature", total=len(rows), detail="")
        curvature = gauss_newton(scorer, rows, batch_size=batch_size, advance=lambda n: progress.advance(bar, n))
    return posterior_of(curvature, components, prior_precision)


def posterior_of(
    curvature: Curvature, squared_norm: float, prior_precision: float | None = None
) -> tuple[JointGaussian, dict[str, Any]]:
    """The Gaussian of precision H + precision I, and the facts of `fit_laplace`.

    Args:
        curvature: H.
        squared_norm: |s|^2, the number of components in use.
        prior_precision: None takes the one of the highest evidence.

    Raises:
        UserError: the precision is not positive.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature.matrix)
    eigenvalues = eigenvalues.clamp_min(0)  # rounding
    precision = best_precision(squared_norm, eigenvalues) if prior_precision is None else prior_precision
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


def best_precision(squared_norm: float, eigenvalues: Tensor) -> float:
    """The prior precision of the highest evidence: the best of a logarithmic grid, refined by golden section.

    The evidence may have several maxima; the grid (10 points a decade, 1e-8 to 1e4) finds the highest.

    Args:
        squared_norm: |s|^2, positive.
        eigenvalues: (D,) of H, float64.
    """

    def at(log_precision: float) -> float:
        precision = eigenvalues.new_tensor(log_precision).exp()
        return log_evidence(0.0, squared_norm, [eigenvalues], precision).item()

    points = round(math.log10(_HIGHEST / _LOWEST)) * _A_DECADE + 1
    grid = torch.linspace(math.log(_LOWEST), math.log(_HIGHEST), points, dtype=torch.float64).tolist()
    best = max(range(points), key=lambda i: at(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(points - 1, best + 1)]
    while high - low > 1e-9:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if at(left) >= at(right) else (left, high)
    return math.exp((low + high) / 2)


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
