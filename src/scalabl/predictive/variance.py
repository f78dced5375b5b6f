"""How much of the predictive variance comes from each layer's s.

    Cov[f(x)] ~ sum_l J_l Sigma_l J_l^T,    J_l = df/ds_l at s_mu    [the linearised predictive, layer by layer]

f are the differences of the class logits to the first one's. Correlations between layers, where a joint covariance has
them, belong to no layer and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.predictive.drawn_layers import drawn_layers
from scalabl.predictive.linearized import logit_jacobian
from scalabl.scoring.base import Encoded
from scalabl.scoring.scorer import Scorer, batches
from scalabl.tuner.layers import stochastic_layers


@dataclass(frozen=True)
class LayerVariance:
    """A layer's part of the predictive variance.

    Attributes:
        name: the adapted layer.
        depth: its decoder layer; their number for what follows them.
        variance: mean over the rows of tr(J_l Sigma_l J_l^T), in squared logits.
        share: of the sum over all layers.
    """

    name: str
    depth: int
    variance: float
    share: float


@torch.no_grad()
def layer_variances(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[LayerVariance]:
    """Every stochastic layer's part of the predictive variance, lowest first.

    Args:
        scorer: the model with its scoring.
        rows: encoded rows; their answers are not read.
        batch_size: rows at a time; the figures do not depend on it.
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no rows, the model has no stochastic layer, or nothing is uncertain in any.
    """
    if not rows:
        raise UserError("The variance of predictions is measured on rows, but there are none; give some.")
    posteriors = {name: leaf.posterior.covariance().float() for name, leaf in stochastic_layers(scorer.model).items()}
    depths = drawn_layers(scorer.model, None)
    totals = dict.fromkeys(sorted(depths, key=lambda name: depths[name]), 0.0)
    with eval_mode(scorer.model):
        for indices, chunk in batches(rows, batch_size):
            batch = scorer.with_trunk(scorer.scoring.collate(chunk).to(scorer.device))
            _, jacobians = logit_jacobian(scorer, batch)
            for name, jacobian in jacobians.items():
                totals[name] += ((jacobian @ posteriors[name]) * jacobian).sum().item()
            if advance is not None:
                advance(len(indices))
    whole = sum(totals.values())
    if not whole > 0:
        raise UserError("No layer's s moves a prediction: B is zero or sigma has collapsed, so there are no shares.")
    return [
        LayerVariance(name, depths[name], variance / len(rows), variance / whole) for name, variance in totals.items()
    ]
