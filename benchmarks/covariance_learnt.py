"""The covariance that a run learnt, against the exact Gauss-Newton posterior at its own weights.

Among Gaussians without correlations between layers the ELBO of a quadratic loss is highest at the "conditional" blocks
of the exact posterior, the inverses of the precision's own blocks: that is what the learnt covariance is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from covariance_posterior import Position, layer_correlations
from torch import Tensor

from scalabl.posterior.joint import JointGaussian

NULLS = ("signs", "order")


def off_diagonals(correlation: Tensor) -> Tensor:
    """(r, r) -> (r (r - 1) / 2,) the correlations of each pair, once."""
    rows, columns = torch.tril_indices(len(correlation), len(correlation), offset=-1)
    return correlation[rows, columns]


def cosine(learnt: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Between the off-diagonals of correlation matrices, all layers behind each other; 0 where one has none."""
    a, b = (torch.cat([off_diagonals(x) for x in matrices]) for matrices in (learnt, exact))
    length = (a.norm() * b.norm()).item()
    return (a @ b).item() / length if length > 0 else 0.0


def null_cosines(learnt: Sequence[Tensor], exact: Sequence[Tensor], null: str, number: int, seed: int) -> Tensor:
    """(number,) cosines of learnt correlations that have nothing to do with the exact ones.

    Args:
        learnt: (r, r) correlation matrices, one a layer.
        exact: of the same layers.
        null: "signs" flips the sign of each number at random, so that correlations keep their sizes and lose their
            signs; "order" shuffles the numbers of each layer, so that they keep both and lose their places.
        number: how many.
        seed: of the flips and shuffles.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        other = []
        for matrix in learnt:
            if null == "signs":
                sign = torch.randint(2, (len(matrix),), generator=generator).to(matrix) * 2 - 1
                other.append(torch.outer(sign, sign) * matrix)
            else:
                order = torch.randperm(len(matrix), generator=generator)
                other.append(matrix[order][:, order])
        found.append(cosine(other, exact))
    return torch.tensor(found, dtype=torch.float64)


def p_value(observed: float, null: Tensor) -> float:
    """(1 + number of null values at least as large) / (1 + number of them) [Phipson and Smyth 2010]."""
    # the observed arrangement is one of the null's, and rounding must not take it out
    return (1 + int((null >= observed - 1e-12).sum())) / (1 + len(null))


def learnt_rows(at: Position, number: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Each layer's row and one of all together, and the null cosines of all together by name.

    rms_*: root mean square correlation; *_cosine: with the learnt ones; slope: of the learnt on the conditional ones,
    1 where they agree; rest_rms: what the slope leaves; p_*: of the cosine with the conditional ones.
    """
    exact, _ = at.exact("own")
    learnt = layer_correlations(at.learnt_relative())
    conditional = layer_correlations(exact.restricted("layer", "conditional"))
    marginal = layer_correlations(exact)
    groups: dict[str, list[str]] = {name: [name] for name in learnt if len(learnt[name]) > 1}
    rows, nulls = [], {}
    for layer, members in (groups | {"all": list(learnt)}).items():
        own, best, block = ([of[name] for name in members] for of in (learnt, conditional, marginal))
        a, b, c = (torch.cat([off_diagonals(x) for x in matrices]) for matrices in (own, best, block))
        found = cosine(own, best)
        nulls = {null: null_cosines(own, best, null, number, seed) for null in NULLS}
        slope = (a @ b / (b @ b)).item() if b.any() else 0.0
        rows.append(
            {
                "layer": layer,
                "pairs": len(a),
                "rms_learnt": _rms(a),
                "rms_conditional": _rms(b),
                "rms_marginal": _rms(c),
                "conditional_cosine": found,
                "marginal_cosine": cosine(own, block),
                "slope": slope,
                "rest_rms": _rms(a - slope * b),
                **{f"p_{null}": p_value(found, values) for null, values in nulls.items()},
            }
        )
    return rows, nulls  # "all" stands last


def fit_rows(positions: Mapping[str, Position]) -> list[dict[str, Any]]:
    """KL(q || exact posterior) in nats of what the runs learnt and of the best that such a q can be.

    Up to a constant it is the ELBO of the quadratic loss around the run's mean, so that a difference of two is what the
    one gains over the other.
    """
    found = []
    for name in ("diagonal", "full"):
        at = positions[name]
        exact, _ = at.exact("own")
        of: dict[str, JointGaussian] = {"learnt": at.learnt_relative()}
        if name == "full":
            of["learnt, correlations dropped"] = at.learnt_relative(correlated=False)
        of["best full in each layer"] = exact.restricted("layer", "conditional")
        of["best diagonal"] = exact.restricted("diagonal", "conditional")
        for kind, q in of.items():
            kl = q.kl(exact)
            found.append({"weights": name, "q": kind, "kl": kl, "kl_a_row": kl / at.curvature.rows})
    return found


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if len(values) else 0.0
