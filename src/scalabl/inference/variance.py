"""How much of a run's predictive variance each layer carries, and the top layers that carry a share of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec, holding_variance
from scalabl.inference.promise import held_out_rows
from scalabl.predictive.linearized import LayerVariance, layer_variances
from scalabl.runs.method import Run
from scalabl.scoring.trunk_store import with_stored_trunk

VARIANCE_ROWS = 100  # on which it is measured


def run_variance(run: Run, *, limit: int = VARIANCE_ROWS, batch_size: int = 8) -> list[LayerVariance]:
    """Each stochastic layer's part of the predictive variance on the run's validation rows, lowest layer first.

    Args:
        run: a loaded run of ScalaBL.
        limit: take so many rows, the same ones every time.
        batch_size: rows at a time.

    Raises:
        UserError: the run's data is not there any more, it has no validation rows, or nothing is uncertain.
    """
    rows = held_out_rows(run.record)
    if not rows:
        raise UserError("This run has no validation rows to measure the variance of its layers on; name last:K.")
    if limit < len(rows):
        rows = tuple(random.Random(0).sample(list(rows), limit))
    encoded = with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=batch_size)
    with progress_bar() as progress:
        bar = progress.add_task("variance by layer", total=len(encoded), detail="")
        return layer_variances(run.scorer, encoded, batch_size=batch_size, advance=lambda n: progress.advance(bar, n))


def top_holding(found: Sequence[LayerVariance], share: float) -> str:
    """The "last:K" of the fewest top layers that carry a share of the variance."""
    return holding_variance({v.name: v.depth for v in found}, {v.name: v.variance for v in found}, share)


def as_top_layers(run: Run, spec: str) -> str:
    """ "variance:0.9" as the "last:K" that it means for a run; other specifications as they are.

    Raises:
        UserError: it is no specification, or the variance cannot be measured.
    """
    kind, share = check_spec(spec, variance=True)
    return top_holding(run_variance(run), share) if kind == "variance" else spec
